// out = max(a + b, 0), and its gradient.
#include "tensor.h"

namespace fastres {
namespace {

// f(offset, lanes) for every vector of a dense tensor.
template <class T, class F>
void map(int64_t numel, const F& f) {
  constexpr int64_t W = kLanes<Acc<T>>;
  const int64_t whole = numel / W;
  parallel_for(0, whole, kGrain / W, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * W; i < end * W; i += W) f(i, Full{});
  });
  if (whole * W < numel) f(whole * W, Tail{static_cast<int>(numel - whole * W)});
}

void add_relu(const Tensor& a, const Tensor& b, const Tensor& out) {
  const Dense d = dense(a, "a");
  check_like(b, a, d, "b");
  check_like(out, a, d, "out");
  dispatch(d.type, [&](auto t) {
    using T = decltype(t);
    const T *pa = data<T>(a), *pb = data<T>(b);
    T* po = mutable_data<T>(out);
    map<T>(d.numel(), [=](int64_t i, auto lanes) {
      lanes.store(po + i, relu<Acc<T>>(lanes.load(pa + i) + lanes.load(pb + i)));
    });
  });
}

void add_relu_backward(const Tensor& grad, const Tensor& out, const Tensor& grad_in) {
  const Dense d = dense(grad, "grad");
  check_like(out, grad, d, "out");
  check_like(grad_in, grad, d, "grad_in");
  dispatch(d.type, [&](auto t) {
    using T = decltype(t);
    const T *pg = data<T>(grad), *po = data<T>(out);
    T* pi = mutable_data<T>(grad_in);
    map<T>(d.numel(), [=](int64_t i, auto lanes) {
      const Vec<Acc<T>> zero = {};
      // As PyTorch's threshold_backward: a NaN output lets the gradient through.
      lanes.store(pi + i, lanes.load(po + i) <= 0 ? zero : lanes.load(pg + i));
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) {
  m.impl("add_relu", TORCH_BOX(&add_relu));
  m.impl("add_relu_backward", TORCH_BOX(&add_relu_backward));
}

}  // namespace fastres
