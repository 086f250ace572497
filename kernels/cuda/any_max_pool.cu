// Max pooling of [N, H, W, C]; padding counts as -inf, NaN goes through, as in PyTorch.
#include "any_max_pool.h"

#include "types.cuh"

namespace fastres {
namespace {

constexpr int kThreads = 128;

template <class T, int V>
__global__ void __launch_bounds__(kThreads) any_max_pool_kernel(const __grid_constant__ MaxPool p) {
  ptx::let_successor_start();
  ptx::wait_for_predecessor();
  const int vectors = p.c / V;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= p.pixels * vectors) return;
  const int64_t pixel = item / vectors;
  const int channel = static_cast<int>(item - pixel * vectors) * V;
  const int image = static_cast<int>(pixel / (p.p * p.q)), in_image = static_cast<int>(pixel % (p.p * p.q));
  const int top = in_image / p.q * p.stride_h - p.pad_h, left = in_image % p.q * p.stride_w - p.pad_w;
  const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(image) * p.h * p.w * p.c + channel;
  Acc<T> best[V];
#pragma unroll
  for (int j = 0; j < V; ++j) best[j] = -static_cast<Acc<T>>(INFINITY);
  for (int r = 0; r < p.r; ++r) {
    const int h = top + r * p.dilation_h;
    if (h < 0 || h >= p.h) continue;
    for (int s = 0; s < p.s; ++s) {
      const int w = left + s * p.dilation_w;
      if (w < 0 || w >= p.w) continue;
      const auto v = load<T, V>(x + (static_cast<int64_t>(h) * p.w + w) * p.c);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const Acc<T> value = widen(v.v[j]);
        if (value > best[j] || value != value) best[j] = value;
      }
    }
  }
  Pack<T, V> y;
#pragma unroll
  for (int j = 0; j < V; ++j) y.v[j] = narrow<T>(best[j]);
  store<T, V>(static_cast<T*>(p.out) + pixel * p.c + channel, y);
}

template <class T>
Record typed(const MaxPool& p) {
  constexpr int V = kPer16Bytes<T>;
  const int v = p.c % V ? 1 : V;
  const Shape shape{dim3(static_cast<unsigned>(ceil_div(p.pixels * (p.c / v), kThreads))), kThreads};
  return make_record(v == 1 ? any_max_pool_kernel<T, 1> : any_max_pool_kernel<T, V>, shape, p, "any_max_pool");
}

}  // namespace

Record max_pool_record(const MaxPool& p, Type type) {
  switch (type) {
    case Type::kBf16: return typed<bf16>(p);
    case Type::kFp16: return typed<fp16>(p);
    case Type::kFp32: return typed<float>(p);
    default: return typed<double>(p);
  }
}

}  // namespace fastres
