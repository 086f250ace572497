// Shared memory, barriers and tiles of sm90_shifted_block; plain arithmetic.
#pragma once

#include "sm90.h"

namespace fastres {

// y = relu(conv3x3(x)), out = relu(expand(y) + residual) and, with `reduce`, next = relu(reduce(out)).
struct ShiftedBlock {
  TensorMap x, residual, out, next;           // [n, h, w, channels]
  TensorMap conv_weight, expand_weight, reduce_weight;
  const float *conv, *expand, *reduce;        // (scale, shift) by channel
  int* counter;                               // zero: the next tile
  int tiles, tiles_h, tiles_w;
};

constexpr int kBlockChannels = 64, kBlockExpanded = 256, kBlockSide = 8;
constexpr int kBlockChunks = kBlockExpanded / kBlockChannels;

struct BlockTile {
  int n, h, w;
  // Images outermost, so that neighbouring blocks share halos in the L2.
  FASTRES_BOTH static constexpr BlockTile of(const ShiftedBlock& p, int tile) {
    const int column = tile % p.tiles_w, row = tile / p.tiles_w % p.tiles_h;
    return {tile / p.tiles_w / p.tiles_h, row * kBlockSide, column * kBlockSide};
  }
};

// One group of four warps has a tile; the groups of a block share nothing but the weights.
constexpr int kBlockGroups = 2;
constexpr int kHaloSlots = 2, kRingSlots = 3, kTickSlots = 2;  // a group
constexpr int kMatrixBytes = 64 * kSwizzleRow;                 // 64 x 64 of 16 bits: weights, and a ring slot
constexpr int kHaloRows = kBlockSide + 2;
constexpr int kHaloBytes = kHaloRows * kBlockSide * kSwizzleRow;

FASTRES_BOTH constexpr int block_matrices(bool reduce) { return 9 + kBlockChunks * (reduce ? 2 : 1); }

// Offsets into shared memory. Every matrix and slot starts at a multiple of 1,024.
struct BlockLayout {
  int weights, halo, ring, barriers, ticks, bytes;
  FASTRES_BOTH static constexpr BlockLayout of(bool reduce) {
    BlockLayout l{};
    l.halo = block_matrices(reduce) * kMatrixBytes;
    l.ring = l.halo + kBlockGroups * kHaloSlots * kHaloBytes;
    l.barriers = l.ring + kBlockGroups * kRingSlots * kMatrixBytes;
    // weights; a group: full and empty of the halo, of the ring, of the ticks.
    l.ticks = l.barriers + 8 * (1 + kBlockGroups * 2 * (kHaloSlots + kRingSlots + kTickSlots));
    l.bytes = l.ticks + kBlockGroups * kTickSlots * 4;
    return l;
  }
};
static_assert(BlockLayout::of(true).bytes <= 227 * 1024, "more shared memory than a block of Hopper may have");
static_assert(BlockLayout::of(true).halo % 1024 == 0 && BlockLayout::of(true).ring % 1024 == 0);
static_assert(kHaloBytes % 1024 == 0 && kBlockSide * kSwizzleRow == 1024,
              "a shift by one row of pixels must keep the swizzle's phase");

struct ShiftedBlockTensors {
  int n, h, w;
  const void *x, *conv_weight, *expand_weight, *reduce_weight, *residual;  // weights: [k, depth] rows
  const float *conv, *expand, *reduce;
  void *out, *next;  // next and reduce: null without the reduce
  int* counter;
};
Record shifted_block_record(const ShiftedBlockTensors& t, Type type);

}  // namespace fastres
