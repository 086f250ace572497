// ResNet-50's stage 1 between two blocks, in one persistent kernel for Hopper: 3x3 (64 -> 64) + ReLU, expand
// (64 -> 256) + residual + ReLU [, the next block's reduce (256 -> 64) + ReLU]. bf16 or fp16, NHWC.
//
// All weights stay in shared memory. A group of four warps has a tile of 8 x 8 pixels, from a counter that all blocks
// share (slow SMs then take fewer). The 3x3 is nine products of shifted views of a halo: three boxes of 10 x 8 pixels,
// one a filter column; a filter row is a shift by 8 pixels, which is 1,024 bytes and so keeps the swizzle. Its result
// and each 64 channels of the block's output go from accumulator to the next product's A operand in registers. A chunk
// of the residual is added in place in its ring slot, and leaves from there.
// Warps of group 0 load: halos of group 1, of group 2, residuals of group 1, of group 2.
#include <algorithm>

#include "activation.cuh"
#include "shifted_block.h"
#include "wgmma.cuh"

namespace fastres {
namespace {

constexpr int kThreads = 128 * (1 + kBlockGroups);
constexpr int kLoaderRegisters = 40, kGroupRegisters = 232;
static_assert(128 * (kLoaderRegisters + kBlockGroups * kGroupRegisters) <= start_registers(kThreads) * kThreads);

// A ring of slots between one loader and one group: the n-th use of it.
struct Turn {
  int slot;
  uint32_t parity;
  FASTRES_DEVICE Turn(int n, int slots) : slot(n % slots), parity(static_cast<uint32_t>(n / slots & 1)) {}
};

struct Barriers {
  uint32_t base;
  FASTRES_DEVICE Barriers(uint32_t memory, const BlockLayout& layout, int group)
      : base(memory + layout.barriers + 8 + group * 16 * (kHaloSlots + kRingSlots + kTickSlots)) {}
  FASTRES_DEVICE uint32_t halo_full(int i) const { return base + 8 * i; }
  FASTRES_DEVICE uint32_t halo_empty(int i) const { return base + 8 * (kHaloSlots + i); }
  FASTRES_DEVICE uint32_t ring_full(int i) const { return base + 8 * (2 * kHaloSlots + i); }
  FASTRES_DEVICE uint32_t ring_empty(int i) const { return base + 8 * (2 * kHaloSlots + kRingSlots + i); }
  FASTRES_DEVICE uint32_t tick_full(int i) const { return base + 8 * (2 * kHaloSlots + 2 * kRingSlots + i); }
  FASTRES_DEVICE uint32_t tick_empty(int i) const {
    return base + 8 * (2 * kHaloSlots + 2 * kRingSlots + kTickSlots + i);
  }
};

// relu(sum * scale + shift [+ residual]) of two neighbouring channels.
template <class T>
FASTRES_DEVICE uint32_t finish_pair(float a, float b, const float4& constants, uint32_t residual, bool adds) {
  float x = a * constants.x + constants.y, y = b * constants.z + constants.w;
  if (adds) {
    const float2 added = widen_pair<T>(residual);
    x += added.x, y += added.y;
  }
  return ptx::pack_relu(x, y, T{});
}

template <class T, bool kReduce>
FASTRES_DEVICE void load_weights(const ShiftedBlock& p, uint32_t memory, uint32_t full) {
  ptx::barrier_arrive_expect(full, block_matrices(kReduce) * kMatrixBytes);
  uint32_t to = memory;
  for (int tap = 0; tap < 9; ++tap, to += kMatrixBytes) ptx::load_box(to, &p.conv_weight, full, tap * 64, 0);
  for (int c = 0; c < kBlockChunks; ++c, to += kMatrixBytes) ptx::load_box(to, &p.expand_weight, full, 0, c * 64);
  if (kReduce)
    for (int c = 0; c < kBlockChunks; ++c, to += kMatrixBytes) ptx::load_box(to, &p.reduce_weight, full, c * 64, 0);
}

// Takes tiles from the counter, tells the residual's loader and the group, loads halos.
FASTRES_DEVICE void load_halos(const ShiftedBlock& p, uint32_t halo, int* ticks, const Barriers& b) {
  int tile = ptx::add_relaxed(p.counter, 1);
  for (int k = 0, n = 0;; ++k) {
    const Turn tick(k, kTickSlots);
    ptx::barrier_wait(b.tick_empty(tick.slot), tick.parity ^ 1);
    ticks[tick.slot] = tile;
    ptx::barrier_arrive(b.tick_full(tick.slot));
    if (tile >= p.tiles) return;
    const BlockTile at = BlockTile::of(p, tile);
    // Asked for here, used after three waits: its latency is hidden.
    tile = ptx::add_relaxed(p.counter, 1);
    for (int s = 0; s < 3; ++s, ++n) {
      const Turn turn(n, kHaloSlots);
      ptx::barrier_wait(b.halo_empty(turn.slot), turn.parity ^ 1);
      ptx::barrier_arrive_expect(b.halo_full(turn.slot), kHaloBytes);
      ptx::load_box(halo + turn.slot * kHaloBytes, &p.x, b.halo_full(turn.slot), 0, at.w + s - 1, at.h - 1, at.n);
    }
  }
}

// Loads residual chunks; with the reduce, a tile's fifth slot is handed over empty.
template <bool kReduce>
FASTRES_DEVICE void load_residuals(const ShiftedBlock& p, uint32_t ring, const int* ticks, const Barriers& b) {
  for (int k = 0, n = 0;; ++k) {
    const Turn tick(k, kTickSlots);
    ptx::barrier_wait(b.tick_full(tick.slot), tick.parity);
    const int tile = ticks[tick.slot];
    ptx::barrier_arrive(b.tick_empty(tick.slot));
    if (tile >= p.tiles) return;
    const BlockTile at = BlockTile::of(p, tile);
    for (int c = 0; c < kBlockChunks + kReduce; ++c, ++n) {
      const Turn turn(n, kRingSlots);
      ptx::barrier_wait(b.ring_empty(turn.slot), turn.parity ^ 1);
      if (c == kBlockChunks) {
        ptx::barrier_arrive(b.ring_full(turn.slot));
      } else {
        ptx::barrier_arrive_expect(b.ring_full(turn.slot), kMatrixBytes);
        ptx::load_box(ring + turn.slot * kMatrixBytes, &p.residual, b.ring_full(turn.slot), c * 64, at.w, at.h, at.n);
      }
    }
  }
}

template <class T, bool kReduce>
FASTRES_DEVICE void compute(const ShiftedBlock& p, unsigned char* memory, uint32_t base, int group, uint32_t halo,
                            int ring_offset, const int* ticks, const Barriers& b) {
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32, warp = ptx::warp_index() % 4;
  const uint32_t ring = base + ring_offset;
  const uint32_t expand_weight = base + 9 * kMatrixBytes, reduce_weight = expand_weight + kBlockChunks * kMatrixBytes;
  // This thread's accumulators: rows (pixels) warp * 16 + lane / 4 and 8 below, columns 8 j + lane % 4 * 2 and the next.
  const auto constants = [&](const float* of, int channel) {
    return *reinterpret_cast<const float4*>(of + 2 * (channel + lane % 4 * 2));
  };
  const int row = warp * 16 + lane / 4;
  const auto place = [&](int slot, int half, int j) {
    return reinterpret_cast<uint32_t*>(memory + ring_offset + slot * kMatrixBytes + swizzle_128(row + half * 8, j) +
                                       lane % 4 * 4);
  };
  // The slot is written: it leaves, and the slot before it goes back to the loader once its store has read it.
  const auto leave = [&](const TensorMap* map, int n, int channel, const BlockTile& at) {
    ptx::fence_async_shared();
    ptx::sync_named(1 + group, 128);
    if (warp == 0 && ptx::elect_one()) {
      ptx::store_box(map, ring + n % kRingSlots * kMatrixBytes, channel, at.w, at.h, at.n);
      ptx::store_commit();
      ptx::store_wait_read<1>();
      if (n > 0) ptx::barrier_arrive(b.ring_empty((n - 1) % kRingSlots));
    }
  };

  int boxes = 0, chunks = 0;
  for (int k = 0;; ++k) {
    const Turn tick(k, kTickSlots);
    ptx::barrier_wait(b.tick_full(tick.slot), tick.parity);
    const int tile = ticks[tick.slot];
    ptx::sync_warp();
    if (lane == 0) ptx::barrier_arrive(b.tick_empty(tick.slot));
    if (tile >= p.tiles) break;
    const BlockTile at = BlockTile::of(p, tile);

    float sum[32];
    for (int s = 0; s < 3; ++s, ++boxes) {
      const Turn turn(boxes, kHaloSlots);
      ptx::barrier_wait(b.halo_full(turn.slot), turn.parity);
      ptx::wgmma_fence();
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        const uint64_t pixels = matrix_descriptor(halo + turn.slot * kHaloBytes + r * 1024);
        const uint64_t filters = matrix_descriptor(base + (r * 3 + s) * kMatrixBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          ptx::wgmma(sum, pixels + i * kDescriptorStep, filters + i * kDescriptorStep, s > 0 || r > 0 || i > 0, T{});
      }
      ptx::wgmma_commit();
      // Every warp says so itself: its wait covers its own quarter of the product.
      ptx::wgmma_wait<0>(sum);
      ptx::sync_warp();
      if (lane == 0) ptx::barrier_arrive(b.halo_empty(turn.slot));
    }
    uint32_t y[4][4];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float4 v = constants(p.conv, j * 8);
      y[j / 2][j % 2 * 2] = finish_pair<T>(sum[4 * j], sum[4 * j + 1], v, 0, false);
      y[j / 2][j % 2 * 2 + 1] = finish_pair<T>(sum[4 * j + 2], sum[4 * j + 3], v, 0, false);
    }

    float next[32];
#pragma unroll
    for (int c = 0; c < kBlockChunks; ++c, ++chunks) {
      const uint64_t filters = matrix_descriptor(expand_weight + c * kMatrixBytes);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::wgmma(sum, y[i], filters + i * kDescriptorStep, i > 0, T{});
      ptx::wgmma_commit();
      const Turn turn(chunks, kRingSlots);
      ptx::barrier_wait(b.ring_full(turn.slot), turn.parity);
      ptx::wgmma_wait<0>(sum);
      uint32_t o[4][4];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float4 v = constants(p.expand, c * 64 + j * 8);
        uint32_t* top = place(turn.slot, 0, j);
        uint32_t* bottom = place(turn.slot, 1, j);
        o[j / 2][j % 2 * 2] = finish_pair<T>(sum[4 * j], sum[4 * j + 1], v, *top, true);
        o[j / 2][j % 2 * 2 + 1] = finish_pair<T>(sum[4 * j + 2], sum[4 * j + 3], v, *bottom, true);
        *top = o[j / 2][j % 2 * 2];
        *bottom = o[j / 2][j % 2 * 2 + 1];
      }
      if constexpr (kReduce) {
        const uint64_t reducing = matrix_descriptor(reduce_weight + c * kMatrixBytes);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i) ptx::wgmma(next, o[i], reducing + i * kDescriptorStep, c > 0 || i > 0, T{});
        ptx::wgmma_commit();
      }
      leave(&p.out, chunks, c * 64, at);
      if constexpr (kReduce) ptx::wgmma_wait<0>(next);
    }
    if constexpr (kReduce) {
      const Turn turn(chunks, kRingSlots);
      ptx::barrier_wait(b.ring_full(turn.slot), turn.parity);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float4 v = constants(p.reduce, j * 8);
        *place(turn.slot, 0, j) = finish_pair<T>(next[4 * j], next[4 * j + 1], v, 0, false);
        *place(turn.slot, 1, j) = finish_pair<T>(next[4 * j + 2], next[4 * j + 3], v, 0, false);
      }
      leave(&p.next, chunks, 0, at);
      ++chunks;
    }
  }
  if (warp == 0 && ptx::elect_one()) ptx::store_wait_all();
}

