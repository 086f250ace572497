// Convolution + BN + residual + activation for large batches on Hopper: wgmma and TMA, persistent, warps with roles.
// bf16 or fp16, NHWC, one group; C a multiple of 8, K any. The dual form adds a projection shortcut: more depth.
//
// Filters are wgmma's M and pixels its N: 64 filters then still make full products (n = 256), a thread has few channels
// whose scale and shift it keeps, and 16-bit results go out transposed by stmatrix. Pixels are a run of N * P * Q, so
// nothing is wasted at 28, 14 or 7; im2col maps find them, padding reads as zero.
// A cluster of two takes two neighbouring runs: each block loads half of the filters, for both. Tiles come from a
// counter that all clusters share (slow SMs then take fewer). Sums are finished where the residual lies: its chunk comes
// by TMA into the slot from which the output leaves.
// The halo form of 3x3 loads pixels once for a column of three taps: rows of 56, from 1 to 8 images side by side, and
// the rows above and below; a tap is a shift by a row. That is a third of im2col's reads of the L2, plus the halo.
// The position form takes all images at one output position: what lies in the padding there is left out, up to 5 of 9 taps.
// Warps of group 0: loader of both operands; residuals of group 1, of group 2; tickets.
#include <utility>

#include "activation.cuh"
#include "conv_moments.cuh"
#include "sm90_conv_load.cuh"
#include "wgmma_wide.cuh"

namespace fastres {
namespace {

constexpr int kThreads = 128 * (1 + kConvGroups);
constexpr int kLoaderRegisters = 40, kGroupRegisters = 232;
static_assert(128 * (kLoaderRegisters + kConvGroups * kGroupRegisters) <= start_registers(kThreads) * kThreads);
static_assert(kLastSimple == kRelu);

// Eight sums: two filters (of scale.x, shift.x and of scale.y, shift.y) of four pairs of neighbouring pixels.
template <class T, ConvFinish kFinish>
FASTRES_DEVICE void finish_eight(const Sm90Conv& p, const float (&v)[8], float2 scale, float2 shift, uint32_t address) {
  uint32_t bits[4];
  constexpr bool kStatistics = kFinish == ConvFinish::kStatistics;
  if (!kStatistics && p.residual_rows) ptx::load_transposed_x4(bits, address);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kStatistics) {
      bits[i] = narrow_pair<T>(v[2 * i], v[2 * i + 1]);
      continue;
    }
    const float by = i % 2 ? scale.y : scale.x, more = i % 2 ? shift.y : shift.x;
    float low = v[2 * i] * by + more, high = v[2 * i + 1] * by + more;
    if (p.residual_rows) {
      const float2 added = widen_pair<T>(bits[i]);
      low += added.x, high += added.y;
    }
    if constexpr (kFinish == ConvFinish::kGeneral) {
      bits[i] = narrow_pair<T>(activate(p.act, low, p.act_param), activate(p.act, high, p.act_param));
    } else {
      bits[i] = p.act == kRelu ? ptx::pack_relu(low, high, T{}) : narrow_pair<T>(low, high);
    }
  }
  ptx::store_transposed_x4(address, bits);
}

template <int... kNumbers, class Body>
FASTRES_DEVICE void for_numbers(std::integer_sequence<int, kNumbers...>, const Body& body) {
  (body(std::integral_constant<int, kNumbers>{}), ...);
}
template <int kCount, class Body>
FASTRES_DEVICE void static_for(const Body& body) {
  for_numbers(std::make_integer_sequence<int, kCount>{}, body);
}

// A chunk's elements one by one, where rows of K channels do not fill 16 bytes.
template <class Move>
FASTRES_DEVICE void for_chunk(const Sm90Conv& p, int thread, int filter, int pixel, const Move& move) {
  const int channel = thread % kConvChunk;
  if (filter + channel >= p.k) return;
  for (int i = thread / kConvChunk; i < kConvChunk && pixel + i < p.pixels; i += 128 / kConvChunk)
    move(swizzle_128(i, channel / 8) + channel % 8 * 2, static_cast<int64_t>(pixel + i) * p.k + filter + channel);
}

