// Mean over the spatial dimensions, [N, C, *spatial] to [N, C].
#include <algorithm>

#include "reduce.h"

namespace fastres {
namespace {

template <class T>
void average_rows(const T* x, T* out, const Dense& d) {
  using A = Acc<T>;
  using V = Vec<A>;
  // Sums of 64 numbers are added up in a second level: rounding grows with the root of the count.
  constexpr int64_t W = kLanes<A>, kBlock = 64, kSlice = 512;
  const A scale = 1 / static_cast<A>(d.s);
  const int64_t slices = (d.c + kSlice - 1) / kSlice;
  const int64_t grain = std::max<int64_t>(1, kGrain / (d.s * std::min(d.c, kSlice)));
  parallel_for(0, d.n * slices, grain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t n = part / slices, from = part % slices * kSlice;
      for_channel_blocks<A>(std::min(kSlice, d.c - from), [&](auto width, int64_t c, auto lanes) {
        constexpr int U = width();
        V total[U] = {};
        const T* image = x + n * d.s * d.c + from + c;
        for (int64_t block = 0; block < d.s; block += kBlock) {
          V sums[U] = {};
          for (int64_t s = block; s < std::min(block + kBlock, d.s); ++s)
            for (int u = 0; u < U; ++u) sums[u] += lanes.load(image + s * d.c + u * W);
          for (int u = 0; u < U; ++u) total[u] += sums[u];
        }
        for (int u = 0; u < U; ++u) lanes.store(out + n * d.c + from + c + u * W, total[u] * scale);
      });
    }
  });
}

template <class T>
void average_planes(const T* x, T* out, const Dense& d) {
  using A = Acc<T>;
  using V = Vec<A>;
  const A scale = 1 / static_cast<A>(d.s);
  parallel_for(0, d.n * d.c, std::max<int64_t>(1, kGrain / d.s), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const T* image = x + plane * d.s;
      V sums[4] = {};
      for_vectors<4, A>(d.s, [&](int u, int64_t i, auto lanes) { sums[u] += lanes.load(image + i); });
      out[plane] = static_cast<T>(sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3])) * scale);
    }
  });
}

void global_avg_pool(const Tensor& x, const Tensor& out) {
  const Dense d = dense(x, "x");
  FASTRES_CHECK(d.s > 0, "x has no pixels, its shape is ", shape_of(x.sizes()));
  FASTRES_CHECK(out.is_cpu(), "out must be a CPU tensor");
  FASTRES_CHECK_TYPE(out.scalar_type() == d.type, "out is ", name_of(out.scalar_type()), ", expected ",
                     name_of(d.type));
  const auto sizes = out.sizes();
  FASTRES_CHECK(sizes.size() == 2 && sizes[0] == d.n && sizes[1] == d.c, "out has the shape ",
                shape_of(sizes), ", expected [", d.n, ", ", d.c, "]");
  FASTRES_CHECK(is_dense(out, false), "out must be contiguous");
  if (d.numel() == 0) return;
  dispatch(d.type, [&](auto t) {
    using T = decltype(t);
    (d.nhwc ? average_rows<T> : average_planes<T>)(data<T>(x), mutable_data<T>(out), d);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) { m.impl("global_avg_pool", TORCH_BOX(&global_avg_pool)); }

}  // namespace fastres
