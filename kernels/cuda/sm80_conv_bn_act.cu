// Convolution + BN + residual + activation as an implicit matrix product: cp.async ring, ldmatrix, mma.sync. Ampere and
// everything after; bf16, fp16, and fp32 by TF32.
//
// x [N, H, W, C], weights [K, R, S, C / groups], both with the depth innermost. A block computes block_m pixels times
// block_n filters of one group, or (splits > 1) a part of the depth of it; then the block that comes last adds the
// parts in order, so that the bits never depend on who was last.
#include "conv.h"
#include "epilogue.cuh"

namespace fastres {
namespace {

constexpr int kStages = 4;

// Blocks of the largest 16-bit tile that shall fit an SM. Hopper's code would spill 8 bytes for the second.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kLargeTiles = 1;
#else
constexpr int kLargeTiles = 2;
#endif

template <class T>
constexpr int kStepDepth = kRowBytes / static_cast<int>(sizeof(T));  // elements of depth in a stage

// Floats between rows of the tile in shared memory: 8 more than its width, so that fragments are stored without
// conflicts.
constexpr int tile_stride(int block_n) { return block_n + 8; }
constexpr int ring_bytes(int block_m, int block_n) { return kStages * (block_m + block_n) * kRowBytes; }
constexpr int shared_bytes(int block_m, int block_n) {
  const int ring = ring_bytes(block_m, block_n), tile = block_m * tile_stride(block_n) * 4;
  return (ring > tile ? ring : tile) + 16;
}

template <class T, int kBlockM, int kBlockN, int kWarpM, int kWarpN, bool kVector>
__global__ void __launch_bounds__(kBlockM / kWarpM * (kBlockN / kWarpN) * 32,
                                  kBlockM * kBlockN == 128 * 128 && sizeof(T) == 2 ? kLargeTiles : 1)
    sm80_conv_bn_act_kernel(const __grid_constant__ ConvBnAct p) {
  constexpr int kThreads = kBlockM / kWarpM * (kBlockN / kWarpN) * 32;
  constexpr int V = kPer16Bytes<T>;
  constexpr int kRowsAtOnce = kThreads / 4;  // four threads copy a row's four chunks
  constexpr int kRowsA = kBlockM / kRowsAtOnce, kRowsB = kBlockN / kRowsAtOnce;
  static_assert(kBlockM % kRowsAtOnce == 0 && kBlockN % kRowsAtOnce == 0, "every thread copies the same share");
  constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;

  ptx::let_successor_start();
  unsigned char* memory = ptx::dynamic_shared();
  const uint32_t ring_a = ptx::shared_address(memory);
  const uint32_t ring_b = ring_a + kStages * kBlockM * kRowBytes;
  const ConvShape& shape = p.shape;
  const ConvTile at = ConvTile::of(p.tiles, static_cast<int>(blockIdx.x));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int depth = shape.depth();
  const Range steps = part_of(static_cast<int>(ceil_div(depth, kStepDepth<T>)), at.split, p.tiles.splits);

  // What this thread copies: chunk `chunk` of rows first_row + i * kRowsAtOnce, of pixels and of filters.
  const int chunk = thread % 4, first_row = thread / 4;
  const T* pixel[kRowsA];
  int row[kRowsA], column[kRowsA];
#pragma unroll
  for (int i = 0; i < kRowsA; ++i) {
    const int m = at.first_pixel + first_row + i * kRowsAtOnce;
    const bool inside = m < shape.pixels();
    const Window window = window_of(shape, inside ? m : 0);
    pixel[i] = static_cast<const T*>(p.x) + window.offset * shape.c + at.group * shape.group_c();
    // Far outside of any image: every tap of a pixel that does not exist is padding.
    row[i] = inside ? window.row : -(1 << 29);
    column[i] = window.column;
  }
  const T* filter = static_cast<const T*>(p.weight) +
                    (static_cast<int64_t>(at.group) * shape.group_k() + at.first_filter + first_row) * p.weight_row;
  int element = steps.begin * kStepDepth<T> + chunk * V;  // of depth, next to be copied
  int element_b = element;
  Tap tap = Tap::of(shape, element);

  const auto copy_filters = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      const int r = first_row + i * kRowsAtOnce;
      const bool valid = at.first_filter + r < shape.group_k() && element_b < p.weight_row;
      const T* from = filter + static_cast<int64_t>(i) * kRowsAtOnce * p.weight_row + element_b;
      ptx::copy_async_16(ring_b + stage * kBlockN * kRowBytes + swizzle_64(r, chunk), valid ? from : p.weight, valid);
    }
    element_b += kStepDepth<T>;
  };
  const auto copy_pixels = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const int to = stage * kBlockM * kRowBytes + swizzle_64(first_row + i * kRowsAtOnce, chunk);
      if constexpr (kVector) {
        const bool valid = tap.valid(shape, row[i], column[i]);
        ptx::copy_async_16(ring_a + to, valid ? pixel[i] + tap.offset(shape) : p.x, valid);
      } else {
        // Channels that do not fill 16 bytes: element by element.
        Pack<T, V> values;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const Tap one = Tap::of(shape, element + j);
          values.v[j] = one.valid(shape, row[i], column[i]) ? pixel[i][one.offset(shape)] : narrow<T>(0);
        }
        store<T, V>(reinterpret_cast<T*>(memory + to), values);
      }
    }
    element += kStepDepth<T>;
    if constexpr (kVector) tap.advance(shape, kStepDepth<T>);
  };

  // Filters were written long ago: their first copies start before the layer in front of this one has ended.
  const int count = steps.end - steps.begin;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i)
    if (i < count) copy_filters(i);
  ptx::wait_for_predecessor();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < count) copy_pixels(i);
    ptx::copy_async_commit();
  }

  float sum[kFragmentsM][kFragmentsN][4] = {};
  const int warp_m = warp % (kBlockM / kWarpM) * kWarpM, warp_n = warp / (kBlockM / kWarpM) * kWarpN;
  for (int step = 0; step < count; ++step) {
    ptx::copy_async_wait<kStages - 2>();
    ptx::sync_threads();
    const int next = step + kStages - 1;
    if (next < count) {
      copy_filters(next % kStages);
      copy_pixels(next % kStages);
    }
    ptx::copy_async_commit();
    const uint32_t a_tile = ring_a + step % kStages * kBlockM * kRowBytes;
    const uint32_t b_tile = ring_b + step % kStages * kBlockN * kRowBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[kFragmentsM][4], b[kFragmentsN / 2][4];
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i)
        ptx::load_matrix_x4(a[i], a_tile + swizzle_64(warp_m + i * 16 + lane % 16, 2 * half + lane / 16));