template <class T, int kFilters, int kPixels, ConvFinish kFinish>
FASTRES_DEVICE void compute(const Sm90Conv& p, unsigned char* memory, const ConvLayout& layout, const ConvBarriers& b,
                            Tickets tickets, int rank, int group) {
  constexpr ConvTileShape kTile{kFilters, kPixels};
  constexpr int kBlocks = kTile.group_filters() / 64, kColumns = kTile.group_pixels();
  constexpr int kSums = kColumns / 2;  // a thread, a block of 64 filters
  constexpr bool kHalo = kTile.halo(), kGeneral = kFinish == ConvFinish::kGeneral;
  constexpr bool kStatistics = kFinish == ConvFinish::kStatistics;
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32, warp = ptx::warp_index() % 4;
  const uint32_t base = ptx::shared_address(memory);
  const uint32_t slots = layout.slots + group * p.slots * kChunkBytes;
  const int group_filter = kTile.share_pixels() ? 0 : group * kTile.group_filters();
  const int group_pixel = kTile.share_pixels() ? group * kColumns : 0;
  // Matrix lane / 8 of a transposed access: pixels of its half, the warp's 8-filter chunk lane / 8 % 2.
  const int row = lane / 16 * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
  const auto release = [&](int stage) {
    // Every warp says so itself, to every block of the cluster: its wait covers its own quarter of the product.
    ptx::sync_warp();
    if (lane < p.cluster) ptx::barrier_arrive_cluster(ptx::address_in(b.empty(stage), lane));
  };

  const auto release_box = [&](int box) {
    if (lane == 0) ptx::barrier_arrive(b.box_empty(box));
  };

  const ptx::Policy policy = ptx::make_policy(p.out_eviction);
  Ring ring, out, box;
  int last_slot = -1;
  for (;;) {
    const int tile = tickets.peek();
    ptx::sync_warp();
    if (lane == 0) {
      tickets.hand_back(p);
    } else {
      tickets.ring.next(p.ticks);
    }
    if (tile >= p.tiles) break;
    const auto of = Sm90ConvTile::of(p, tile, rank, kFilters, kPixels);
    const int first_filter = of.first_filter + group_filter, first_pixel = of.first_pixel + group_pixel;
    float2 scale[kBlocks], shift[kBlocks];
#pragma unroll
    for (int m = 0; m < kBlocks && !kStatistics; ++m) {
      const int top = first_filter + m * 64 + warp * 16 + lane / 4;
      scale[m] = {top < p.k ? p.scale[top] : 0.0f, top + 8 < p.k ? p.scale[top + 8] : 0.0f};
      shift[m] = {top < p.k ? p.shift[top] : 0.0f, top + 8 < p.k ? p.shift[top + 8] : 0.0f};
    }

    float sum[kBlocks][kSums];
    if constexpr (kGeneral) {
      // The moves that end below must not go on between two products: ptxas would serialise them.
#pragma unroll
      for (auto& of : sum)
#pragma unroll
        for (float& v : of) v = 0;
    }
    int previous = 0, row_of_taps = 0;
    const int steps = kTile.takes_positions() ? ConvDepth::of(p, of.first_pixel).steps : p.steps;
    for (int i = 0; i < steps; ++i, ring.next(p.stages)) {
      ptx::barrier_wait(b.full(ring.slot), ring.parity);
      const uint32_t stage = base + layout.stages + ring.slot * kTile.stage_bytes();
      uint32_t first = stage + kTile.filters_bytes();
      if constexpr (kHalo) {
        if (row_of_taps == 0) ptx::barrier_wait(b.box_full(box.slot), box.parity);
        first = base + box.slot * kTile.pixels_bytes() + row_of_taps * kHaloRow * kSwizzleRow;
      }
      const uint64_t filters = matrix_descriptor(stage + group_filter * kSwizzleRow);
      const uint64_t pixels = matrix_descriptor(first + group_pixel * kSwizzleRow);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kConvDepth / 16; ++k)
#pragma unroll
        for (int m = 0; m < kBlocks; ++m)
          ptx::wgmma(sum[m], filters + (m * 64 * kSwizzleRow >> 4) + k * kDescriptorStep, pixels + k * kDescriptorStep,
                     kGeneral || i > 0 || k > 0, T{});
      ptx::wgmma_commit();
      if (i > 0) {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) ptx::wgmma_wait<1>(sum[m]);
        release(previous);
        if (kHalo && row_of_taps == 0) release_box(box.slot ^ 1);
      }
      previous = ring.slot;
      if constexpr (kHalo) {
        if (++row_of_taps == 3) row_of_taps = 0, box.next(kHaloBoxes);
      }
    }
    // TMA has long read the slot that the tile before left last: the residual comes there while the last step multiplies.
    if (p.by_tma && last_slot >= 0) {
      if (warp == 0 && ptx::elect_one()) {
        ptx::store_wait_read<0>();
        ptx::barrier_arrive(b.slot_empty(group, last_slot));
      }
      last_slot = -1;
    }
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) ptx::wgmma_wait<0>(sum[m]);
    release(previous);
    if constexpr (kHalo) release_box(box.slot ^ 1);
    if constexpr (kStatistics)
      write_moments<kHalo>(p, sum, first_filter + warp * 16 + lane / 4, first_pixel, lane);

    // A chunk is 64 filters of 64 pixels, in four parts of sixteen pixels; of 56 pixels in the halo form, where half of
    // the last part goes to rows of the slot that nobody reads.
    constexpr int kChunkPixels = kTile.chunk_pixels(), kChunkSums = kChunkPixels / 2;
    constexpr int kChunks = kBlocks * kColumns / kChunkPixels;
    const auto enter = [&](int filter, int pixel) {
      ptx::barrier_wait(b.slot_full(group, out.slot), out.parity);
      if (p.by_tma || !p.residual_rows) return;
      unsigned char* slot = memory + slots + out.slot * kChunkBytes;
      for_chunk(p, thread, filter, pixel, [&](int at, int64_t from) {
        *reinterpret_cast<T*>(slot + at) = static_cast<const T*>(p.residual_rows)[from];
      });
      ptx::sync_named(1 + group, 128);
    };
    const auto leave = [&](int filter, int pixel) {
      ptx::fence_async_shared();
      ptx::sync_named(1 + group, 128);
      if (!p.by_tma) {
        const unsigned char* slot = memory + slots + out.slot * kChunkBytes;
        for_chunk(p, thread, filter, pixel, [&](int at, int64_t to) {
          static_cast<T*>(p.out_rows)[to] = *reinterpret_cast<const T*>(slot + at);
        });
      }
      if (warp == 0 && ptx::elect_one()) {
        if (p.by_tma) {
          const uint32_t from = base + slots + out.slot * kChunkBytes;
          if constexpr (kHalo) {
            const auto place = HaloPlace::of(p, pixel);
            ptx::store_box(&p.out, from, filter, 0, place.n, place.h, policy);
          } else if (kTile.takes_positions() && p.span) {
            const auto place = Position::of(p, pixel);
            ptx::store_box(&p.out, from, filter, place.n, place.at, policy);
          } else {
            ptx::store_box(&p.out, from, filter, pixel, policy);
          }
          ptx::store_commit();
          ptx::store_wait_read<1>();
        }
        // The slot before this one has been read, by TMA or, since all came to the barrier, by the threads.
        if (last_slot >= 0) ptx::barrier_arrive(b.slot_empty(group, last_slot));
      }
      last_slot = out.slot;
      out.next(p.slots);
    };
    const auto finish_part = [&](const float (&v)[8], int m, int part) {
      const bool second = kBlocks > 1 && m > 0;
      finish_eight<T, kFinish>(p, v, second ? scale[kBlocks - 1] : scale[0], second ? shift[kBlocks - 1] : shift[0],
                                base + slots + out.slot * kChunkBytes + swizzle_128(part * 16 + row, chunk));
    };
    const auto filter_of = [&](int c) { return first_filter + c * kChunkPixels / kColumns * 64; };
    const auto pixel_of = [&](int c) { return first_pixel + c * kChunkPixels % kColumns; };
    if constexpr (kGeneral) {
#pragma unroll 1
      for (int c = 0; c < kChunks; ++c) {
        enter(filter_of(c), pixel_of(c));
#pragma unroll 1
        for (int part = 0; part < 4; ++part) {
          float v[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) v[i] = sum[0][i];
          finish_part(v, c * kChunkPixels / kColumns, part);
#pragma unroll
          for (int i = 8; i < kBlocks * kSums; ++i) sum[(i - 8) / kSums][(i - 8) % kSums] = sum[i / kSums][i % kSums];
        }
        leave(filter_of(c), pixel_of(c));
      }
    } else {
      // Registers have no index: every part is code of its own.
      static_for<kChunks>([&](auto chunk_number) {
        constexpr int c = decltype(chunk_number)::value;
        enter(filter_of(c), pixel_of(c));
        static_for<4>([&](auto part_number) {
          constexpr int part = decltype(part_number)::value;
          constexpr int kFirst = c * kChunkSums + part * 8, kCount = kChunkSums - part * 8 < 8 ? kChunkSums - part * 8 : 8;
          float v[8] = {};
#pragma unroll
          for (int i = 0; i < kCount; ++i) v[i] = sum[kFirst / kSums][kFirst % kSums + i];
          finish_part(v, c * kChunkPixels / kColumns, part);
        });
        leave(filter_of(c), pixel_of(c));
      });
    }
  }
  if (warp == 0 && ptx::elect_one()) ptx::store_wait_all();
}

