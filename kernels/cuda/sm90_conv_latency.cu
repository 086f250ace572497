// Convolution + BN + residual + activation for small batches on Hopper: everything for the shortest chain of steps.
//
// Filters are wgmma's M (64), pixels its N (32 or 64), so that 49 or 196 pixels still make full products. The depth is
// divided among the blocks of a cluster, and each block adds the parts of its share of the pixels, in order, through
// distributed shared memory. A block's filters are on their way before the layer in front of this one has ended.
// x [N, H, W, C], weights [K, R, S, C / groups], bf16 or fp16. The dual form adds a projection shortcut: its channels
// are more depth.
#include "conv.h"
#include "epilogue.cuh"
#include "ptx_sm90.cuh"

namespace fastres {
namespace {

constexpr int kThreads = 128;
constexpr int kFilters = 64;
constexpr int kStages = 8;   // with the depth divided, most blocks have no more steps than this: nothing is waited for twice
constexpr int kDepth = 64;   // elements a step: a 128-byte row
constexpr int kTileStride = kFilters + 4;  // floats; the 4 put eight filters and four pixels into different banks

constexpr int stage_bytes(int pixels) { return (kFilters + pixels) * kSwizzleRow; }
constexpr int latency_shared_bytes(int pixels) { return kStages * stage_bytes(pixels); }
static_assert(64 * kTileStride * 4 <= latency_shared_bytes(64) && 32 * kTileStride * 4 <= latency_shared_bytes(32),
              "the tile of sums takes the ring's place");

template <class T, int kPixels, bool kDual>
__global__ void __launch_bounds__(kThreads) sm90_conv_latency_kernel(const __grid_constant__ LatencyConv parameters) {
  const ConvBnAct& p = parameters.conv;
  const ConvShape& second_shape = parameters.second_shape;
  constexpr int V = 8;
  constexpr int kRowsAtOnce = kThreads / 8;  // eight threads copy a row's eight chunks
  constexpr int kRowsA = kFilters / kRowsAtOnce, kRowsB = kPixels / kRowsAtOnce;
  unsigned char* memory = ptx::dynamic_shared();
  const uint32_t ring = ptx::shared_address(memory);  // stage: filters, then pixels
  const ConvShape& shape = p.shape;
  // tiles.splits is the cluster's size, and the parts of a tile are its blocks.
  const ConvTile at = ConvTile::of(p.tiles, static_cast<int>(blockIdx.x));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first_steps = static_cast<int>(ceil_div(shape.depth(), kDepth));
  const int second_steps = kDual ? static_cast<int>(ceil_div(second_shape.c, kDepth)) : 0;
  const Range steps = part_of(first_steps + second_steps, at.split, p.tiles.splits);
  const int count = steps.end - steps.begin;

  const int chunk = thread % 8, first_row = thread / 8;
  const T* pixel[kRowsB];
  const T* second[kDual ? kRowsB : 1];
  int row[kRowsB], column[kRowsB];
#pragma unroll
  for (int i = 0; i < kRowsB; ++i) {
    const int m = at.first_pixel + first_row + i * kRowsAtOnce;
    const bool inside = m < shape.pixels();
    const Window window = window_of(shape, inside ? m : 0);
    pixel[i] = static_cast<const T*>(p.x) + window.offset * shape.c + at.group * shape.group_c();
    row[i] = inside ? window.row : -(1 << 29);
    column[i] = window.column;
    if constexpr (kDual)
      second[i] = static_cast<const T*>(parameters.second) +
                  window_of(second_shape, inside ? m : 0).offset * second_shape.c + chunk * V;
  }
  const T* filter = static_cast<const T*>(p.weight) +
                    (static_cast<int64_t>(at.group) * shape.group_k() + at.first_filter + first_row) * p.weight_row;
  int element = steps.begin * kDepth + chunk * V;
  Tap tap = Tap::of(shape, element);

  const auto copy_filters = [&](int step) {
    const uint32_t to = ring + step % kStages * stage_bytes(kPixels);
    const int depth = element + step * kDepth;
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const int r = first_row + i * kRowsAtOnce;
      const bool valid = at.first_filter + r < shape.group_k() && depth < p.weight_row;
      const T* from = filter + static_cast<int64_t>(i) * kRowsAtOnce * p.weight_row + depth;
      ptx::copy_async_16(to + swizzle_128(r, chunk), valid ? from : p.weight, valid);
    }
  };
  // In the order of steps: the tap walks along.
  const auto copy_pixels = [&](int step) {
    const uint32_t to = ring + step % kStages * stage_bytes(kPixels) + kFilters * kSwizzleRow;
    if constexpr (kDual) {
      const int begin = (steps.begin + step - first_steps) * kDepth;
      if (begin >= 0) {
#pragma unroll
        for (int i = 0; i < kRowsB; ++i) {
          const bool valid = row[i] > -(1 << 28) && begin + chunk * V < second_shape.c;
          ptx::copy_async_16(to + swizzle_128(first_row + i * kRowsAtOnce, chunk), valid ? second[i] + begin : p.x,
                             valid);
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      const bool valid = tap.valid(shape, row[i], column[i]);
      ptx::copy_async_16(to + swizzle_128(first_row + i * kRowsAtOnce, chunk),
                         valid ? pixel[i] + tap.offset(shape) : p.x, valid);
    }
    tap.advance(shape, kDepth);
  };

  for (int i = 0; i < kStages && i < count; ++i) copy_filters(i);
  ptx::wait_for_predecessor();
  ptx::let_successor_start();
  for (int i = 0; i < kStages; ++i) {
    if (i < count) copy_pixels(i);
    ptx::copy_async_commit();
  }

  float sum[kPixels / 2];
#pragma unroll
  for (float& v : sum) v = 0;
  for (int step = 0; step < count; ++step) {
    // Step s >= kStages was committed in iteration s - kStages + 2: two stages are always being multiplied or refilled.
    if (step == 0) {
      ptx::copy_async_wait<kStages - 1>();
    } else if (step == 1) {
      ptx::copy_async_wait<kStages - 2>();
    } else {
      ptx::copy_async_wait<kStages - 3>();
      ptx::wgmma_wait<1>(sum);
    }
    ptx::fence_async_shared();
    ptx::sync_threads();
    if (step >= 2) {
      if (step - 2 + kStages < count) {
        copy_filters(step - 2 + kStages);
        copy_pixels(step - 2 + kStages);
      }
      ptx::copy_async_commit();
    }
    const uint32_t stage = ring + step % kStages * stage_bytes(kPixels);
    const uint64_t a = matrix_descriptor(stage), b = matrix_descriptor(stage + kFilters * kSwizzleRow);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k)
      ptx::wgmma(sum, a + k * kDescriptorStep, b + k * kDescriptorStep, step > 0 || k > 0, T{});
    ptx::wgmma_commit();
  }
  ptx::copy_async_wait<0>();
  ptx::wgmma_wait<0>(sum);
  ptx::sync_threads();

  // [pixel][filter], where the cluster can read it.
  float* tile = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int i = 0; i < kPixels / 2; ++i)
    tile[(i / 4 * 8 + lane % 4 * 2 + i % 2) * kTileStride + warp * 16 + i / 2 % 2 * 8 + lane / 4] = sum[i];
  const int parts = p.tiles.splits;
  if (parts > 1) {
    ptx::sync_cluster();
  } else {
    ptx::sync_threads();
  }

