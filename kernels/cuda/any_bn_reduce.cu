// The reducing passes: mean and variance of every channel, and the two sums of the backward pass, which also writes dz,
// the gradient of the residual, where that is asked for.
//
// Two stages, every sum in an order that depends on the shape alone: the same bits every time, on every GPU. Variance
// by Welford's recurrence in each thread, then merged pairwise (Chan, Golub, LeVeque 1983): no cancellation where the
// mean is large against the deviation.
#include "any_bn_act.cuh"

namespace fastres {
namespace {

template <class A>
struct Moments {
  A n = 0, mean = 0, m2 = 0;
  FASTRES_DEVICE void add(A x, A inverse_n) {
    const A delta = x - mean;
    mean += delta * inverse_n;
    m2 += delta * (x - mean);
  }
  FASTRES_DEVICE void merge(const Moments& o) {
    if (o.n == A(0)) return;
    const A total = n + o.n, delta = o.mean - mean, part = o.n / total;
    mean += delta * part;
    m2 += o.m2 + delta * delta * n * part;
    n = total;
  }
};

template <class A>
struct Sums {
  A dy = 0, dy_x = 0, unused = 0;
  FASTRES_DEVICE void merge(const Sums& o) { dy += o.dy, dy_x += o.dy_x; }
};

// items[r * groups + g] for r < count → items[g], pairwise; all threads of the block.
template <class Item>
FASTRES_DEVICE void merge_rows(Item* items, int count, int groups) {
  int span = 1;
  while (span < count) span *= 2;
  for (span /= 2; span > 0; span /= 2) {
    ptx::sync_threads();
    for (int i = threadIdx.x; i < span * groups; i += blockDim.x)
      if (i + span * groups < count * groups) items[i].merge(items[i + span * groups]);
  }
  ptx::sync_threads();
}

template <class T, int V, bool kStats, bool kGeneral>
__global__ void __launch_bounds__(kBnThreads) bn_reduce_kernel(const __grid_constant__ BnAct p) {
  using A = Acc<T>;
  using Item = std::conditional_t<kStats, Moments<A>, Sums<A>>;
  Item* shared = reinterpret_cast<Item*>(ptx::dynamic_shared());
  const int per_block = p.nhwc ? kBnThreads / p.width : kBnThreads;
  const int place = p.nhwc ? threadIdx.x / p.width : threadIdx.x;  // among the threads of the same channels
  const int64_t col = static_cast<int64_t>(blockIdx.y) * p.width + threadIdx.x % p.width;
  const bool active = p.nhwc ? place < per_block && col < p.cols : true;
  // NHWC: items are rows at this thread's column. NCHW: items are vectors of channel blockIdx.y in all images.
  const int64_t count = p.nhwc ? p.rows : p.n * p.cols;
  const int64_t step = static_cast<int64_t>(gridDim.x) * per_block;

  Item item[V];
  Backward<A> b[V];
  if (!kStats && active) {
#pragma unroll
    for (int j = 0; j < V; ++j) b[j] = Backward<A>::load(p, p.nhwc ? col * V + j : blockIdx.y);
  }
  int seen = 0;
  if (active) {
    for (int64_t i = blockIdx.x * static_cast<int64_t>(per_block) + place; i < count; i += step) {
      int64_t offset;
      if (p.nhwc) {
        offset = (i * p.cols + col) * V;
      } else {
        const int64_t image = i / p.cols;
        offset = ((image * p.c + blockIdx.y) * p.cols + (i - image * p.cols)) * V;
      }
      const Pack<T, V> x = load<T, V>(static_cast<const T*>(p.x) + offset);
      if constexpr (kStats) {
        const A inverse = A(1) / static_cast<A>(++seen);
#pragma unroll
        for (int j = 0; j < V; ++j) item[j].add(widen(x.v[j]), inverse);
      } else {
        const Pack<T, V> grad = load<T, V>(static_cast<const T*>(p.grad) + offset);
        const Pack<T, V> out = load_if<T, V>(p.saved_out, reads_out(p), offset);
        const Pack<T, V> residual = load_if<T, V>(p.residual, reads_residual(p), offset);
        Pack<T, V> dr;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const A value = widen(x.v[j]);
          const A dz = slope_times<kGeneral, A>(p, widen(grad.v[j]), value, widen(residual.v[j]), widen(out.v[j]),
                                                b[j]);
          dr.v[j] = narrow<T>(dz);
          item[j].dy += dz;
          item[j].dy_x += dz * (value - b[j].mean);
        }
        if (p.grad_residual) store<T, V>(static_cast<T*>(p.grad_residual) + offset, dr);
      }
    }
  }
  if constexpr (kStats) {
#pragma unroll
    for (int j = 0; j < V; ++j) item[j].n = static_cast<A>(seen);
  }

