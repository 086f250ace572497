// The element-wise passes: out = act(x * scale[c] + shift[c] + residual), and its gradient.
#include "any_bn_act.cuh"

namespace fastres {
namespace {

// Blocks that fill any GPU several times over, so that a thread's per-channel constants serve many rows.
constexpr int64_t kBlocks = 2048;

template <class T, int V, bool kGeneral>
__global__ void __launch_bounds__(kBnThreads) bn_act_kernel(const __grid_constant__ BnAct p) {
  using A = Acc<T>;
  constexpr int U = kGeneral ? 1 : 4;
  const int per_block = kBnThreads / p.width;
  const int row_in_block = threadIdx.x / p.width;
  const int64_t col = static_cast<int64_t>(blockIdx.y) * p.width + threadIdx.x % p.width;
  if (row_in_block >= per_block || col >= p.cols) return;
  const A* scale = static_cast<const A*>(p.scale);
  const A* shift = static_cast<const A*>(p.shift);
  const int64_t step = static_cast<int64_t>(gridDim.x) * per_block;
  A a[V], b[V];
  if (p.nhwc) {
#pragma unroll
    for (int j = 0; j < V; ++j) a[j] = scale[col * V + j], b[j] = shift[col * V + j];
  }
  for (int64_t row = blockIdx.x * static_cast<int64_t>(per_block) + row_in_block; row < p.rows; row += U * step) {
    Pack<T, V> x[U], residual[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (row + u * step >= p.rows) continue;
      const int64_t i = ((row + u * step) * p.cols + col) * V;
      x[u] = load<T, V>(static_cast<const T*>(p.x) + i);
      residual[u] = load_if<T, V>(p.residual, p.residual != nullptr, i);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t r = row + u * step;
      if (r >= p.rows) continue;
      if (!p.nhwc) {
        const int64_t c = r % p.c;
#pragma unroll
        for (int j = 0; j < V; ++j) a[j] = scale[c], b[j] = shift[c];
      }
      Pack<T, V> y;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        A z = widen(x[u].v[j]) * a[j] + b[j];
        if (p.residual) z += widen(residual[u].v[j]);
        y.v[j] = narrow<T>(activate_if<kGeneral>(p.act, z, static_cast<A>(p.act_param)));
      }
      store<T, V>(static_cast<T*>(p.out) + (r * p.cols + col) * V, y);
    }
  }
}

// dx = weight * invstd * ((dz - mean_dy) - xhat * mean_dy_xhat), the means being 0 for given statistics.
template <class T, int V, bool kGeneral>
__global__ void __launch_bounds__(kBnThreads) bn_act_backward_kernel(const __grid_constant__ BnAct p) {
  using A = Acc<T>;
  constexpr int U = kGeneral ? 1 : 2;
  const int per_block = kBnThreads / p.width;
  const int row_in_block = threadIdx.x / p.width;
  const int64_t col = static_cast<int64_t>(blockIdx.y) * p.width + threadIdx.x % p.width;
  if (row_in_block >= per_block || col >= p.cols) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * per_block;
  const bool batch_stats = p.mean_dy != nullptr;
  const bool reads_x = p.x && (batch_stats || recomputes(p));
  Backward<A> b[V];
  A mean_dy[V], slope[V];  // slope: of dx / scale against x - mean
  const auto constants = [&](int j, int64_t c) {
    b[j] = Backward<A>::load(p, c);
    mean_dy[j] = batch_stats ? static_cast<const A*>(p.mean_dy)[c] : A(0);
    slope[j] = batch_stats ? b[j].invstd * static_cast<const A*>(p.mean_dy_xhat)[c] : A(0);
  };
  if (p.nhwc) {
#pragma unroll
    for (int j = 0; j < V; ++j) constants(j, col * V + j);
  }
  for (int64_t row = blockIdx.x * static_cast<int64_t>(per_block) + row_in_block; row < p.rows; row += U * step) {
    Pack<T, V> grad[U], x[U], out[U], residual[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (row + u * step >= p.rows) continue;
      const int64_t i = ((row + u * step) * p.cols + col) * V;
      grad[u] = load<T, V>(static_cast<const T*>(p.grad) + i);
      x[u] = load_if<T, V>(p.x, reads_x, i);
      out[u] = load_if<T, V>(p.saved_out, reads_out(p), i);
      residual[u] = load_if<T, V>(p.residual, reads_residual(p), i);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t r = row + u * step;
      if (r >= p.rows) continue;
      if (!p.nhwc) {
        constants(0, r % p.c);
#pragma unroll
        for (int j = 1; j < V; ++j) b[j] = b[0], mean_dy[j] = mean_dy[0], slope[j] = slope[0];
      }
      Pack<T, V> dx, dr;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A value = widen(x[u].v[j]);
        const A dz = slope_times<kGeneral, A>(p, widen(grad[u].v[j]), value, widen(residual[u].v[j]),
                                              widen(out[u].v[j]), b[j]);
        dr.v[j] = narrow<T>(dz);
        const A centred = batch_stats ? (value - b[j].mean) * slope[j] : A(0);
        dx.v[j] = narrow<T>(b[j].scale * ((dz - mean_dy[j]) - centred));
      }
      const int64_t i = (r * p.cols + col) * V;
      store<T, V>(static_cast<T*>(p.out) + i, dx);
      if (p.grad_residual) store<T, V>(static_cast<T*>(p.grad_residual) + i, dr);
    }
  }
}

template <class T>
Record typed(BnAct p, BnPass pass) {
  const int v = vector_size<T>(p);
  set_view(p, v);
  const int64_t columns = ceil_div(p.cols, p.width), per_block = kBnThreads / p.width;
  int64_t blocks = ceil_div(p.rows, per_block);
  if (blocks > kBlocks / columns) blocks = kBlocks / columns > 1 ? kBlocks / columns : 1;
  const Shape shape{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(columns)), kBnThreads};
  constexpr int V = kPer16Bytes<T>;
  const bool plain = is_plain(p.act);
  if (pass == BnPass::kForward) {
    if (v == 1) return make_record(bn_act_kernel<T, 1, true>, shape, p, "bn_act");
    return make_record(plain ? bn_act_kernel<T, V, false> : bn_act_kernel<T, V, true>, shape, p, "bn_act");
  }
  if (v == 1) return make_record(bn_act_backward_kernel<T, 1, true>, shape, p, "bn_act_backward");
  return make_record(plain ? bn_act_backward_kernel<T, V, false> : bn_act_backward_kernel<T, V, true>, shape, p,
                     "bn_act_backward");
}

template <class A>
__global__ void __launch_bounds__(kBnThreads) bn_finalize_kernel(const __grid_constant__ BnFinalize p) {
  const int c = blockIdx.x * kBnThreads + threadIdx.x;
  if (c < p.c) finalize(p, c, static_cast<const A*>(p.mean)[c], static_cast<const A*>(p.var)[c]);
}

}  // namespace

Record bn_act_record(const BnAct& p, Type type, BnPass pass) {
  switch (type) {
    case Type::kBf16: return typed<bf16>(p, pass);
    case Type::kFp16: return typed<fp16>(p, pass);
    case Type::kFp32: return typed<float>(p, pass);
    default: return typed<double>(p, pass);
  }
}

Record bn_finalize_record(const BnFinalize& p, Type type) {
  const Shape shape{dim3(static_cast<unsigned>(ceil_div(p.c, kBnThreads))), kBnThreads};
  return make_record(type == Type::kFp64 ? bn_finalize_kernel<double> : bn_finalize_kernel<float>, shape, p,
                     "bn_finalize");
}

}  // namespace fastres
