// out = act(x * scale[c] + shift[c] + residual)
#include "activation.h"
#include "bn.h"
#include "channels.h"

namespace fastres {
namespace {

void bn_act(const Tensor& x, const Optional& residual, const Tensor& scale, const Tensor& shift, int64_t act,
            double act_param, const Tensor& out) {
  const Dense d = dense(x, "x");
  check_like(residual, x, d, "residual");
  check_channels(scale, d, "scale");
  check_channels(shift, d, "shift");
  check_like(out, x, d, "out");
  check_act(act);
  bn_act_pass(d, pointer(x), pointer(residual), pointer(scale), pointer(shift), act, act_param, pointer(out));
}

}  // namespace

void bn_act_pass(const Dense& d, const void* x, const void* residual, const void* scale, const void* shift,
                 int64_t act, double act_param, void* out) {
  dispatch(d.type, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    const T *px = static_cast<const T*>(x), *pr = static_cast<const T*>(residual);
    T* po = static_cast<T*>(out);
    ChannelTable<A, 2> table(d);
    const A *k = static_cast<const A*>(scale), *b = static_cast<const A*>(shift);
    for (int64_t c = 0; c < d.c; ++c) table.set(c, {k[c], b[c]});
    const A param = static_cast<A>(act_param);
    dispatch_activation(act, [&](auto code) {
      map_channels<T>(d, table, [=](int64_t i, const auto& numbers, auto lanes) {
        Vec<A> z = lanes.load(px + i) * numbers[0] + numbers[1];
        if (pr) z += lanes.load(pr + i);
        lanes.store(po + i, activate<code(), A>(z, act, param));
      });
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) { m.impl("bn_act", TORCH_BOX(&bn_act)); }

}  // namespace fastres
