// Gradients of act(xhat * weight + bias + residual), xhat = (x - mean) * invstd, in two passes: the sums over
// a channel, and dz if that is wanted; then dx. dz = grad * act'(z); for ReLU its mask comes from `out` if that
// is given.
#include "activation.h"
#include "bn.h"
#include "channels.h"
#include "reduce.h"

namespace fastres {
namespace {

constexpr int64_t kReluFromOut = kActivations;

template <class T>
struct Inputs {
  const T *grad, *x, *residual, *out;
  T* dz_out;
  int64_t act;
  Acc<T> param;

  template <int64_t kAct, class Lanes>
  Vec<Acc<T>> dz(int64_t i, Lanes lanes, Vec<Acc<T>> value, Vec<Acc<T>> scale, Vec<Acc<T>> shift) const {
    using V = Vec<Acc<T>>;
    const V g = lanes.load(grad + i);
    if constexpr (kAct == kIdentity) return g;
    if constexpr (kAct == kReluFromOut) return lanes.load(out + i) <= 0 ? V{} : g;
    V z = value * scale + shift;
    if (residual) z += lanes.load(residual + i);
    return activate_backward<kAct, Acc<T>>(g, z, act, param);
  }
};

// A channel's numbers: z = x * scale + shift. The pointers are fetched once, each costs a call into LibTorch.
template <class A>
struct Channel {
  const A *mean, *invstd, *weight, *bias;
  A scale(int64_t c) const { return (weight ? weight[c] : A{1}) * invstd[c]; }
  A shift(int64_t c) const { return (bias ? bias[c] : A{0}) - mean[c] * scale(c); }
};

template <class T>
Inputs<T> inputs_of(const BnBackward& b, void* dz) {
  const auto at = [](const void* p) { return static_cast<const T*>(p); };
  return {at(b.grad), at(b.x), at(b.residual), at(b.out), static_cast<T*>(dz), b.act, static_cast<Acc<T>>(b.param)};
}

template <class A>
Channel<A> channel_of(const BnBackward& b) {
  const auto at = [](const void* p) { return static_cast<const A*>(p); };
  return {at(b.mean), at(b.invstd), at(b.weight), at(b.bias)};
}

template <class F>
void dispatch_act(const BnBackward& b, const F& f) {
  if (b.act == kRelu && b.out) return f(std::integral_constant<int64_t, kReluFromOut>{});
  dispatch_activation(b.act, f);
}

// Of all channels: the sums of dz, and of dz * (x - mean).
struct Sums {
  double *dy, *dy_x;
};

template <class T, int64_t kAct>
void reduce_rows(const Dense& d, const Inputs<T>& in, const ChannelTable<Acc<T>, 3>& table, Sums total) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int W = kLanes<A>;
  const int64_t channels = d.c, rows = d.rows();
  const Chunks chunks = chunks_of(d, 3 * sizeof(T));
  const int64_t part = chunks.count * channels;
  auto partial = std::make_unique<double[]>(2 * part);
  const int64_t grain = std::max<int64_t>(1, kGrain / (chunks.rows * channels));
  parallel_for(0, chunks.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * chunks.rows, stop = std::min(rows, first + chunks.rows);
      for (int64_t row = first; row < stop; row += chunks.tile) {
        const int64_t tile_stop = std::min(row + chunks.tile, stop);
        for_channel_blocks<A>(channels, [&](auto width, int64_t c, auto lanes) {
          constexpr int U = width();
          V mean[U], scale[U], shift[U], dy[U] = {}, dy_x[U] = {};
          for (int u = 0; u < U; ++u) {
            mean[u] = load(table[0] + c + u * W);
            scale[u] = load(table[1] + c + u * W);
            shift[u] = load(table[2] + c + u * W);
          }
          for (int64_t r = row; r < tile_stop; ++r)
            for (int u = 0; u < U; ++u) {
              const int64_t i = r * channels + c + u * W;
              const int64_t next = i + chunks.tile * channels;
              prefetch(in.grad + next, u);
              prefetch(in.x + next, u);
              if (kAct == kReluFromOut) prefetch(in.out + next, u);
              const V value = lanes.load(in.x + i);
              const V dz = in.template dz<kAct>(i, lanes, value, scale[u], shift[u]);
              if (in.dz_out) lanes.store(in.dz_out + i, dz);
              dy[u] += dz;
              dy_x[u] += dz * (value - mean[u]);
            }
          double* to = partial.get() + chunk * channels + c;
          const int64_t valid = std::min<int64_t>(U * W, channels - c);
          for (int64_t i = 0; i < valid; ++i) to[i] += lanes_of(dy)[i];
          for (int64_t i = 0; i < valid; ++i) to[part + i] += lanes_of(dy_x)[i];
        });
      }
    }
  });
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const double* from = partial.get() + chunk * channels;
    for (int64_t c = 0; c < channels; ++c) total.dy[c] += from[c];
    for (int64_t c = 0; c < channels; ++c) total.dy_x[c] += from[part + c];
  }
}

