// out[n, k] = bias[k] + sum_c weight[k, c] * mean over pixels of x[n, :, c].
//
// A block takes 64 outputs and 256 bytes of channels: it pools those channels of every image, multiplies, and writes
// partial sums; the block that comes last adds the parts in order. The weights (most of the bytes) are on their way
// before the layer in front has ended.
#include "any_pool_linear.h"

#include "types.cuh"

namespace fastres {
namespace {

constexpr int kThreads = 256;
constexpr int kGroups = kThreads / kPoolLanes;       // of lanes; each has every kGroups-th pixel, then output
constexpr int kRowsEach = kPoolRows / kGroups;
constexpr int kImages = 4;                           // pooled at once

template <class T>
__global__ void __launch_bounds__(kThreads) any_pool_linear_kernel(const __grid_constant__ PoolLinear p) {
  ptx::let_successor_start();
  constexpr int V = kPer16Bytes<T>;
  constexpr int kChannels = kPoolLanes * V;
  float* sums = reinterpret_cast<float*>(ptx::dynamic_shared());  // [kImages, kGroups, kChannels]
  int* last = reinterpret_cast<int*>(sums + kImages * kGroups * kChannels);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kPoolLanes, group = thread / kPoolLanes;
  const int row_block = static_cast<int>(blockIdx.x), part = static_cast<int>(blockIdx.y);
  const int channel = part * kChannels + lane * V;
  const bool inside = channel < p.c;  // c is a multiple of V

  Pack<T, V> weight[kRowsEach];
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    const int row = row_block * kPoolRows + i * kGroups + group;
#pragma unroll
    for (int j = 0; j < V; ++j) weight[i].v[j] = narrow<T>(0);
    if (inside && row < p.k)
      weight[i] = load<T, V>(static_cast<const T*>(p.weight) + static_cast<int64_t>(row) * p.c + channel);
  }
  ptx::wait_for_predecessor();

  for (int first = 0; first < p.n; first += kImages) {
    const int images = p.n - first < kImages ? p.n - first : kImages;
    for (int image = 0; image < images; ++image) {
      float sum[V] = {};
      const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(first + image) * p.pixels * p.c + channel;
      if (inside)
#pragma unroll 4
        for (int pixel = group; pixel < p.pixels; pixel += kGroups) {
          const auto v = load<T, V>(x + static_cast<int64_t>(pixel) * p.c);
#pragma unroll
          for (int j = 0; j < V; ++j) sum[j] += widen(v.v[j]);
        }
#pragma unroll
      for (int j = 0; j < V; ++j) sums[(image * kGroups + group) * kChannels + lane * V + j] = sum[j];
    }
    ptx::sync_threads();
    for (int i = thread; i < images * kChannels; i += kThreads) {
      float* s = sums + i / kChannels * kGroups * kChannels + i % kChannels;
      float total = s[0];
      for (int g = 1; g < kGroups; ++g) total += s[g * kChannels];
      s[0] = total / static_cast<float>(p.pixels);
    }
    ptx::sync_threads();
    for (int image = 0; image < images; ++image) {
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) {
        float dot = 0;
#pragma unroll
        for (int j = 0; j < V; ++j) dot += widen(weight[i].v[j]) * sums[image * kGroups * kChannels + lane * V + j];
#pragma unroll
        for (int mask = kPoolLanes / 2; mask > 0; mask /= 2) dot += ptx::shuffle_xor(dot, mask);
        const int row = row_block * kPoolRows + i * kGroups + group;
        if (lane == 0 && row < p.k) p.partial[(static_cast<int64_t>(part) * p.n + first + image) * p.k + row] = dot;
      }
    }
    ptx::sync_threads();
  }

  ptx::fence_device();
  ptx::sync_threads();
  if (thread == 0) {
    *last = ptx::add_acquire_release(p.counters + row_block, 1) == p.parts - 1;
    if (*last) p.counters[row_block] = 0;
  }
  ptx::sync_threads();
  if (!*last) return;
  ptx::fence_device();
  for (int i = thread; i < p.n * kPoolRows; i += kThreads) {
    const int image = i / kPoolRows, row = row_block * kPoolRows + i % kPoolRows;
    if (row >= p.k) continue;
    float total = 0;
    for (int j = 0; j < p.parts; ++j) total += p.partial[(static_cast<int64_t>(j) * p.n + image) * p.k + row];
    if (p.bias) total += p.bias[row];
    static_cast<T*>(p.out)[static_cast<int64_t>(image) * p.k + row] = narrow<T>(total);
  }
}

template <class T>
Record typed(PoolLinear p) {
  p.parts = pool_parts(p.c, sizeof(T));
  p.row_blocks = static_cast<int>(ceil_div(p.k, kPoolRows));
  const Shape shape{dim3(static_cast<unsigned>(p.row_blocks), static_cast<unsigned>(p.parts)), kThreads,
                    static_cast<unsigned>(kImages * kGroups * kPoolLanes * 16 / sizeof(T) * 4 + 16)};
  return make_record(any_pool_linear_kernel<T>, shape, p, "any_pool_linear");
}

}  // namespace

Record pool_linear_record(PoolLinear p, Type type) {
  switch (type) {
    case Type::kBf16: return typed<bf16>(p);
    case Type::kFp16: return typed<fp16>(p);
    case Type::kFp32: return typed<float>(p);
    default: throw std::invalid_argument("no float64 pool and linear layer");
  }
}

}  // namespace fastres
