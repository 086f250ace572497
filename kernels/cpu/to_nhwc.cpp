// Copy a contiguous [N, C, *spatial] tensor into channels_last order, converting the element type on the way.
#include <algorithm>
#include <utility>

#include "tensor.h"

namespace fastres {
namespace {

template <class A>
using Mask = typename VectorOf<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>, kVectorBytes>::type;

// Lane i is lane at(i) of a and b laid end to end.
template <class A, class At>
inline Vec<A> shuffle(Vec<A> a, Vec<A> b, const At& at) {
  constexpr int W = kLanes<A>;
#if defined(__clang__)
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, At::at(I)...);
  }(std::make_index_sequence<W>{});
#else
  Mask<A> mask;
  for (int i = 0; i < W; ++i) mask[i] = At::at(i);
  return __builtin_shuffle(a, b, mask);
#endif
}

template <int W, int kFrom>
struct Interleave {
  static constexpr int at(int i) { return kFrom + i / 2 + i % 2 * W; }
};

// Rows become columns by log2(W) perfect shuffles.
template <class A>
inline void transpose(Vec<A> (&v)[kLanes<A>]) {
  constexpr int W = kLanes<A>;
  for (int step = 1; step < W; step *= 2) {
    Vec<A> next[W];
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = shuffle<A>(v[i], v[i + W / 2], Interleave<W, 0>{});
      next[2 * i + 1] = shuffle<A>(v[i], v[i + W / 2], Interleave<W, W / 2>{});
    }
    std::copy(next, next + W, v);
  }
}

// Vector j of W pixels of three channels: from a and b first, then c.
template <int W, int j>
struct FirstTwo {
  static constexpr int at(int i) {
    const int k = j * W + i;
    return k % 3 == 0 ? k / 3 : (k % 3 == 1 ? W + k / 3 : 0);
  }
};
template <int W, int j>
struct Third {
  static constexpr int at(int i) {
    const int k = j * W + i;
    return k % 3 == 2 ? W + k / 3 : i;
  }
};

template <class T, class U>
void copy_image_rgb(const T* x, U* out, int64_t pixels, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int W = kLanes<A>;
  int64_t i = begin;
  for (; i + W <= end; i += W) {
    const Vec<A> a = load(x + i), b = load(x + pixels + i), c = load(x + 2 * pixels + i);
    [&]<int... j>(std::integer_sequence<int, j...>) {
      (store(out + 3 * i + j * W, shuffle<A>(shuffle<A>(a, b, FirstTwo<W, j>{}), c, Third<W, j>{})), ...);
    }(std::make_integer_sequence<int, 3>{});
  }
  for (; i < end; ++i)
    for (int k = 0; k < 3; ++k) out[3 * i + k] = static_cast<U>(static_cast<A>(x[k * pixels + i]));
}

template <class T, class U>
void copy_image(const T* x, U* out, int64_t channels, int64_t pixels, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int W = kLanes<A>;
  for (int64_t i = begin; i < end; i += W) {
    const int64_t n = std::min<int64_t>(W, end - i);
    for (int64_t c = 0; c < channels; c += W) {
      const int64_t m = std::min<int64_t>(W, channels - c);
      Vec<A> v[W] = {};
      if (n == W) {
        for (int64_t k = 0; k < m; ++k) v[k] = load(x + (c + k) * pixels + i);
      } else {
        for (int64_t k = 0; k < m; ++k) v[k] = Tail{static_cast<int>(n)}.load(x + (c + k) * pixels + i);
      }
      transpose<A>(v);
      if (m == W) {
        for (int64_t k = 0; k < n; ++k) store(out + (i + k) * channels + c, v[k]);
      } else {
        for (int64_t k = 0; k < n; ++k) Tail{static_cast<int>(m)}.store(out + (i + k) * channels + c, v[k]);
      }
    }
  }
}

template <class T, class U>
void copy(const T* x, U* out, const Dense& d) {
  // Strips of pixels: whole vectors, so that only an image's end has a tail.
  constexpr int64_t kStrip = 1024;
  const int64_t strips = (d.s + kStrip - 1) / kStrip;
  parallel_for(0, d.n * strips, std::max<int64_t>(1, kGrain / (kStrip * d.c)), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t image = k / strips * d.c * d.s, from = k % strips * kStrip, to = std::min(from + kStrip, d.s);
      if (d.c == 3)
        copy_image_rgb(x + image, out + image, d.s, from, to);
      else
        copy_image(x + image, out + image, d.c, d.s, from, to);
    }
  });
}

void to_nhwc(const Tensor& x, const Tensor& out) {
  const Dense d = dense(x, "x");
  FASTRES_CHECK(is_dense(x, false), "x must be contiguous, its strides are ", shape_of(x.strides()));
  const ScalarType to = out.scalar_type();
  FASTRES_CHECK_TYPE(to == d.type || (d.type == ScalarType::Float && acc_type(to) == ScalarType::Float &&
                                      (to == ScalarType::BFloat16 || to == ScalarType::Half)),
                     "out is ", name_of(to), ", expected ", name_of(d.type), " (or from float32: bfloat16, float16)");
  Dense want = d;
  want.type = to;
  want.nhwc = true;
  check_like(out, x, want, "out");
  if (d.numel() == 0) return;
  dispatch(d.type, [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<T, float>) {
      if (to == ScalarType::BFloat16) return copy(data<T>(x), mutable_data<BFloat16>(out), d);
      if (to == ScalarType::Half) return copy(data<T>(x), mutable_data<Half>(out), d);
    }
    copy(data<T>(x), mutable_data<T>(out), d);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) { m.impl("to_nhwc", TORCH_BOX(&to_nhwc)); }

}  // namespace fastres