template <class T, int64_t kAct>
void reduce_planes(const Dense& d, const Inputs<T>& in, const ChannelTable<Acc<T>, 3>& table,
                   Sums total) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t kTile = 1024;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, d.rows()));
  parallel_for(0, d.c, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const V mean = splat(table[0][c]), scale = splat(table[1][c]), shift = splat(table[2][c]);
      for_plane_tiles(d, kTile, [&](int64_t first, int64_t last, int64_t from, int64_t to) {
        V dy[2] = {}, dy_x[2] = {};
        for (int64_t n = first; n < last; ++n) {
          const int64_t piece = (n * d.c + c) * d.s + from;
          for_vectors<2, A>(to - from, [&](int u, int64_t j, auto lanes) {
            const V value = lanes.load(in.x + piece + j);
            const V dz = in.template dz<kAct>(piece + j, lanes, value, scale, shift);
            if (in.dz_out) lanes.store(in.dz_out + piece + j, dz);
            dy[u] += keep<A>(dz, lanes);
            dy_x[u] += keep<A>(dz * (value - mean), lanes);
          });
        }
        total.dy[c] += sum<A>(dy[0] + dy[1]);
        total.dy_x[c] += sum<A>(dy_x[0] + dy_x[1]);
      });
    }
  });
}

BnBackward checked(const Tensor& grad, const Tensor& x, const Optional& residual, const Optional& out,
                   const Tensor& mean, const Tensor& invstd, const Optional& weight, const Optional& bias,
                   int64_t act, double act_param) {
  const Dense d = dense(grad, "grad");
  check_like(x, grad, d, "x");
  check_like(residual, grad, d, "residual");
  check_like(out, grad, d, "out");
  check_channels(mean, d, "mean");
  check_channels(invstd, d, "invstd");
  check_channels(weight, d, "weight");
  check_channels(bias, d, "bias");
  check_act(act);
  return {d,
          pointer(grad), pointer(x), pointer(residual), pointer(out),
          pointer(mean), pointer(invstd), pointer(weight), pointer(bias),
          act, act_param};
}

void bn_act_backward_reduce(const Tensor& grad, const Tensor& x, const Optional& residual,
                            const Optional& out, const Tensor& mean, const Tensor& invstd,
                            const Optional& weight, const Optional& bias, int64_t act, double act_param,
                            const Tensor& sum_dy, const Tensor& sum_dy_xhat, const Optional& grad_residual) {
  const BnBackward b = checked(grad, x, residual, out, mean, invstd, weight, bias, act, act_param);
  check_channels(sum_dy, b.d, "sum_dy");
  check_channels(sum_dy_xhat, b.d, "sum_dy_xhat");
  check_like(grad_residual, grad, b.d, "grad_residual");
  bn_reduce_pass(b, pointer(sum_dy), pointer(sum_dy_xhat), pointer(grad_residual));
}

