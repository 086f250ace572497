// Max pooling: padding counts as -inf, a NaN in the window is the result.
#include <algorithm>
#include <vector>

#include "tensor.h"

namespace fastres {
namespace {

using Ints = torch::headeronly::IntHeaderOnlyArrayRef;

struct Axis {
  int64_t size, out, kernel, stride, padding, dilation;
  // Taps [first, last) of an output position that lie inside the image.
  int64_t first(int64_t o) const {
    const int64_t begin = o * stride - padding;
    return begin >= 0 ? 0 : (-begin + dilation - 1) / dilation;
  }
  int64_t last(int64_t o) const {
    const int64_t room = size - (o * stride - padding);
    return std::clamp<int64_t>((room + dilation - 1) / dilation, 0, kernel);
  }
  int64_t at(int64_t o, int64_t tap) const { return o * stride - padding + tap * dilation; }
};

template <class A>
constexpr A kLowest = -std::numeric_limits<A>::infinity();

template <class T>
void pool_rows(const T* x, T* out, const Dense& d, const Axis& h, const Axis& w) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = kLanes<A>;
  const int64_t c = d.c, taps = h.kernel * w.kernel;
  const int64_t grain = std::max<int64_t>(1, kGrain / (w.out * c * taps));
  parallel_for(0, d.n * h.out, grain, [&](int64_t begin, int64_t end) {
    std::vector<const T*> window(taps);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t oh = row % h.out;
      const T* image = x + row / h.out * h.size * w.size * c;
      for (int64_t ow = 0; ow < w.out; ++ow) {
        int64_t count = 0;
        for (int64_t i = h.first(oh); i < h.last(oh); ++i)
          for (int64_t j = w.first(ow); j < w.last(ow); ++j)
            window[count++] = image + (h.at(oh, i) * w.size + w.at(ow, j)) * c;
        T* to = out + (row * w.out + ow) * c;
        const auto pool = [&](int64_t k, auto lanes) {
          V best = splat(kLowest<A>);
          for (int64_t tap = 0; tap < count; ++tap) best = max_nan<V>(best, lanes.load(window[tap] + k));
          lanes.store(to + k, best);
        };
        int64_t k = 0;
        for (; k + W <= c; k += W) pool(k, Full{});
        if (k < c) pool(k, Tail{static_cast<int>(c - k)});
      }
    }
  });
}

// Down the columns into a row between paddings, then along that row.
template <class T>
void pool_planes(const T* x, T* out, const Dense& d, const Axis& h, const Axis& w) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t reach = (w.out - 1) * w.stride + (w.kernel - 1) * w.dilation + 1;
  const int64_t grain = std::max<int64_t>(1, kGrain / (h.out * w.out * (h.kernel + w.kernel)));
  parallel_for(0, d.n * d.c, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> padded(std::max(w.padding + w.size, reach), kLowest<A>), best(w.out);
    for (int64_t plane = begin; plane < end; ++plane) {
      const T* image = x + plane * h.size * w.size;
      for (int64_t oh = 0; oh < h.out; ++oh) {
        const int64_t first = h.first(oh), last = h.last(oh);
        for_vectors<1, A>(w.size, [&](int, int64_t k, auto lanes) {
          V column = splat(kLowest<A>);
          for (int64_t i = first; i < last; ++i)
            column = max_nan<V>(column, lanes.load(image + h.at(oh, i) * w.size + k));
          lanes.store(padded.data() + w.padding + k, column);
        });
        std::fill(best.begin(), best.end(), kLowest<A>);
        for (int64_t j = 0; j < w.kernel; ++j) {
          const A* from = padded.data() + j * w.dilation;
          const auto along = [&](auto stride) {
            for (int64_t ow = 0; ow < w.out; ++ow) {
              const A a = best[ow], b = from[ow * stride];
              best[ow] = b > a || b != b ? b : a;
            }
          };
          if (w.stride == 2)
            along(std::integral_constant<int64_t, 2>{});
          else
            along(w.stride);
        }
        T* to = out + (plane * h.out + oh) * w.out;
        for (int64_t ow = 0; ow < w.out; ++ow) to[ow] = static_cast<T>(best[ow]);
      }
    }
  });
}

void max_pool2d(const Tensor& x, const Ints& kernel, const Ints& stride, const Ints& padding,
                const Ints& dilation, const Tensor& out) {
  const Dense d = dense(x, "x");
  const auto in_sizes = x.sizes(), out_sizes = out.sizes();
  FASTRES_CHECK(in_sizes.size() == 4, "x must have the shape [N, C, H, W], it has ", shape_of(in_sizes));
  FASTRES_CHECK(out.is_cpu(), "out must be a CPU tensor");
  FASTRES_CHECK_TYPE(out.scalar_type() == d.type, "out is ", name_of(out.scalar_type()), ", expected ",
                     name_of(d.type));
  FASTRES_CHECK(out_sizes.size() == 4 && out_sizes[0] == d.n && out_sizes[1] == d.c, "out has the shape ",
                shape_of(out_sizes), ", expected [", d.n, ", ", d.c, ", H, W]");
  Axis axes[2];
  for (int i = 0; i < 2; ++i) {
    FASTRES_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "kernel, stride, padding and dilation take two numbers each");
    FASTRES_CHECK(kernel[i] > 0, "kernel must be positive, it is ", shape_of(kernel));
    FASTRES_CHECK(stride[i] > 0, "stride must be positive, it is ", shape_of(stride));
    FASTRES_CHECK(dilation[i] > 0, "dilation must be positive, it is ", shape_of(dilation));
    FASTRES_CHECK(padding[i] >= 0 && 2 * padding[i] <= (kernel[i] - 1) * dilation[i] + 1,
                  "padding must be from 0 to half of the kernel's extent, it is ", shape_of(padding));
    Axis& axis = axes[i];
    axis = {in_sizes[2 + i], out_sizes[2 + i], kernel[i], stride[i], padding[i], dilation[i]};
    // Rounded down, or up (ceil_mode) as long as the last window starts inside the image or its left padding.
    const int64_t room = axis.size + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    FASTRES_CHECK(room >= 0, "x of the shape ", shape_of(in_sizes), " is smaller than the kernel ",
                  shape_of(kernel));
    const int64_t low = room / stride[i] + 1;
    int64_t high = (room + stride[i] - 1) / stride[i] + 1;
    if ((high - 1) * stride[i] >= axis.size + padding[i]) --high;
    FASTRES_CHECK(axis.out == low || axis.out == high, "out has the shape ", shape_of(out_sizes),
                  ", expected ", low, " or (ceil_mode) ", high, " in dimension ", 2 + i);
  }
  // A one-pixel image is in both orders; its larger output may not be. (And the reverse.)
  const bool rows =
      d.nhwc ? is_dense(out, true) : is_dense(x, true) && is_dense(out, true) && !is_dense(out, false);
  FASTRES_CHECK(rows || (is_dense(x, false) && is_dense(out, false)),
                "out must have the memory format of x, its strides are ", shape_of(out.strides()));
  if (out.numel() == 0) return;
  dispatch(d.type, [&](auto t) {
    using T = decltype(t);
    (rows ? pool_rows<T> : pool_planes<T>)(data<T>(x), mutable_data<T>(out), d, axes[0], axes[1]);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) { m.impl("max_pool2d", TORCH_BOX(&max_pool2d)); }

}  // namespace fastres