template <class T, bool kReduce>
__global__ void __launch_bounds__(kThreads, 1) sm90_shifted_block_kernel(const __grid_constant__ ShiftedBlock p) {
  constexpr BlockLayout kLayout = BlockLayout::of(kReduce);
  ptx::let_successor_start();
  unsigned char* memory = ptx::dynamic_shared();
  const uint32_t base = ptx::shared_address(memory);
  const uint32_t weights_full = base + kLayout.barriers;
  const int warp = ptx::warp_index();

  if (threadIdx.x == 0) {
    ptx::barrier_init(weights_full, 1);
    for (int group = 0; group < kBlockGroups; ++group) {
      const Barriers b(base, kLayout, group);
      for (int i = 0; i < kHaloSlots; ++i) {
        ptx::barrier_init(b.halo_full(i), 1);
        ptx::barrier_init(b.halo_empty(i), 4);  // one a warp
      }
      for (int i = 0; i < kRingSlots; ++i) {
        ptx::barrier_init(b.ring_full(i), 1);
        ptx::barrier_init(b.ring_empty(i), 1);
      }
      for (int i = 0; i < kTickSlots; ++i) {
        ptx::barrier_init(b.tick_full(i), 1);
        ptx::barrier_init(b.tick_empty(i), 5);  // the group's warps and the residual's loader
      }
    }
    ptx::fence_barrier_init();
  }
  ptx::sync_threads();
  // The weights were written long ago: they come while the kernel before this one is still at work.
  if (warp == 0 && ptx::elect_one()) load_weights<T, kReduce>(p, base, weights_full);
  ptx::wait_for_predecessor();

  if (warp < 4) {
    ptx::give_registers<kLoaderRegisters>();
    const int group = warp % kBlockGroups;
    const Barriers b(base, kLayout, group);
    int* ticks = reinterpret_cast<int*>(memory + kLayout.ticks) + group * kTickSlots;
    if (ptx::elect_one()) {
      if (warp < kBlockGroups) {
        load_halos(p, base + kLayout.halo + group * kHaloSlots * kHaloBytes, ticks, b);
      } else {
        load_residuals<kReduce>(p, base + kLayout.ring + group * kRingSlots * kMatrixBytes, ticks, b);
      }
    }
  } else {
    ptx::take_registers<kGroupRegisters>();
    const int group = warp / 4 - 1;
    ptx::barrier_wait(weights_full, 0);
    compute<T, kReduce>(p, memory, base, group, base + kLayout.halo + group * kHaloSlots * kHaloBytes,
                        kLayout.ring + group * kRingSlots * kMatrixBytes,
                        reinterpret_cast<const int*>(memory + kLayout.ticks) + group * kTickSlots,
                        Barriers(base, kLayout, group));
  }
}