  // NHWC: groups are the block's channels. NCHW: one group, a thread's V lanes merged first.
  int groups = 1;
  if (p.nhwc) {
    groups = p.width * V;
    if (place < per_block) {
#pragma unroll
      for (int j = 0; j < V; ++j) shared[place * groups + threadIdx.x % p.width * V + j] = item[j];
    }
  } else {
#pragma unroll
    for (int j = 1; j < V; ++j) item[0].merge(item[j]);
    shared[place] = item[0];
  }
  merge_rows(shared, per_block, groups);
  Item* partial = static_cast<Item*>(p.partial) + static_cast<int64_t>(blockIdx.x) * p.c;
  for (int g = threadIdx.x; g < groups; g += kBnThreads) {
    const int64_t c = p.nhwc ? static_cast<int64_t>(blockIdx.y) * groups + g : blockIdx.y;
    if (c < p.c) partial[c] = shared[g];
  }
}

constexpr int kFinishChannels = 8;  // a block, 32 threads each: rows of 96 bytes, few dependent steps
constexpr int kFinishThreads = kBnThreads / kFinishChannels;

// A block merges its part (blockIdx.y) of the chunks; where there are several, its result is a chunk of `merged`.
template <class A, bool kStats>
__global__ void __launch_bounds__(kBnThreads) bn_reduce_finish_kernel(const __grid_constant__ BnAct p) {
  using Item = std::conditional_t<kStats, Moments<A>, Sums<A>>;
  ptx::let_successor_start();
  ptx::wait_for_predecessor();
  Item* shared = reinterpret_cast<Item*>(ptx::dynamic_shared());
  const Item* partial = static_cast<const Item*>(p.partial);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kFinishChannels + threadIdx.x % kFinishChannels;
  const int begin = static_cast<int>(static_cast<int64_t>(p.chunks) * blockIdx.y / gridDim.y);
  const int end = static_cast<int>(static_cast<int64_t>(p.chunks) * (blockIdx.y + 1) / gridDim.y);
  Item item;
  if (c < p.c) {
#pragma unroll 4
    for (int i = begin + threadIdx.x / kFinishChannels; i < end; i += kFinishThreads) item.merge(partial[i * p.c + c]);
  }
  shared[threadIdx.x] = item;
  merge_rows(shared, kFinishThreads, kFinishChannels);
  if (threadIdx.x >= kFinishChannels || c >= p.c) return;
  const Item& total = shared[threadIdx.x];
  if (p.merged) {
    static_cast<Item*>(p.merged)[blockIdx.y * p.c + c] = total;
  } else if constexpr (kStats) {
    const A var = total.m2 / total.n;
    static_cast<A*>(p.result0)[c] = total.mean;
    static_cast<A*>(p.result1)[c] = var;
    if (p.finalize.invstd) finalize(p.finalize, c, total.mean, var);
  } else {
    const A dy_xhat = total.dy_x * static_cast<const A*>(p.invstd)[c];
    static_cast<A*>(p.result0)[c] = total.dy;
    static_cast<A*>(p.result1)[c] = dy_xhat;
    if (p.mean_dy) {
      const A count = static_cast<A>(p.n * p.s);
      static_cast<A*>(p.mean_dy)[c] = total.dy / count;
      static_cast<A*>(p.mean_dy_xhat)[c] = dy_xhat / count;
    }
  }
}

Shape finish_shape(int64_t c, size_t item, int parts = 1) {
  return {dim3(static_cast<unsigned>(ceil_div(c, kFinishChannels)), static_cast<unsigned>(parts)), kBnThreads,
          static_cast<unsigned>(kBnThreads * item)};
}

template <class T>
Record typed(BnAct p, BnPass pass) {
  using A = Acc<T>;
  const int v = vector_size<T>(p);
  set_view(p, v);
  const int64_t columns = p.nhwc ? ceil_div(p.cols, p.width) : p.c;
  const int64_t per_block = p.nhwc ? kBnThreads / p.width : kBnThreads;
  const int64_t items = p.nhwc ? p.rows : p.n * p.cols;
  // At least 8 items a thread, and no more blocks than fill a large GPU.
  int64_t chunks = ceil_div(items, per_block * 8);
  const int64_t most = 2 * kMaxChunks / columns;
  if (chunks > most) chunks = most;
  if (chunks > kMaxChunks) chunks = kMaxChunks;
  p.chunks = static_cast<int>(chunks < 1 ? 1 : chunks);
  const char* name = pass == BnPass::kStats || pass == BnPass::kStatsFinish ? "bn_stats" : "bn_act_backward_reduce";
  const Shape shape{dim3(static_cast<unsigned>(p.chunks), static_cast<unsigned>(columns)), kBnThreads,
                    static_cast<unsigned>(kBnThreads * v * sizeof(Moments<A>))};
  const Shape finish = finish_shape(p.c, sizeof(Moments<A>));
  constexpr int V = kPer16Bytes<T>;
  switch (pass) {
    case BnPass::kStats:
      return make_record(v == 1 ? bn_reduce_kernel<T, 1, true, false> : bn_reduce_kernel<T, V, true, false>, shape, p,
                         name);
    case BnPass::kStatsFinish: return make_record(bn_reduce_finish_kernel<A, true>, finish, p, name);
    case BnPass::kBackwardReduce:
      if (v == 1) return make_record(bn_reduce_kernel<T, 1, false, true>, shape, p, name);
      return make_record(is_plain(p.act) ? bn_reduce_kernel<T, V, false, false> : bn_reduce_kernel<T, V, false, true>,
                         shape, p, name);
    default: return make_record(bn_reduce_finish_kernel<A, false>, finish, p, name);
  }
}

}  // namespace

Record bn_reduce_record(const BnAct& p, Type type, BnPass pass) {
  switch (type) {
    case Type::kBf16: return typed<bf16>(p, pass);
    case Type::kFp16: return typed<fp16>(p, pass);
    case Type::kFp32: return typed<float>(p, pass);
    default: return typed<double>(p, pass);
  }
}

int merge_moments_records(const MergeMoments& m, Record* records) {
  BnAct p{};
  p.c = m.c, p.chunks = m.chunks, p.partial = m.partial, p.result0 = m.mean, p.result1 = m.var;
  int count = 0;
  const auto add = [&](int parts) {
    const Shape shape = finish_shape(m.c, sizeof(Moments<float>), parts);
    allow_overlap(records[count++] = make_record(bn_reduce_finish_kernel<float, true>, shape, p, "merge_moments"));
  };
  if (const int parts = moments_parts(m.chunks)) {
    p.merged = m.merged;
    add(parts);
    p.chunks = parts, p.partial = m.merged, p.merged = nullptr;
  }
  add(1);
  return count;
}

}  // namespace fastres