FASTRES_DEVICE void sync_blocks(int cluster) {
  if (cluster > 1) {
    ptx::sync_cluster();
  } else {
    ptx::sync_threads();
  }
}

template <class T, int kFilters, int kPixels, ConvFinish kFinish>
__global__ void __launch_bounds__(kThreads, 1) sm90_conv_bn_act_kernel(const __grid_constant__ Sm90Conv p) {
  constexpr ConvTileShape kTile{kFilters, kPixels};
  ptx::let_successor_start();
  unsigned char* memory = ptx::dynamic_shared();
  const uint32_t base = ptx::shared_address(memory);
  const ConvLayout layout = ConvLayout::of(kTile, p.stages, p.slots);
  const ConvBarriers b{base + layout.barriers};
  const Tickets tickets{reinterpret_cast<const volatile int*>(memory + layout.ticks), b};
  const int warp = ptx::warp_index();
  const int rank = p.cluster > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;

  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::barrier_init(b.full(i), 1);
      ptx::barrier_init(b.empty(i), 4 * kConvGroups * p.cluster);
    }
    for (int group = 0; group < kConvGroups; ++group)
      for (int i = 0; i < p.slots; ++i) {
        ptx::barrier_init(b.slot_full(group, i), 1);
        ptx::barrier_init(b.slot_empty(group, i), 1);
      }
    for (int i = 0; kTile.halo() && i < kHaloBoxes; ++i) {
      ptx::barrier_init(b.box_full(i), 1);
      ptx::barrier_init(b.box_empty(i), 4 * kConvGroups);
    }
    for (int i = 0; i < p.ticks; ++i) {
      ptx::barrier_init(b.ticket_full(i), 1);
      ptx::barrier_init(b.ticket_empty(i), kReaders * p.cluster);
    }
    ptx::fence_barrier_init();
  }
  ptx::sync_warp();
  // Nobody arrives at, or loads into, a block that is not ready.
  sync_blocks(p.cluster);
  // Filters were written long ago: they come while the kernel before this one is still at work.
  int ahead = 0;
  if (warp == 0 && ptx::elect_one()) ahead = load_filters_ahead<kFilters, kPixels>(p, base + layout.stages, b, rank);
  ptx::wait_for_predecessor();

  if (warp < 4) {
    ptx::give_registers<kLoaderRegisters>();
    if (ptx::elect_one()) {
      if (warp == 0) {
        load_operands<kFilters, kPixels>(p, base, base + layout.stages, b, tickets, rank, ahead);
      } else if (warp <= kConvGroups) {
        const int group = warp - 1;
        load_residuals<kFilters, kPixels>(p, base + layout.slots + group * p.slots * kChunkBytes, b, tickets, rank, group);
      } else if (rank == 0) {
        write_tickets(p, base + layout.ticks, b);
      }
    }
  } else {
    ptx::take_registers<kGroupRegisters>();
    compute<T, kFilters, kPixels, kFinish>(p, memory, layout, b, tickets, rank, warp / 4 - 1);
  }
  // Nobody leaves while another block may still arrive here or load for it.
  ptx::sync_warp();
  sync_blocks(p.cluster);
}

