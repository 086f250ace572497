// Element types, the type that each is computed in, and 16-byte packs of them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "launch.h"
#include "ptx.cuh"

namespace fastres {

using bf16 = __nv_bfloat16;
using fp16 = __half;

template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using Acc = typename Compute<T>::type;

__host__ __device__ inline float widen(float v) { return v; }
__host__ __device__ inline double widen(double v) { return v; }
__host__ __device__ inline float widen(bf16 v) { return __bfloat162float(v); }
__host__ __device__ inline float widen(fp16 v) { return __half2float(v); }

template <class T>
__host__ __device__ inline T narrow(Acc<T> v) {
  if constexpr (sizeof(T) >= 4) {
    return v;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(v);
  } else {
    return __float2half_rn(v);
  }
}

// Two 16-bit numbers of a word, the low half first.
template <class T>
FASTRES_DEVICE float2 widen_pair(uint32_t bits) {
  union {
    uint32_t bits[2];
    float v[2];
    T half[4];
  } pair;
  if constexpr (std::is_same_v<T, bf16>) {
    pair.bits[1] = bits & 0xffff0000u, pair.bits[0] = bits << 16;  // the upper halves of two floats
    return {pair.v[0], pair.v[1]};
  } else {
    pair.bits[0] = bits;
    return {widen(pair.half[0]), widen(pair.half[1])};
  }
}
template <class T>
FASTRES_DEVICE uint32_t narrow_pair(float low, float high) {
  union {
    T v[2];
    uint32_t bits;
  } pair;
  pair.v[0] = narrow<T>(low), pair.v[1] = narrow<T>(high);
  return pair.bits;
}

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <class T>
constexpr int kPer16Bytes = 16 / static_cast<int>(sizeof(T));

template <class T, int V>
FASTRES_DEVICE Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <class T, int V>
FASTRES_DEVICE void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

}  // namespace fastres
