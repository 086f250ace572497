// Copy a contiguous fp32 tensor [N, C, *spatial] into channels_last order, rounding on the way if wanted.
#include <algorithm>
#include <utility>

#include "tensor.h"

namespace fastres {
namespace {

using V = Vec<float>;
constexpr int W = kLanes<float>;

// Lane i is lane at(i) of a and b laid end to end.
template <class At>
inline V shuffle(V a, V b, const At&) {
#if defined(__clang__)
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, At::at(I)...);
  }(std::make_index_sequence<W>{});
#else
  Int mask;
  for (int i = 0; i < W; ++i) mask[i] = At::at(i);
  return __builtin_shuffle(a, b, mask);
#endif
}

template <int kFrom>
struct Interleave {
  static constexpr int at(int i) { return kFrom + i / 2 + i % 2 * W; }
};

// Rows become columns by log2(W) perfect shuffles.
inline void transpose(V (&v)[W]) {
  for (int step = 1; step < W; step *= 2) {
    V next[W];
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = shuffle(v[i], v[i + W / 2], Interleave<0>{});
      next[2 * i + 1] = shuffle(v[i], v[i + W / 2], Interleave<W / 2>{});
    }
    std::copy(next, next + W, v);
  }
}

// Vector j of W pixels of three channels: from a and b first, then c.
template <int j>
struct FirstTwo {
  static constexpr int at(int i) {
    const int k = j * W + i;
    return k % 3 == 0 ? k / 3 : (k % 3 == 1 ? W + k / 3 : 0);
  }
};
template <int j>
struct Third {
  static constexpr int at(int i) {
    const int k = j * W + i;
    return k % 3 == 2 ? W + k / 3 : i;
  }
};

template <class U>
void copy_image_rgb(const float* x, U* out, int64_t pixels, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + W <= end; i += W) {
    const V a = load(x + i), b = load(x + pixels + i), c = load(x + 2 * pixels + i);
    [&]<int... j>(std::integer_sequence<int, j...>) {
      (store(out + 3 * i + j * W, shuffle(shuffle(a, b, FirstTwo<j>{}), c, Third<j>{})), ...);
    }(std::make_integer_sequence<int, 3>{});
  }
  for (; i < end; ++i)
    for (int k = 0; k < 3; ++k) out[3 * i + k] = static_cast<U>(x[k * pixels + i]);
}

template <class U>
void copy_image(const float* x, U* out, int64_t channels, int64_t pixels, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += W) {
    const int64_t n = std::min<int64_t>(W, end - i);
    for (int64_t c = 0; c < channels; c += W) {
      const int64_t m = std::min<int64_t>(W, channels - c);
      V v[W] = {};
      if (n == W) {
        for (int64_t k = 0; k < m; ++k) v[k] = load(x + (c + k) * pixels + i);
      } else {
        for (int64_t k = 0; k < m; ++k) v[k] = Tail{static_cast<int>(n)}.load(x + (c + k) * pixels + i);
      }
      transpose(v);
      if (m == W) {
        for (int64_t k = 0; k < n; ++k) store(out + (i + k) * channels + c, v[k]);
      } else {
        for (int64_t k = 0; k < n; ++k) Tail{static_cast<int>(m)}.store(out + (i + k) * channels + c, v[k]);
      }
    }
  }
}

template <class U>
void copy(const float* x, U* out, const Dense& d) {
  // Strips of pixels: whole vectors, so that only an image's end has a tail.
  constexpr int64_t kStrip = 1024;
  const int64_t strips = (d.s + kStrip - 1) / kStrip;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kStrip * d.c));
  parallel_for(0, d.n * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t image = k / strips * d.c * d.s, from = k % strips * kStrip,
                    to = std::min(from + kStrip, d.s);
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
  FASTRES_CHECK_TYPE(d.type == ScalarType::Float, "x is ", name_of(d.type), ", expected float32");
  const ScalarType to = out.scalar_type();
  FASTRES_CHECK_TYPE(acc_type(to) == ScalarType::Float,
                     "out is float64, expected float32, bfloat16 or float16");
  Dense want = d;
  want.type = to;
  want.nhwc = true;
  check_like(out, x, want, "out");
  if (d.numel() == 0) return;
  dispatch(to, [&](auto t) {
    using U = decltype(t);
    if constexpr (!std::is_same_v<U, double>) copy(data<float>(x), mutable_data<U>(out), d);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) { m.impl("to_nhwc", TORCH_BOX(&to_nhwc)); }

}  // namespace fastres