TensorMap pixels_map(Type type, const void* base, const ShiftedBlockTensors& t, int channels, int rows) {
  TensorMapFields f{type, 4, base};
  const uint64_t row = uint64_t{2} * channels;
  const uint64_t size[] = {static_cast<uint64_t>(channels), static_cast<uint64_t>(t.w), static_cast<uint64_t>(t.h),
                           static_cast<uint64_t>(t.n)};
  const uint64_t stride[] = {row, row * t.w, row * t.w * t.h};
  const uint32_t box[] = {64, kBlockSide, static_cast<uint32_t>(rows), 1};
  std::copy_n(size, 4, f.size), std::copy_n(stride, 3, f.stride), std::copy_n(box, 4, f.box);
  return make_tensor_map(f);
}
TensorMap matrix_map(Type type, const void* base, int rows, int columns) {
  TensorMapFields f{type, 2, base};
  f.size[0] = columns, f.size[1] = rows;
  f.stride[0] = uint64_t{2} * columns;
  f.box[0] = f.box[1] = 64;
  return make_tensor_map(f);
}

template <class T>
Record typed(const ShiftedBlock& p, bool reduce) {
  const int blocks = multiprocessors();  // persistent, one an SM
  const Shape shape{dim3(static_cast<unsigned>(blocks < p.tiles ? blocks : p.tiles)), kThreads,
                    static_cast<unsigned>(BlockLayout::of(reduce).bytes)};
  return make_record(reduce ? sm90_shifted_block_kernel<T, true> : sm90_shifted_block_kernel<T, false>, shape, p,
                     "sm90_shifted_block");
}

}  // namespace