  const Epilogue epilogue{p.residual, p.scale, p.shift, p.out, p.act, p.act_param};
  const bool aligned = shape.group_k() % V == 0;
  const Range mine = part_of(kPixels, at.split, parts);
  for (int item = mine.begin * (kFilters / V) + thread; item < mine.end * (kFilters / V); item += kThreads) {
    const int m = item / (kFilters / V), n = item % (kFilters / V) * V;
    const int filters = shape.group_k() - at.first_filter - n;
    if (at.first_pixel + m >= shape.pixels() || filters <= 0) continue;
    float total[V] = {};
    for (int part = 0; part < parts; ++part) {
#pragma unroll
      for (int j = 0; j < V; j += 4) {
        const int place = m * kTileStride + n + j;
        const float4 four = parts == 1 ? *reinterpret_cast<const float4*>(tile + place)
                                       : ptx::load_cluster(ptx::address_in(ring, part) + place * 4);
        total[j] += four.x, total[j + 1] += four.y, total[j + 2] += four.z, total[j + 3] += four.w;
      }
    }
    const int channel = at.group * shape.group_k() + at.first_filter + n;
    finish<T, V>(epilogue, total, static_cast<int64_t>(at.first_pixel + m) * shape.k + channel, channel, filters,
                 aligned);
  }
  // Nobody leaves while another block may still read its sums.
  if (parts > 1) ptx::sync_cluster();
}

template <class T>
Record typed(const LatencyConv& p) {
  const ConvTiles& t = p.conv.tiles;
  const Shape shape{dim3(static_cast<unsigned>(t.blocks())), kThreads,
                    static_cast<unsigned>(latency_shared_bytes(t.block_m)), static_cast<unsigned>(t.splits)};
  if (p.second)
    return make_record(t.block_m == 32 ? sm90_conv_latency_kernel<T, 32, true> : sm90_conv_latency_kernel<T, 64, true>,
                       shape, p, "sm90_conv_latency, dual");
  return make_record(t.block_m == 32 ? sm90_conv_latency_kernel<T, 32, false> : sm90_conv_latency_kernel<T, 64, false>,
                     shape, p, "sm90_conv_latency");
}

}  // namespace

Record sm90_conv_latency_record(LatencyConv p, Type type, int pixels, int cluster) {
  if (pixels != 32 && pixels != 64) throw std::invalid_argument("tile: 32 and 64 pixels are taken");
  if (cluster != 1 && cluster != 2 && cluster != 4 && cluster != 8)
    throw std::invalid_argument("cluster: 1, 2, 4 and 8 blocks are taken");
  if (p.conv.shape.group_c() % 8 || (p.second && p.second_shape.c % 8)) throw std::invalid_argument("a group's channels must be a multiple of 8");
  p.conv.tiles = ConvTiles::of(p.conv.shape, pixels, kFilters, cluster);
  switch (type) {
    case Type::kBf16: return typed<bf16>(p);
    case Type::kFp16: return typed<fp16>(p);
    default: throw std::invalid_argument("bfloat16 and float16 are taken");
  }
}

}  // namespace fastres