// [k, taps, c]: channels beyond a tap's last one read as zeros, and not as the next tap's.
TensorMap filters_map(Type type, const void* base, const ConvShape& v, int box_rows) {
  TensorMapFields f{type, 3, base};
  const uint64_t row = uint64_t{2} * v.c, taps = static_cast<uint64_t>(v.r) * v.s;
  f.size[0] = static_cast<uint64_t>(v.c), f.size[1] = taps, f.size[2] = static_cast<uint64_t>(v.k);
  f.stride[0] = row, f.stride[1] = row * taps;
  f.box[0] = kConvDepth, f.box[1] = 1, f.box[2] = static_cast<uint32_t>(box_rows);
  return make_tensor_map(f);
}

template <class T, int kFilters, int kPixels>
Record typed(const Sm90Conv& p) {
  constexpr ConvTileShape kTile{kFilters, kPixels};
  const Shape shape{dim3(static_cast<unsigned>(p.clusters * p.cluster)), kThreads,
                    static_cast<unsigned>(ConvLayout::of(kTile, p.stages, p.slots).bytes),
                    static_cast<unsigned>(p.cluster)};
  auto* kernel = sm90_conv_bn_act_kernel<T, kFilters, kPixels, ConvFinish::kSimple>;
  if (p.moments) {
    kernel = sm90_conv_bn_act_kernel<T, kFilters, kPixels, ConvFinish::kStatistics>;
    return make_record(kernel, shape, p, "sm90_conv_stats");
  }
  if constexpr (!kTile.halo())
    if (p.act > kRelu) kernel = sm90_conv_bn_act_kernel<T, kFilters, kPixels, ConvFinish::kGeneral>;
  return make_record(kernel, shape, p, kTile.halo() ? "sm90_conv_bn_act, halo" : "sm90_conv_bn_act");
}