#pragma unroll
      for (int j = 0; j < kFragmentsN / 2; ++j)
        ptx::load_matrix_x4(
            b[j], b_tile + swizzle_64(warp_n + j * 16 + lane % 8 + lane / 16 * 8, 2 * half + lane / 8 % 2));
      if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (auto& fragment : a)
          for (uint32_t& v : fragment) v = ptx::round_tf32(v);
#pragma unroll
        for (auto& fragment : b)
          for (uint32_t& v : fragment) v = ptx::round_tf32(v);
      }
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j)
          ptx::mma(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], T{});
    }
  }
  ptx::copy_async_wait<0>();
  ptx::sync_threads();

  // Through shared memory, so that a thread finishes V neighbouring channels with 16-byte accesses.
  float* tile = reinterpret_cast<float*>(memory);
  constexpr int kStride = tile_stride(kBlockN);
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
    for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store<float, 2>(tile + (warp_m + i * 16 + half * 8 + lane / 4) * kStride + warp_n + j * 8 + lane % 4 * 2,
                        Pack<float, 2>{sum[i][j][2 * half], sum[i][j][2 * half + 1]});
  ptx::sync_threads();

  constexpr int kItems = kBlockM * kBlockN / V, kPerRow = kBlockN / V;
  const int splits = p.tiles.splits;
  float* partial = p.partial + static_cast<int64_t>(at.tile) * splits * (kBlockM * kBlockN);
  if (splits > 1) {
    float* mine = partial + static_cast<int64_t>(at.split) * (kBlockM * kBlockN);
    for (int i = thread; i < kBlockM * kBlockN / 4; i += kThreads)
      store<float, 4>(mine + i * 4, load<float, 4>(tile + i / (kBlockN / 4) * kStride + i % (kBlockN / 4) * 4));
    int* last = reinterpret_cast<int*>(memory + shared_bytes(kBlockM, kBlockN) - 16);
    ptx::fence_device();
    ptx::sync_threads();
    if (thread == 0) {
      *last = ptx::add_acquire_release(p.counters + at.tile, 1) == splits - 1;
      if (*last) p.counters[at.tile] = 0;
    }
    ptx::sync_threads();
    if (!*last) return;
    ptx::fence_device();
  }
  const Epilogue epilogue{p.residual, p.scale, p.shift, p.out, p.act, p.act_param};
  const bool aligned = shape.group_k() % V == 0;
  for (int item = thread; item < kItems; item += kThreads) {
    const int m = item / kPerRow, n = item % kPerRow * V;
    const int filters = shape.group_k() - at.first_filter - n;
    if (at.first_pixel + m >= shape.pixels() || filters <= 0) continue;
    float total[V];
    if (splits == 1) {
#pragma unroll
      for (int j = 0; j < V; j += 4) {
        const auto four = load<float, 4>(tile + m * kStride + n + j);
#pragma unroll
        for (int i = 0; i < 4; ++i) total[j + i] = four.v[i];
      }
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) total[j] = 0;
      for (int part = 0; part < splits; ++part)
#pragma unroll
        for (int j = 0; j < V; j += 4) {
          const auto four =
              load<float, 4>(partial + static_cast<int64_t>(part) * (kBlockM * kBlockN) + m * kBlockN + n + j);
#pragma unroll
          for (int i = 0; i < 4; ++i) total[j + i] += four.v[i];
        }
    }
    const int channel = at.group * shape.group_k() + at.first_filter + n;
    finish<T, V>(epilogue, total, static_cast<int64_t>(at.first_pixel + m) * shape.k + channel, channel, filters,
                 aligned);
  }
}

