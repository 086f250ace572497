// What the passes of any_bn_act share: how threads walk over the tensor, and dz = grad * act'(z).
#pragma once

#include "activation.cuh"
#include "any_bn_act.h"

namespace fastres {

constexpr int kBnThreads = 256;

// Rows of `cols` vectors of V elements. NHWC: a row is a pixel, and a thread keeps its channels; NCHW: a row is the
// plane of channel row % C.
inline void set_view(BnAct& p, int v) {
  p.rows = p.nhwc ? p.n * p.s : p.n * p.c;
  p.cols = (p.nhwc ? p.c : p.s) / v;
  p.width = static_cast<int>(p.cols < kBnThreads ? p.cols : kBnThreads);
}

// 16-byte vectors where rows and all base addresses allow them, else single elements.
template <class T>
int vector_size(const BnAct& p) {
  uintptr_t bits = 0;
  for (const void* q : {p.x, p.residual, p.grad, p.saved_out, static_cast<const void*>(p.out),
                        static_cast<const void*>(p.grad_residual)})
    bits |= reinterpret_cast<uintptr_t>(q);
  return bits % 16 == 0 && (p.nhwc ? p.c : p.s) % kPer16Bytes<T> == 0 ? kPer16Bytes<T> : 1;
}

// A dynamic activation costs registers and code: ReLU and identity get kernels of their own.
inline bool is_plain(int act) { return act == kIdentity || act == kRelu; }

template <bool kGeneral, class A>
FASTRES_DEVICE A activate_if(int act, A z, A param) {
  if constexpr (kGeneral) return activate(act, z, param);
  return act == kRelu ? relu(z) : z;
}

// Per-channel constants of the backward passes.
template <class A>
struct Backward {
  A mean, invstd, scale, shift;  // z = x * scale + shift
  FASTRES_DEVICE static Backward load(const BnAct& p, int64_t c) {
    const auto at = [c](const void* v, A otherwise) { return v ? static_cast<const A*>(v)[c] : otherwise; };
    Backward b;
    b.mean = at(p.mean, A(0));
    b.invstd = at(p.invstd, A(1));
    b.scale = b.invstd * at(p.weight, A(1));
    b.shift = at(p.bias, A(0)) - b.mean * b.scale;
    return b;
  }
};

// Whether act'(z) comes from z itself: ReLU's does where its output was not kept.
FASTRES_DEVICE bool recomputes(const BnAct& p) { return p.act > kRelu || (p.act == kRelu && !p.saved_out); }

template <bool kGeneral, class A>
FASTRES_DEVICE A slope_times(const BnAct& p, A grad, A x, A residual, A saved_out, const Backward<A>& b) {
  if (p.act == kIdentity) return grad;
  if (p.act == kRelu) {
    const A sign = p.saved_out ? saved_out : x * b.scale + b.shift + residual;
    return sign <= A(0) ? A(0) : grad;
  }
  if constexpr (kGeneral)
    return grad * activate_slope(p.act, x * b.scale + b.shift + residual, static_cast<A>(p.act_param));
  return grad;
}

// Whether a pass reads the tensor at all.
FASTRES_DEVICE bool reads_residual(const BnAct& p) { return p.residual && recomputes(p); }
FASTRES_DEVICE bool reads_out(const BnAct& p) { return p.saved_out && p.act == kRelu; }

template <class T, int V>
FASTRES_DEVICE Pack<T, V> load_if(const void* base, bool wanted, int64_t offset) {
  Pack<T, V> pack;
#pragma unroll
  for (int j = 0; j < V; ++j) pack.v[j] = narrow<T>(0);
  if (wanted) pack = load<T, V>(static_cast<const T*>(base) + offset);
  return pack;
}

template <class R, class A>
FASTRES_DEVICE void move_running(const BnFinalize& p, int64_t c, A mean, A var) {
  const A momentum = static_cast<A>(p.momentum);
  R* m = static_cast<R*>(p.running_mean) + c;
  R* v = static_cast<R*>(p.running_var) + c;
  *m = narrow<R>(static_cast<Acc<R>>(widen(*m) + momentum * (mean - widen(*m))));
  *v = narrow<R>(static_cast<Acc<R>>(widen(*v) + momentum * (var * static_cast<A>(p.unbiased) - widen(*v))));
}

// One channel of bn_finalize.
template <class A>
FASTRES_DEVICE void finalize(const BnFinalize& p, int64_t c, A mean, A var) {
  const auto at = [c](const void* v, A otherwise) { return v ? static_cast<const A*>(v)[c] : otherwise; };
  const A invstd = A(1) / sqrt(var + static_cast<A>(p.eps));
  const A scale = invstd * at(p.weight, A(1));
  static_cast<A*>(p.invstd)[c] = invstd;
  static_cast<A*>(p.scale)[c] = scale;
  static_cast<A*>(p.shift)[c] = at(p.bias, A(0)) - mean * scale;
  if (!p.running_mean) return;
  if constexpr (std::is_same_v<A, double>) {
    move_running<double>(p, c, mean, var);
  } else {
    switch (p.running_type) {
      case Type::kBf16: return move_running<bf16>(p, c, mean, var);
      case Type::kFp16: return move_running<fp16>(p, c, mean, var);
      default: return move_running<float>(p, c, mean, var);
    }
  }
}

}  // namespace fastres
