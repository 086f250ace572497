// Mean and biased variance per channel. A tile is summed as deviations from the mean of the tiles before it
// (the first one from its own mean, for which it is read twice); tiles and chunks are merged by Chan, Golub
// and LeVeque (1983), in fp64. However far a tile's mean is from that of those before it, the error of its
// sum of squares is small against what this distance itself adds to the whole.
#include "bn.h"
#include "reduce.h"

namespace fastres {
namespace {

// Sums and sums of squared deviations of some channels. Sums are kept, not means: an infinity stays one.
struct Moments {
  double *sum, *m2;
};

// Merge `fresh` numbers a channel into the `count` that are there, `channels` times.
inline void merge(Moments to, Moments from, double count, double fresh, int64_t channels) {
  const double per_count = count > 0 ? 1 / count : 0, per_fresh = 1 / fresh;
  const double weight = count * fresh / (count + fresh);
  for (int64_t i = 0; i < channels; ++i) {
    const double delta = from.sum[i] * per_fresh - to.sum[i] * per_count;
    to.m2[i] += from.m2[i] + (count > 0 ? delta * delta * weight : 0);
    to.sum[i] += from.sum[i];
  }
}

// A tile's moments from some number close to its mean, and the sums of (x - number) and (x - number)^2.
template <class A>
inline void moments_of(Moments to, const A* number, const A* rest, const A* squares, double n,
                       int64_t channels) {
  for (int64_t i = 0; i < channels; ++i) {
    const double m = number[i], correction = std::abs(m) <= std::numeric_limits<A>::max() ? rest[i] : 0;
    to.sum[i] = m * n + correction;
    to.m2[i] = squares[i] - correction * correction / n;
  }
}

// The mean of `count` numbers as what later ones are measured from; an infinity would swallow them.
template <class A>
inline A origin(double sum, double count) {
  const A mean = static_cast<A>(sum / count);
  return std::abs(mean) <= std::numeric_limits<A>::max() ? mean : A{0};
}

template <class T>
void stats_rows(const T* x, const Dense& d, Acc<T>* mean, Acc<T>* var) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int W = kLanes<A>;
  const int64_t channels = d.c, rows = d.rows();
  const Chunks chunks = chunks_of(d, sizeof(T));
  const int64_t part = chunks.count * channels;
  auto partial = std::make_unique<double[]>(2 * part);
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
          const int64_t valid = std::min<int64_t>(U * W, channels - c);
          double* to = partial.get() + chunk * channels + c;
          if (row == first) {
            for (int64_t r = 0; r < n; ++r)
              for (int u = 0; u < U; ++u) m[u] += lanes.load(tile + r * channels + u * W);
            for (int u = 0; u < U; ++u) m[u] *= 1 / static_cast<A>(n);
          } else {
            A before[U * W] = {};
            for (int64_t i = 0; i < valid; ++i) before[i] = origin<A>(to[i], row - first);
            for (int u = 0; u < U; ++u) m[u] = load(before + u * W);
          }
          for (int64_t r = 0; r < n; ++r)
            for (int u = 0; u < U; ++u) {
              const T* at = tile + r * channels + u * W;
              prefetch(at + chunks.tile * channels, u);
              const V delta = lanes.load(at) - m[u];
              rest[u] += delta;
              squares[u] += delta * delta;
            }
          double sums[U * W], m2[U * W];
          moments_of(Moments{sums, m2}, lanes_of(m), lanes_of(rest), lanes_of(squares), n, U * W);
          merge({to, to + part}, {sums, m2}, row - first, n, valid);
        });
      }
    }
  });
  const Moments total{partial.get(), partial.get() + part};
  for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
    const int64_t before = chunk * chunks.rows, c = chunk * channels;
    merge(total, {total.sum + c, total.m2 + c}, before, std::min(rows - before, chunks.rows), channels);
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<A>(total.sum[c] / rows);
    var[c] = static_cast<A>(total.m2[c] / rows);
  }
}

template <class T>
void stats_planes(const T* x, const Dense& d, Acc<T>* mean, Acc<T>* var) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t kTile = 4096;
  const int64_t grain = std::max<int64_t>(1, kGrain / d.rows());
  parallel_for(0, d.c, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double sums = 0, m2 = 0, count = 0;
      for_plane_tiles(d, kTile, [&](int64_t first, int64_t last, int64_t from, int64_t to) {
        const int64_t length = to - from;
        const double size = static_cast<double>((last - first) * length);
        V parts[4] = {}, rests[4] = {}, squared[4] = {};
        const auto each = [&](const auto& f) {
          for (int64_t n = first; n < last; ++n) {
            const T* piece = x + (n * d.c + c) * d.s + from;
            for_vectors<4, A>(length,
                              [&](int u, int64_t i, auto lanes) { f(u, lanes.load(piece + i), lanes); });
          }
        };
        const auto total = [](const V(&v)[4]) { return sum<A>((v[0] + v[1]) + (v[2] + v[3])); };
        A m;
        if (count > 0) {
          m = origin<A>(sums, count);
        } else {
          each([&](int u, V v, auto) { parts[u] += v; });
          m = total(parts) / static_cast<A>(size);
        }
        each([&](int u, V v, auto lanes) {
          const V delta = keep<A>(v - m, lanes);
          rests[u] += delta;
          squared[u] += delta * delta;
        });
        const A rest = total(rests), squares = total(squared);
        double tile_sum, tile_m2;
        moments_of(Moments{&tile_sum, &tile_m2}, &m, &rest, &squares, size, 1);
        merge({&sums, &m2}, {&tile_sum, &tile_m2}, count, size, 1);
        count += size;
      });
      mean[c] = static_cast<A>(sums / count);
      var[c] = static_cast<A>(m2 / count);
    }
  });
}

void bn_stats(const Tensor& x, const Tensor& mean, const Tensor& var) {
  const Dense d = dense(x, "x");
  check_channels(mean, d, "mean");
  check_channels(var, d, "var");
  FASTRES_CHECK(d.c == 0 || d.rows() > 0, "x has no values per channel, its shape is ", shape_of(x.sizes()));
  bn_stats_pass(d, pointer(x), pointer(mean), pointer(var));
}

}  // namespace

void bn_stats_pass(const Dense& d, const void* x, void* mean, void* var) {
  if (d.c == 0) return;
  dispatch(d.type, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    (d.nhwc ? stats_rows<T> : stats_planes<T>)(static_cast<const T*>(x), d, static_cast<A*>(mean),
                                               static_cast<A*>(var));
  });
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) { m.impl("bn_stats", TORCH_BOX(&bn_stats)); }

}  // namespace fastres
