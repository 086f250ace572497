// What sm90_conv_bn_act's loading warps do: tickets, operands, residuals; and the barriers by which they are heard.
#pragma once

#include "ptx_l2.cuh"
#include "sm90_conv.h"

namespace fastres {
namespace {

constexpr int kReaders = 1 + kConvGroups + 4 * kConvGroups;  // of a ticket, in a block: loader, residuals, warps

// The n-th use of a ring of slots.
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  FASTRES_DEVICE void next(int slots) {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

struct ConvBarriers {
  uint32_t base;
  FASTRES_DEVICE uint32_t full(int i) const { return base + 8 * i; }
  FASTRES_DEVICE uint32_t empty(int i) const { return base + 8 * (kMaxStages + i); }
  FASTRES_DEVICE uint32_t slot_full(int group, int i) const {
    return base + 8 * (2 * kMaxStages + group * kMaxSlots + i);
  }
  FASTRES_DEVICE uint32_t slot_empty(int group, int i) const {
    return base + 8 * (2 * kMaxStages + (kConvGroups + group) * kMaxSlots + i);
  }
  FASTRES_DEVICE uint32_t ticket_full(int i) const {
    return base + 8 * (2 * kMaxStages + 2 * kConvGroups * kMaxSlots + i);
  }
  FASTRES_DEVICE uint32_t ticket_empty(int i) const { return ticket_full(kMaxTicks + i); }
  FASTRES_DEVICE uint32_t box_full(int i) const { return ticket_full(2 * kMaxTicks + i); }
  FASTRES_DEVICE uint32_t box_empty(int i) const { return box_full(kHaloBoxes + i); }
};

// A reader's view of the tickets: which tile is next.
struct Tickets {
  const volatile int* tiles;
  ConvBarriers barriers;
  Ring ring{};

  // By one thread: the ticket may be written over at once.
  FASTRES_DEVICE int take(const Sm90Conv& p) {
    const int tile = peek();
    hand_back(p);
    return tile;
  }
  FASTRES_DEVICE int peek() const {
    ptx::barrier_wait_cluster(barriers.ticket_full(ring.slot), ring.parity);
    return tiles[ring.slot];
  }
  FASTRES_DEVICE void hand_back(const Sm90Conv& p) {
    ptx::barrier_arrive_cluster(ptx::address_in(barriers.ticket_empty(ring.slot), 0));
    ring.next(p.ticks);
  }
};

FASTRES_DEVICE void write_tickets(const Sm90Conv& p, uint32_t tickets, const ConvBarriers& b) {
  // The first one needs no counter: every cluster has a tile.
  int tile = static_cast<int>(blockIdx.x) / p.cluster;
  Ring ring;
  for (;;) {
    ptx::barrier_wait(b.ticket_empty(ring.slot), ring.parity ^ 1);
    for (int rank = 0; rank < p.cluster; ++rank)
      ptx::store_cluster(ptx::address_in(tickets + 4 * ring.slot, rank), tile);
    ptx::fence_cluster();
    for (int rank = 0; rank < p.cluster; ++rank)
      ptx::barrier_arrive_cluster(ptx::address_in(b.ticket_full(ring.slot), rank));
    if (tile >= p.tiles) return;
    ring.next(p.ticks);
    tile = p.clusters + ptx::add_relaxed(p.counter, 1);
  }
}

// This block's share of a step's filters; in a cluster it goes to both blocks.
template <int kFilters, int kPixels>
FASTRES_DEVICE void load_filters(const Sm90Conv& p, uint32_t stage, uint32_t full, const ConvStep& at, int filter,
                                 int rank, ptx::Policy policy) {
  ptx::barrier_arrive_expect(full, ConvTileShape{kFilters, kPixels}.stage_bytes());
  const TensorMap* map = at.source ? &p.second_weight : &p.weight;
  const int tap = at.r * p.source[at.source].s + at.s;
  if (p.cluster == 1) {
    ptx::load_box(stage, map, full, at.c * kConvDepth, tap, filter, policy);
  } else {
    constexpr int kShare = kFilters / 2;
    ptx::load_box_multicast(stage + rank * kShare * kSwizzleRow, map, full, at.c * kConvDepth, tap,
                            filter + rank * kShare, 3, policy);
  }
}

template <int kFilters, int kPixels>
FASTRES_DEVICE int load_filters_ahead(const Sm90Conv& p, uint32_t stages, const ConvBarriers& b, int rank) {
  const auto tile = Sm90ConvTile::of(p, static_cast<int>(blockIdx.x) / p.cluster, rank, kFilters, kPixels);
  const ConvDepth depth = ConvDepth::of(p, tile.first_pixel);
  const int ahead = depth.steps < p.stages ? depth.steps : p.stages;
  const ptx::Policy policy = ptx::make_policy(p.filters_eviction);
  ConvStep at = depth.first;
  for (int i = 0; i < ahead; ++i, at.advance(p))
    load_filters<kFilters, kPixels>(p, stages + i * ConvTileShape{kFilters, kPixels}.stage_bytes(), b.full(i), at,
                                    tile.first_filter, rank, policy);
  return ahead;
}

template <int kFilters, int kPixels>
FASTRES_DEVICE void load_operands(const Sm90Conv& p, uint32_t base, uint32_t stages, const ConvBarriers& b,
                                  Tickets tickets, int rank, int ahead) {
  constexpr ConvTileShape kTile{kFilters, kPixels};
  constexpr int kStageBytes = kTile.stage_bytes();
  const ptx::Policy policy = ptx::make_policy(p.pixels_eviction), of_filters = ptx::make_policy(p.filters_eviction);
  Ring ring, box;
  for (;;) {
    const int tile = tickets.take(p);
    if (tile >= p.tiles) return;
    const auto of = Sm90ConvTile::of(p, tile, rank, kFilters, kPixels);
    WindowStart window{};
    const ConvDepth depth = ConvDepth::of(p, of.first_pixel);
    if (kTile.takes_positions() && p.span) window = Position::of(p, of.first_pixel).window(p);
    ConvStep at = depth.first;
    for (int i = 0; i < depth.steps; ++i, at.advance(p), ring.next(p.stages)) {
      const ConvSource& source = p.source[at.source];
      const uint32_t stage = stages + ring.slot * kStageBytes, full = b.full(ring.slot);
      if (ahead > 0) {
        --ahead;
      } else {
        ptx::barrier_wait(b.empty(ring.slot), ring.parity ^ 1);
        load_filters<kFilters, kPixels>(p, stage, full, at, of.first_filter, rank, of_filters);
      }
      const uint32_t to = stage + kTile.filters_bytes();
      const TensorMap* map = at.source ? &p.second : &p.x;
      if constexpr (kTile.halo()) {
        // After the filters of its three taps: they wait for a stage each, the box for all three products before.
        if (at.r < 2) continue;
        const auto place = HaloPlace::of(p, of.first_pixel);
        ptx::barrier_wait(b.box_empty(box.slot), box.parity ^ 1);
        ptx::barrier_arrive_expect(b.box_full(box.slot), kTile.pixels_bytes());
        ptx::load_box(base + box.slot * kTile.pixels_bytes(), map, b.box_full(box.slot), at.c * kConvDepth, at.s - 1,
                      place.n, place.h - 1, policy);
        box.next(kHaloBoxes);
      } else if (kTile.takes_positions() && p.span) {
        ptx::load_box(to, map, full, at.c * kConvDepth, window.w + at.s * source.dilation_w,
                      window.h + at.r * source.dilation_h, window.n, policy);
      } else if (source.plain) {
        ptx::load_box(to, map, full, at.c * kConvDepth, of.first_pixel, policy);
      } else {
        if (at.r == 0 && at.s == 0 && at.c == 0) window = WindowStart::of(p, source, of.first_pixel);
        ptx::load_im2col(to, map, full, at.c * kConvDepth, window.w, window.h, window.n, at.s * source.dilation_w,
                         at.r * source.dilation_h, policy);
      }
    }
  }
}

// A group's chunks of the residual, or empty slots, in the order in which the group finishes them.
template <int kFilters, int kPixels>
FASTRES_DEVICE void load_residuals(const Sm90Conv& p, uint32_t slots, const ConvBarriers& b, Tickets tickets, int rank,
                                   int group) {
  constexpr ConvTileShape kTile{kFilters, kPixels};
  const bool loads = p.residual_rows && p.by_tma;
  const ptx::Policy policy = ptx::make_policy(p.out_eviction);
  Ring ring;
  for (;;) {
    const int tile = tickets.take(p);
    if (tile >= p.tiles) return;
    const auto of = Sm90ConvTile::of(p, tile, rank, kFilters, kPixels);
    const int filter = of.first_filter + (kTile.share_pixels() ? 0 : group * kTile.group_filters());
    const int pixel = of.first_pixel + (kTile.share_pixels() ? group * kTile.group_pixels() : 0);
    for (int m = 0; m < kTile.group_filters(); m += kConvChunk)
      for (int n = 0; n < kTile.group_pixels(); n += kTile.chunk_pixels(), ring.next(p.slots)) {
        const uint32_t full = b.slot_full(group, ring.slot);
        ptx::barrier_wait(b.slot_empty(group, ring.slot), ring.parity ^ 1);
        if (loads) {
          const uint32_t to = slots + ring.slot * kChunkBytes;
          ptx::barrier_arrive_expect(full, kTile.chunk_pixels() * kSwizzleRow);
          if constexpr (kTile.halo()) {
            const auto place = HaloPlace::of(p, pixel + n);
            ptx::load_box(to, &p.residual, full, filter + m, 0, place.n, place.h, policy);
          } else if (kTile.takes_positions() && p.span) {
            const auto place = Position::of(p, pixel + n);
            ptx::load_box(to, &p.residual, full, filter + m, place.n, place.at, policy);
          } else {
            ptx::load_box(to, &p.residual, full, filter + m, pixel + n, policy);
          }
        } else {
          ptx::barrier_arrive(full);
        }
      }
  }
}

}  // namespace
}  // namespace fastres