Record shifted_block_record(const ShiftedBlockTensors& t, Type type) {
  const bool reduce = t.next != nullptr;
  ShiftedBlock p{};
  p.x = pixels_map(type, t.x, t, kBlockChannels, kHaloRows);
  p.residual = pixels_map(type, t.residual, t, kBlockExpanded, kBlockSide);
  p.out = pixels_map(type, t.out, t, kBlockExpanded, kBlockSide);
  p.conv_weight = matrix_map(type, t.conv_weight, kBlockChannels, 9 * kBlockChannels);
  p.expand_weight = matrix_map(type, t.expand_weight, kBlockExpanded, kBlockChannels);
  if (reduce) {
    p.next = pixels_map(type, t.next, t, kBlockChannels, kBlockSide);
    p.reduce_weight = matrix_map(type, t.reduce_weight, kBlockChannels, kBlockExpanded);
  }
  p.conv = t.conv, p.expand = t.expand, p.reduce = t.reduce, p.counter = t.counter;
  p.tiles_h = static_cast<int>(ceil_div(t.h, kBlockSide)), p.tiles_w = static_cast<int>(ceil_div(t.w, kBlockSide));
  p.tiles = t.n * p.tiles_h * p.tiles_w;
  switch (type) {
    case Type::kBf16: return typed<bf16>(p, reduce);
    case Type::kFp16: return typed<fp16>(p, reduce);
    default: throw std::invalid_argument("bfloat16 and float16 are taken");
  }
}

}  // namespace fastres
