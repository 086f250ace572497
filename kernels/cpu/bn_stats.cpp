// Mean and biased variance per channel. Each tile is read twice (mean, then squares of the deviations from it, with
// the first pass's rounding corrected), tiles and chunks are merged by Chan, Golub and LeVeque (1983), in fp64.
#include "reduce.h"

namespace fastres {
namespace {

// Sum and sum of squared deviations of `count` numbers. The sum is kept, not the mean: an infinity stays one.
struct Moments {
  double sum = 0, m2 = 0;
  void merge(double count, double other_sum, double other_m2, double other_count) {
    if (count > 0) {
      const double delta = other_sum / other_count - sum / count;
      m2 += delta * delta * (count * other_count / (count + other_count));
    }
    sum += other_sum;
    m2 += other_m2;
  }
};

// A tile's moments: `mean` as first computed, then the sums of (x - mean) and (x - mean)^2.
template <class A>
inline void merge_tile(Moments& to, double count, A mean, A rest, A squares, double tile) {
  const double correction = std::isfinite(mean) ? rest : 0;
  to.merge(count, mean * tile + correction, squares - correction * correction / tile, tile);
}

template <class T>
void stats_rows(const T* x, const Dense& d, Acc<T>* mean, Acc<T>* var) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int W = kLanes<A>;
  const int64_t channels = d.c, rows = d.rows();
  const Chunks chunks = chunks_of(d, sizeof(T));
  auto partial = std::make_unique<Moments[]>(chunks.count * channels);
  const int64_t grain = std::max<int64_t>(1, kGrain / (chunks.rows * channels));
  parallel_for(0, chunks.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * chunks.rows, stop = std::min(rows, first + chunks.rows);
      for (int64_t row = first; row < stop; row += chunks.tile) {
        const int64_t n = std::min(chunks.tile, stop - row);
        for_channel_blocks<A>(channels, [&](auto width, int64_t c, auto lanes) {
          constexpr int U = width();
          V m[U] = {}, rest[U] = {}, squares[U] = {};
          const T* tile = x + row * channels + c;
          for (int64_t r = 0; r < n; ++r)
            for (int u = 0; u < U; ++u) m[u] += lanes.load(tile + r * channels + u * W);
          for (int u = 0; u < U; ++u) m[u] *= 1 / static_cast<A>(n);
          for (int64_t r = 0; r < n; ++r)
            for (int u = 0; u < U; ++u) {
              const V delta = lanes.load(tile + r * channels + u * W) - m[u];
              rest[u] += delta;
              squares[u] += delta * delta;
            }
          Moments* to = partial.get() + chunk * channels + c;
          const int64_t valid = std::min<int64_t>(U * W, channels - c);
          for (int64_t i = 0; i < valid; ++i)
            merge_tile<A>(to[i], row - first, m[i / W][i % W], rest[i / W][i % W], squares[i / W][i % W], n);
        });
      }
    }
  });
  parallel_for(0, channels, std::max<int64_t>(1, kGrain / chunks.count), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Moments total;
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        const int64_t before = chunk * chunks.rows;
        const Moments& part = partial[chunk * channels + c];
        total.merge(before, part.sum, part.m2, std::min(rows, before + chunks.rows) - before);
      }
      mean[c] = static_cast<A>(total.sum / rows);
      var[c] = static_cast<A>(total.m2 / rows);
    }
  });
}

template <class T>
void stats_planes(const T* x, const Dense& d, Acc<T>* mean, Acc<T>* var) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = kLanes<A>, kTile = 4096;
  parallel_for(0, d.c, std::max<int64_t>(1, kGrain / d.rows()), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Moments total;
      double count = 0;
      for (int64_t n = 0; n < d.n; ++n) {
        for (int64_t i = 0; i < d.s; i += kTile) {
          const T* tile = x + (n * d.c + c) * d.s + i;
          const int64_t size = std::min(kTile, d.s - i), whole = size / W * W;
          const Tail tail{static_cast<int>(size - whole)};
          V sums[4] = {};
          for (int64_t j = 0; j < whole; j += W) sums[j / W % 4] += load(tile + j);
          if (tail.n) sums[0] += tail.load(tile + whole);
          const A m = sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<A>(size);
          V rest[2] = {}, squares[2] = {};
          for (int64_t j = 0; j < whole; j += W) {
            const V delta = load(tile + j) - m;
            rest[j / W % 2] += delta;
            squares[j / W % 2] += delta * delta;
          }
          if (tail.n) {
            const V delta = keep<A>(tail.load(tile + whole) - m, tail);
            rest[0] += delta;
            squares[0] += delta * delta;
          }
          merge_tile<A>(total, count, m, sum<A>(rest[0] + rest[1]), sum<A>(squares[0] + squares[1]), size);
          count += size;
        }
      }
      mean[c] = static_cast<A>(total.sum / count);
      var[c] = static_cast<A>(total.m2 / count);
    }
  });
}

void bn_stats(const Tensor& x, const Tensor& mean, const Tensor& var) {
  const Dense d = dense(x, "x");
  check_channels(mean, d, "mean");
  check_channels(var, d, "var");
  FASTRES_CHECK(d.c == 0 || d.rows() > 0, "x has no values per channel, its shape is ", shape_of(x.sizes()));
  if (d.c == 0) return;
  dispatch(d.type, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    (d.nhwc ? stats_rows<T> : stats_planes<T>)(data<T>(x), d, mutable_data<A>(mean), mutable_data<A>(var));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) { m.impl("bn_stats", TORCH_BOX(&bn_stats)); }

}  // namespace fastres
