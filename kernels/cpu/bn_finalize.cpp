// What follows the batch's statistics, for all channels at once: invstd = 1 / sqrt(var + eps),
// scale = weight * invstd, shift = bias - mean * scale, and the running statistics.
#include <cmath>

#include "bn.h"

namespace fastres {
namespace {

template <class A, class R>
struct Vectors {
  const A *mean, *var, *weight, *bias;
  R *running_mean, *running_var;
  A *invstd, *scale, *shift;
};

template <class A, class R>
void finalize(const Vectors<A, R>& v, int64_t channels, A momentum, A eps, A unbiased) {
  for (int64_t c = 0; c < channels; ++c) {
    const A invstd = 1 / std::sqrt(v.var[c] + eps);
    const A scale = (v.weight ? v.weight[c] : A{1}) * invstd;
    v.invstd[c] = invstd;
    v.scale[c] = scale;
    v.shift[c] = (v.bias ? v.bias[c] : A{0}) - v.mean[c] * scale;
  }
  if (!v.running_mean) return;
  for (int64_t c = 0; c < channels; ++c) {
    const A mean = static_cast<A>(v.running_mean[c]), var = static_cast<A>(v.running_var[c]);
    v.running_mean[c] = static_cast<R>(mean + momentum * (v.mean[c] - mean));
    v.running_var[c] = static_cast<R>(var + momentum * (v.var[c] * unbiased - var));
  }
}

void bn_finalize(const Tensor& mean, const Tensor& var, const Optional& weight, const Optional& bias,
                 const Optional& running_mean, const Optional& running_var, double momentum, double eps,
                 int64_t count, const Tensor& invstd, const Tensor& scale, const Tensor& shift) {
  FASTRES_CHECK(mean.sizes().size() == 1, "mean must be a vector, it has the shape ", shape_of(mean.sizes()));
  const Dense d{mean.scalar_type(), 1, mean.sizes()[0]};
  FASTRES_CHECK_TYPE(acc_type(d.type) == d.type, "mean must be float32 or float64, it is ", name_of(d.type));
  for (const auto& [t, name] : {std::pair{&mean, "mean"}, {&var, "var"}, {&invstd, "invstd"},
                                {&scale, "scale"}, {&shift, "shift"}})
    check_channels(*t, d, name);
  check_channels(weight, d, "weight");
  check_channels(bias, d, "bias");
  FASTRES_CHECK(running_mean.has_value() == running_var.has_value(),
                "running_mean and running_var go together, one is None");
  const ScalarType running = running_mean ? running_mean->scalar_type() : d.type;
  for (const auto* t : {&running_mean, &running_var}) {
    if (!*t) continue;
    FASTRES_CHECK((*t)->is_cpu() && (*t)->sizes().size() == 1 && (*t)->sizes()[0] == d.c &&
                      (d.c <= 1 || (*t)->strides()[0] == 1),
                  "running statistics must be contiguous CPU vectors of ", d.c, " channels");
    FASTRES_CHECK_TYPE((*t)->scalar_type() == running, "running_var is ", name_of((*t)->scalar_type()),
                       ", expected ", name_of(running));
  }
  bn_finalize_pass(d.type, d.c,
                   {pointer(mean), pointer(var), pointer(weight), pointer(bias), pointer(running_mean),
                    pointer(running_var), running, momentum, eps, count, pointer(invstd), pointer(scale),
                    pointer(shift)});
}

}  // namespace

void bn_finalize_pass(ScalarType type, int64_t channels, const BnFinalize& p) {
  const double unbiased = static_cast<double>(p.count) / static_cast<double>(p.count - 1);
  const auto run = [&](auto a, auto r) {
    using A = decltype(a);
    using R = decltype(r);
    const auto in = [](const void* v) { return static_cast<const A*>(v); };
    const auto out = [](void* v) { return static_cast<A*>(v); };
    const auto running = [](void* v) { return static_cast<R*>(v); };
    finalize<A, R>({in(p.mean), in(p.var), in(p.weight), in(p.bias), running(p.running_mean),
                    running(p.running_var), out(p.invstd), out(p.scale), out(p.shift)},
                   channels, static_cast<A>(p.momentum), static_cast<A>(p.eps), static_cast<A>(unbiased));
  };
  dispatch(p.running, [&](auto r) { type == ScalarType::Double ? run(double{}, r) : run(float{}, r); });
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) { m.impl("bn_finalize", TORCH_BOX(&bn_finalize)); }

}  // namespace fastres
