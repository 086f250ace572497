// out = act(x * scale[c] + shift[c] + residual)
#include "activation.h"
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
  FASTRES_CHECK(act >= 0 && act < kActivations, "act is ", act, ", it takes 0 to ", kActivations - 1);
  dispatch(d.type, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    const T *px = data<T>(x), *pr = data<T>(residual);
    T* po = mutable_data<T>(out);
    ChannelTable<A, 2> table(d);
    const A *k = data<A>(scale), *b = data<A>(shift);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) { m.impl("bn_act", TORCH_BOX(&bn_act)); }

}  // namespace fastres