void bn_act_backward(const Tensor& grad, const Tensor& x, const Optional& residual, const Optional& out,
                     const Tensor& mean, const Tensor& invstd, const Optional& weight, const Optional& bias,
                     int64_t act, double act_param, const Optional& mean_dy, const Optional& mean_dy_xhat,
                     const Tensor& grad_x, const Optional& grad_residual) {
  const BnBackward b = checked(grad, x, residual, out, mean, invstd, weight, bias, act, act_param);
  check_channels(mean_dy, b.d, "mean_dy");
  check_channels(mean_dy_xhat, b.d, "mean_dy_xhat");
  check_like(grad_x, grad, b.d, "grad_x");
  check_like(grad_residual, grad, b.d, "grad_residual");
  FASTRES_CHECK(mean_dy.has_value() == mean_dy_xhat.has_value(),
                "mean_dy and mean_dy_xhat go together, one is None");
  bn_dx_pass(b, pointer(mean_dy), pointer(mean_dy_xhat), pointer(grad_x), pointer(grad_residual));
}

}  // namespace

void bn_reduce_pass(const BnBackward& b, void* sum_dy, void* sum_dy_xhat, void* dz) {
  const Dense& d = b.d;
  if (d.c == 0) return;
  dispatch(d.type, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    ChannelTable<A, 3> table(d);
    const Channel<A> k = channel_of<A>(b);
    for (int64_t c = 0; c < d.c; ++c) table.set(c, {k.mean[c], k.scale(c), k.shift(c)});
    auto sums = std::make_unique<double[]>(2 * d.c);
    const Sums total{sums.get(), sums.get() + d.c};
    dispatch_act(b, [&](auto code) {
      (d.nhwc ? reduce_rows<T, code()> : reduce_planes<T, code()>)(d, inputs_of<T>(b, dz), table, total);
    });
    A *dy = static_cast<A*>(sum_dy), *dy_xhat = static_cast<A*>(sum_dy_xhat);
    for (int64_t c = 0; c < d.c; ++c) {
      dy[c] = static_cast<A>(total.dy[c]);
      dy_xhat[c] = static_cast<A>(total.dy_x[c] * k.invstd[c]);
    }
  });
}

// dx = scale * (dz - mean_dy - xhat * mean_dy_xhat); without means (constant statistics) scale * dz.
void bn_dx_pass(const BnBackward& b, const void* mean_dy, const void* mean_dy_xhat, void* grad_x, void* dz) {
  const Dense& d = b.d;
  dispatch(d.type, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    ChannelTable<A, 5> table(d);
    const Channel<A> channel = channel_of<A>(b);
    const A *dy = static_cast<const A*>(mean_dy), *dy_xhat = static_cast<const A*>(mean_dy_xhat);
    for (int64_t c = 0; c < d.c; ++c) {
      table.set(c, {channel.mean[c], channel.scale(c), channel.shift(c), dy ? dy[c] : A{0},
                    dy ? dy_xhat[c] * channel.invstd[c] : A{0}});
    }
    const Inputs<T> in = inputs_of<T>(b, dz);
    T* gx = static_cast<T*>(grad_x);
    const bool centred = mean_dy != nullptr;
    dispatch_act(b, [&](auto code) {
      map_channels<T>(d, table, [=](int64_t i, const auto& k, auto lanes) {
        Vec<A> value = {};
        if (centred || (code() != kIdentity && code() != kReluFromOut)) value = lanes.load(in.x + i);
        const Vec<A> dz = in.template dz<code()>(i, lanes, value, k[1], k[2]);
        if (in.dz_out) lanes.store(in.dz_out + i, dz);
        lanes.store(gx + i, centred ? k[1] * ((dz - k[3]) - (value - k[0]) * k[4]) : k[1] * dz);
      });
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) {
  m.impl("bn_act_backward_reduce", TORCH_BOX(&bn_act_backward_reduce));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward));
}

}  // namespace fastres
