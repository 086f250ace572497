// Vectors as GCC and Clang have them built in, one width per machine; arithmetic in fp32, fp64 for fp64.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastres {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// The type that a tensor's elements are computed in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class E, int kBytes>
struct VectorOf {
  typedef E type __attribute__((vector_size(kBytes)));
};
template <class A>
using Vec = typename VectorOf<A, kVectorBytes>::type;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

using Int = VectorOf<int32_t, kVectorBytes>::type;
using Uint = VectorOf<uint32_t, kVectorBytes>::type;
using Ushort = VectorOf<uint16_t, kVectorBytes / 2>::type;

template <class A>
inline Vec<A> splat(A value) {
  return value - Vec<A>{};  // not `+`: -0 + 0 is 0
}

template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec<float> from_bfloat16(Ushort v) { return bits<Vec<float>>(__builtin_convertvector(v, Uint) << 16); }

inline Vec<float> load(const BFloat16* p) {
  Ushort v;
  std::memcpy(&v, p, sizeof v);
  return from_bfloat16(v);
}

inline Vec<float> load(const Half* p) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest even in integers: AVX512_BF16's own instruction flushes subnormals.
inline void store(BFloat16* p, Vec<float> v) {
  const Uint u = bits<Uint>(v);
  const Uint rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Ushort out = __builtin_convertvector(v == v ? rounded : Uint{} + 0x7fc0, Ushort);
  std::memcpy(p, &out, sizeof out);
}

inline void store(Half* p, Vec<float> v) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = Half(v[i]);
#endif
}

// How many lanes of a vector are in memory. Loops are written once, for both.
struct Full {
  template <class T>
  Vec<Acc<T>> load(const T* p) const {
    return fastres::load(p);
  }
  template <class T>
  void store(T* p, Vec<Acc<T>> v) const {
    fastres::store(p, v);
  }
};

struct Tail {
  int n;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  Vec<float> load(const float* p) const { return _mm512_maskz_loadu_ps(mask(), p); }
  Vec<double> load(const double* p) const { return _mm512_maskz_loadu_pd(mask(), p); }
  Vec<float> load(const BFloat16* p) const {
    return from_bfloat16(bits<Ushort>(_mm256_maskz_loadu_epi16(mask(), p)));
  }
  Vec<float> load(const Half* p) const {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(mask(), p));
  }
  void store(float* p, Vec<float> v) const { _mm512_mask_storeu_ps(p, mask(), v); }
  void store(double* p, Vec<double> v) const { _mm512_mask_storeu_pd(p, mask(), v); }
  template <class T>
  void store(T* p, Vec<float> v) const {
    T whole[kLanes<float>];
    fastres::store(whole, v);
    _mm256_mask_storeu_epi16(p, mask(), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(whole)));
  }

 private:
  uint16_t mask() const { return static_cast<uint16_t>((1u << n) - 1); }
#else
  template <class T>
  Vec<Acc<T>> load(const T* p) const {
    T whole[kLanes<Acc<T>>] = {};
    std::memcpy(static_cast<void*>(whole), p, n * sizeof(T));
    return fastres::load(whole);
  }
  template <class T>
  void store(T* p, Vec<Acc<T>> v) const {
    T whole[kLanes<Acc<T>>];
    fastres::store(whole, v);
    std::memcpy(static_cast<void*>(p), whole, n * sizeof(T));
  }
#endif
};

// Lanes from n on become 0, so that a tail may be summed.
template <class A>
inline Vec<A> keep(Vec<A> v, Full) {
  return v;
}
template <class A>
inline Vec<A> keep(Vec<A> v, Tail tail) {
  Vec<A> index;
  for (int i = 0; i < kLanes<A>; ++i) index[i] = static_cast<A>(i);
  return index < static_cast<A>(tail.n) ? v : Vec<A>{};
}

// f(accumulator, offset, lanes) over n elements; neighbouring vectors get different accumulators, 0 to U - 1.
template <int U, class A, class F>
inline void for_vectors(int64_t n, const F& f) {
  constexpr int64_t W = kLanes<A>;
  int64_t i = 0;
  for (; i + U * W <= n; i += U * W)
    for (int u = 0; u < U; ++u) f(u, i + u * W, Full{});
  for (; i + W <= n; i += W) f(0, i, Full{});
  if (i < n) f(0, i, Tail{static_cast<int>(n - i)});
}

template <class A>
inline A sum(Vec<A> v) {
  A lanes[kLanes<A>];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class V, int U>
inline const auto* lanes_of(const V (&v)[U]) {
  return reinterpret_cast<const std::decay_t<decltype(v[0][0])>*>(v);  // vectors may alias their elements
}

// A NaN on either side wins, as in PyTorch.
template <class V>
inline V max_nan(V a, V b) {
  return b > a || b != b ? b : a;
}

template <class A>
inline Vec<A> relu(Vec<A> v) {
  return v < 0 ? Vec<A>{} : v;  // NaN is not < 0 and stays
}

// exp in fp32: x = n ln2 + r with ln2 in two parts (Cody and Waite), a degree-6 polynomial in r; about 1 ulp.
inline Vec<float> exp(Vec<float> x) {
  const Vec<float> low = splat(-104.0f), high = splat(89.0f);
  const Vec<float> clamped = x < low ? low : (x > high ? high : x);
  const Vec<float> scaled = clamped * 1.44269504088896341f;
  const Int n = __builtin_convertvector(scaled + (scaled < 0 ? splat(-0.5f) : splat(0.5f)), Int);
  const Vec<float> whole = __builtin_convertvector(n, Vec<float>);
  const Vec<float> r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: n reaches from -150 to 128, beyond what one exponent holds.
  const Int half = n >> 1;
  const Vec<float> first = bits<Vec<float>>((half + 127) << 23);
  const Vec<float> second = bits<Vec<float>>((n - half + 127) << 23);
  const Vec<float> result = p * first * second;
  return x != x ? x : result;
}

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class A>
inline Vec<A> erf(Vec<A> x) {
  for (int i = 0; i < kLanes<A>; ++i) x[i] = std::erf(x[i]);
  return x;
}

}  // namespace fastres
