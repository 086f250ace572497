// out = max(a + b, 0) and its gradient: one pass of 16-byte vectors; bound by memory.
#include "any_add_relu.h"

#include "activation.cuh"

namespace fastres {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // vectors in flight a thread: their loads are issued before the first is used

template <bool kBackward, class T>
FASTRES_DEVICE T apply(T a, T b) {
  // A NaN in the forward's output lets the gradient through, as PyTorch's threshold_backward does.
  if constexpr (kBackward) return widen(b) <= Acc<T>(0) ? narrow<T>(0) : a;
  return narrow<T>(relu(widen(a) + widen(b)));
}

template <class T, int V, bool kBackward>
__global__ void __launch_bounds__(kThreads) add_relu_kernel(const __grid_constant__ AddRelu p) {
  constexpr int64_t kBlock = static_cast<int64_t>(kThreads) * kUnroll * V;
  const int64_t begin = blockIdx.x * kBlock;
  const T* a = static_cast<const T*>(p.a) + begin;
  const T* b = static_cast<const T*>(p.b) + begin;
  T* out = static_cast<T*>(p.out) + begin;
  if (begin + kBlock > p.count) {
    for (int64_t i = threadIdx.x; i < p.count - begin; i += kThreads) out[i] = apply<kBackward>(a[i], b[i]);
    return;
  }
  Pack<T, V> left[kUnroll], right[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    left[u] = load<T, V>(a + (u * kThreads + threadIdx.x) * V);
    right[u] = load<T, V>(b + (u * kThreads + threadIdx.x) * V);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
    for (int j = 0; j < V; ++j) left[u].v[j] = apply<kBackward>(left[u].v[j], right[u].v[j]);
    store<T, V>(out + (u * kThreads + threadIdx.x) * V, left[u]);
  }
}

template <class T>
Record typed(const AddRelu& p, bool backward) {
  constexpr int V = kPer16Bytes<T>;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(p.a) | reinterpret_cast<uintptr_t>(p.b) |
                         reinterpret_cast<uintptr_t>(p.out);
  const int v = bits % 16 ? 1 : V;
  const Shape shape{dim3(static_cast<unsigned>(ceil_div(p.count, int64_t{kThreads} * kUnroll * v))), kThreads};
  if (backward)
    return make_record(v == 1 ? add_relu_kernel<T, 1, true> : add_relu_kernel<T, V, true>, shape, p,
                       "add_relu_backward");
  return make_record(v == 1 ? add_relu_kernel<T, 1, false> : add_relu_kernel<T, V, false>, shape, p, "add_relu");
}

}  // namespace

Record add_relu_record(const AddRelu& p, Type type, bool backward) {
  switch (type) {
    case Type::kBf16: return typed<bf16>(p, backward);
    case Type::kFp16: return typed<fp16>(p, backward);
    case Type::kFp32: return typed<float>(p, backward);
    default: return typed<double>(p, backward);
  }
}

}  // namespace fastres