template <class T>
Record sized(const Sm90Conv& p, int filters, int pixels) {
  if (filters == 128 && pixels == 256) return typed<T, 128, 256>(p);
  if (filters == 256 && pixels == 128) return typed<T, 256, 128>(p);
  if (filters == 128 && pixels == 128) return typed<T, 128, 128>(p);
  if (filters == 64 && pixels == 256) return typed<T, 64, 256>(p);
  return filters == 128 ? typed<T, 128, 224>(p) : typed<T, 64, 448>(p);
}

}  // namespace

Record sm90_conv_record(const ThroughputConv& t, Type type, int filters, int pixels, int cluster) {
  const ConvShape& v = t.conv.shape;
  require(type == Type::kBf16 || type == Type::kFp16, "bfloat16 and float16 are taken");
  Sm90Conv p = sm90_conv_tiles(t, filters, pixels, cluster, multiprocessors());
  const ConvTileShape tile{filters, pixels};
  const auto output_map = [&](const void* of) {
    if (p.span) return make_tensor_map(positions_fields(type, of, v));
    return make_tensor_map(tile.halo() ? halo_fields(type, of, v, v.k, 1)
                                       : matrix_fields(type, of, v.pixels(), v.k, kConvChunk));
  };
  p.x = make_tensor_map(p.span ? images_fields(type, t.conv.x, v, pixels)
                        : tile.halo() ? halo_fields(type, t.conv.x, v, v.c, pixels / kHaloRow + 2)
                                    : pixels_fields(type, t.conv.x, v, pixels));
  p.weight = filters_map(type, t.conv.weight, v, filters / cluster);
  if (t.second) {
    p.second = make_tensor_map(pixels_fields(type, t.second, t.second_shape, pixels));
    p.second_weight = filters_map(type, t.second_weight, t.second_shape, filters / cluster);
  }
  if (p.by_tma) {
    p.out = output_map(t.conv.out);
    if (t.conv.residual) p.residual = output_map(t.conv.residual);
  }
  p.scale = t.conv.scale, p.shift = t.conv.shift;
  p.residual_rows = t.conv.residual, p.out_rows = t.conv.out, p.counter = t.conv.counters, p.moments = t.moments;
  p.act = t.conv.act, p.act_param = t.conv.act_param;
  return type == Type::kBf16 ? sized<bf16>(p, filters, pixels) : sized<fp16>(p, filters, pixels);
}

}  // namespace fastres