template <class T>
Record typed(const ConvBnAct& p) {
  const ConvTiles& t = p.tiles;
  const auto record = [&](auto kernel, int threads) {
    return make_record(kernel,
                       Shape{dim3(static_cast<unsigned>(t.blocks())), static_cast<unsigned>(threads),
                             static_cast<unsigned>(shared_bytes(t.block_m, t.block_n))},
                       p, "sm80_conv_bn_act");
  };
  const bool vector = p.shape.group_c() % kPer16Bytes<T> == 0;
  if (t.block_m == 64 && t.block_n == 64)
    return vector ? record(sm80_conv_bn_act_kernel<T, 64, 64, 32, 32, true>, 128)
                  : record(sm80_conv_bn_act_kernel<T, 64, 64, 32, 32, false>, 128);
  if (!vector) throw std::invalid_argument("channels that do not fill 16 bytes need the tile 64 x 64");
  if (t.block_m == 128 && t.block_n == 64) return record(sm80_conv_bn_act_kernel<T, 128, 64, 64, 32, true>, 128);
  if (t.block_m == 128 && t.block_n == 128) return record(sm80_conv_bn_act_kernel<T, 128, 128, 64, 32, true>, 256);
  throw std::invalid_argument("tile: 64 x 64, 128 x 64 and 128 x 128 are taken");
}

}  // namespace

Record sm80_conv_record(ConvBnAct p, Type type, int block_m, int block_n, int splits) {
  p.tiles = ConvTiles::of(p.shape, block_m, block_n, splits);
  switch (type) {
    case Type::kBf16: return typed<bf16>(p);
    case Type::kFp16: return typed<fp16>(p);
    case Type::kFp32: return typed<float>(p);
    default: throw std::invalid_argument("no float64 convolution");
  }
}

}  // namespace fastres
