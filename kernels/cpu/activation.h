// Activations and their derivatives. The codes are those of fastres/activation.py.
#pragma once

#include "vec.h"

namespace fastres {

enum : int64_t {
  kIdentity,
  kRelu,
  kRelu6,
  kSilu,
  kGelu,
  kLeakyRelu,
  kGeluTanh,
  kHardswish,
  kActivations,
};

// Any activation, chosen when it runs: a compile-time code is worth it for the two that are free.
constexpr int64_t kAny = -1;

template <class A>
inline Vec<A> sigmoid(Vec<A> x) {
  return 1 / (1 + exp(-x));
}

// 0.5 (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
template <class A>
inline Vec<A> gelu_tanh_gate(Vec<A> x) {
  constexpr A k = 1.5957691216057308;  // 2 sqrt(2 / pi)
  return sigmoid<A>(k * (x + static_cast<A>(0.044715) * x * x * x));
}

template <class A>
inline Vec<A> gelu_cdf(Vec<A> x) {
  return static_cast<A>(0.5) * (1 + erf<A>(x * static_cast<A>(0.70710678118654752)));
}

template <class A>
inline Vec<A> clamp(Vec<A> x, A low, A high) {
  return x < low ? splat(low) : (x > high ? splat(high) : x);
}

template <int64_t kAct, class A>
inline Vec<A> activate(Vec<A> z, int64_t act, A param) {
  switch (kAct == kAny ? act : kAct) {
    case kRelu: return relu<A>(z);
    case kRelu6: return clamp<A>(z, 0, 6);
    case kSilu: return z / (1 + exp(-z));
    case kGelu: return z * gelu_cdf<A>(z);
    case kLeakyRelu: return z > 0 ? z : z * param;
    case kGeluTanh: return z * gelu_tanh_gate<A>(z);
    case kHardswish: return z * clamp<A>(z + 3, 0, 6) / 6;
    default: return z;
  }
}

// grad * act'(z), with PyTorch's choice at the corners.
template <int64_t kAct, class A>
inline Vec<A> activate_backward(Vec<A> grad, Vec<A> z, int64_t act, A param) {
  const Vec<A> zero = {};
  switch (kAct == kAny ? act : kAct) {
    case kRelu: return z <= 0 ? zero : grad;
    case kRelu6: return z <= 0 || z >= 6 ? zero : grad;
    case kSilu: {
      const Vec<A> s = sigmoid<A>(z);
      return grad * s * (1 + z * (1 - s));
    }
    case kGelu: {
      const Vec<A> pdf = exp(z * z * static_cast<A>(-0.5)) * static_cast<A>(0.3989422804014327);
      return grad * (gelu_cdf<A>(z) + z * pdf);
    }
    case kLeakyRelu: return z > 0 ? grad : grad * param;
    case kGeluTanh: {
      const Vec<A> s = gelu_tanh_gate<A>(z);
      const Vec<A> slope = static_cast<A>(1.5957691216057308) * (1 + static_cast<A>(3 * 0.044715) * z * z);
      return grad * (s + z * s * (1 - s) * slope);
    }
    case kHardswish: return z < -3 ? zero : (z <= 3 ? grad * (z / 3 + static_cast<A>(0.5)) : grad);
    default: return grad;
  }
}

template <class F>
inline void dispatch_activation(int64_t act, const F& f) {
  switch (act) {
    case kIdentity: return f(std::integral_constant<int64_t, kIdentity>{});
    case kRelu: return f(std::integral_constant<int64_t, kRelu>{});
    default: return f(std::integral_constant<int64_t, kAny>{});
  }
}

}  // namespace fastres
