// bn_act's forward and its gradients, each a whole in one call: on small tensors calls are what costs. They
// return no tensors at all where an argument is not as the passes take it (another memory order, another type,
// no values); then nothing has been written, and the caller converts or refuses it by name.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <vector>

#include "bn.h"

namespace fastres {
namespace {

bool takes(const Tensor& x) {
  if (!x.is_cpu() || x.numel() == 0) return false;
  switch (x.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half: break;
    default: return false;
  }
  // channels_last is what PyTorch calls so: images and volumes
  const size_t rank = x.sizes().size();
  return rank >= 2 && (is_dense(x, false) || ((rank == 4 || rank == 5) && is_dense(x, true)));
}

bool is_like(const Optional& t, const Tensor& x, const Dense& d) {
  if (!t) return true;
  if (!t->is_cpu() || t->scalar_type() != d.type) return false;
  const auto got = t->sizes(), want = x.sizes();
  if (got.size() != want.size()) return false;
  for (size_t i = 0; i < got.size(); ++i)
    if (got[i] != want[i]) return false;
  return is_dense(*t, d.nhwc);
}

bool is_vector(const Tensor& t, ScalarType type, int64_t c) {
  return t.is_cpu() && t.scalar_type() == type && t.sizes().size() == 1 && t.sizes()[0] == c &&
         (c <= 1 || t.strides()[0] == 1);
}

bool is_vector(const Optional& t, const Dense& d) { return !t || is_vector(*t, acc_type(d.type), d.c); }

Tensor empty(int64_t rank, const int64_t* sizes, const int64_t* strides, ScalarType type) {
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, sizes, strides, static_cast<int32_t>(type),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

Tensor empty_like(const Tensor& x, const Dense& d) {
  const auto sizes = x.sizes(), strides = x.strides();
  return empty(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), d.type);
}

Tensor empty_vector(const Dense& d) {
  const int64_t stride = 1;
  return empty(1, &d.c, &stride, acc_type(d.type));
}

// Numbers per channel that live as long as the call, one row of them after the other.
class Rows {
 public:
  Rows(const Dense& d, int64_t rows)
      : row_(d.c * (d.type == ScalarType::Double ? 8 : 4)), bytes_(new std::byte[rows * row_]) {}
  void* operator[](int64_t row) { return bytes_.get() + row * row_; }

 private:
  int64_t row_;
  std::unique_ptr<std::byte[]> bytes_;
};

bool takes_running(const Optional& mean, const Optional& var, const Dense& d, bool training) {
  if (!mean || !var) return training && !mean && !var;
  if (!training) return is_vector(mean, d) && is_vector(var, d);
  return mean->is_cpu() && is_vector(*mean, mean->scalar_type(), d.c) && is_vector(*var, mean->scalar_type(), d.c);
}

// training: {out, mean, invstd} of the batch, running statistics moved; else {out, invstd} of the running ones.
// What is given is not returned: the batch's mean (with its variance), and `into`, which is written instead of a new
// `out` and may be x.
std::vector<Tensor> bn_act_forward(const Tensor& x, const Optional& residual, const Optional& weight,
                                   const Optional& bias, const Optional& running_mean,
                                   const Optional& running_var, const Optional& mean, const Optional& variance,
                                   bool training, double momentum, double eps, int64_t act, double act_param,
                                   const Optional& into) {
  if (!takes(x)) return {};
  const Dense d = dense(x, "x");
  if (!is_like(residual, x, d) || !is_like(into, x, d) || !is_vector(weight, d) || !is_vector(bias, d) ||
      !takes_running(running_mean, running_var, d, training) || !is_vector(mean, d) || !is_vector(variance, d) ||
      mean.has_value() != variance.has_value() || (mean && !training) || act < 0 || act >= kActivations ||
      (training && d.rows() < 2))
    return {};
  std::vector<Tensor> results;
  if (!into) results.push_back(empty_like(x, d));
  void* out = into ? pointer(into) : pointer(results[0]);
  Rows numbers(d, 3);
  void *var = numbers[0], *scale = numbers[1], *shift = numbers[2];
  BnFinalize finalize{nullptr, var,   pointer(weight), pointer(bias), nullptr, nullptr, acc_type(d.type),
                      momentum, eps, d.rows(),         nullptr,       scale,   shift};
  if (!training) {
    finalize.mean = pointer(running_mean), finalize.var = pointer(running_var);
  } else if (mean) {
    finalize.mean = pointer(mean), finalize.var = pointer(variance);
  } else {
    finalize.mean = pointer(results.emplace_back(empty_vector(d)));
    bn_stats_pass(d, pointer(x), pointer(results.back()), var);
  }
  if (training && running_mean) {
    finalize.running_mean = pointer(running_mean), finalize.running_var = pointer(running_var);
    finalize.running = running_mean->scalar_type();
  }
  results.push_back(empty_vector(d));
  finalize.invstd = pointer(results.back());
  bn_finalize_pass(d.type, d.c, finalize);
  bn_act_pass(d, pointer(x), pointer(residual), scale, shift, act, act_param, out);
  return results;
}

template <class A>
void divide(const void* sums, A count, int64_t channels, void* means) {
  const A* from = static_cast<const A*>(sums);
  A* to = static_cast<A*>(means);
  for (int64_t c = 0; c < channels; ++c) to[c] = from[c] / count;
}

void divide(const Dense& d, const void* sums, void* means) {
  const auto count = static_cast<double>(d.rows());
  d.type == ScalarType::Double ? divide<double>(sums, count, d.c, means)
                               : divide<float>(sums, static_cast<float>(count), d.c, means);
}

// The gradients asked for by the bits of `wanted`, in this order: x, residual, weight, bias.
std::vector<Tensor> bn_act_gradients(const Tensor& grad, const Optional& x, const Optional& residual,
                                     const Optional& weight, const Optional& bias, const Tensor& mean,
                                     const Tensor& invstd, const Optional& out, bool batch_stats, int64_t act,
                                     double act_param, int64_t wanted) {
  if (!takes(grad)) return {};
  const Dense d = dense(grad, "grad");
  const bool for_x = wanted & 1, for_residual = wanted & 2, for_weight = wanted & 4, for_bias = wanted & 8;
  const bool centres = for_x && batch_stats, sums = centres || for_weight || for_bias;
  const bool recomputes = act > kRelu || (act == kRelu && !out);
  if (!is_like(x, grad, d) || !is_like(residual, grad, d) || !is_like(out, grad, d) || !is_vector(weight, d) ||
      !is_vector(bias, d) || !is_vector(Optional(mean), d) || !is_vector(Optional(invstd), d) || act < 0 ||
      act >= kActivations || (!x && (recomputes || centres || for_weight)))
    return {};
  BnBackward b{d,
               pointer(grad), x ? pointer(x) : pointer(grad), pointer(residual), pointer(out),
               pointer(mean), pointer(invstd), pointer(weight), pointer(bias),
               act, act_param};
  std::vector<Tensor> results;
  void *dx = nullptr, *dz = nullptr;
  if (for_x) dx = pointer(results.emplace_back(empty_like(grad, d)));
  if (for_residual) dz = pointer(results.emplace_back(empty_like(grad, d)));
  Rows numbers(d, 4);
  void *sum_dy_xhat = numbers[0], *sum_dy = numbers[1];
  if (for_weight) sum_dy_xhat = pointer(results.emplace_back(empty_vector(d)));
  if (for_bias) sum_dy = pointer(results.emplace_back(empty_vector(d)));
  if (sums) {
    // dz, once it is written, is all that the second pass needs of grad, out and residual, provided that it has
    // lost nothing in the type of the activations.
    const bool exact = act <= kRelu6 || acc_type(d.type) == d.type;
    bn_reduce_pass(b, sum_dy, sum_dy_xhat, exact ? dz : nullptr);
    if (exact && dz) {
      b.grad = dz, b.residual = b.out = nullptr, b.act = kIdentity;
      dz = nullptr;
    }
  }
  void *mean_dy = nullptr, *mean_dy_xhat = nullptr;
  if (centres) {
    divide(d, sum_dy, mean_dy = numbers[2]);
    divide(d, sum_dy_xhat, mean_dy_xhat = numbers[3]);
  }
  if (dz && !dx) {
    // dx comes with it; nobody asked for it
    const Tensor unused = empty_like(grad, d);
    bn_dx_pass(b, mean_dy, mean_dy_xhat, pointer(unused), dz);
  } else if (dx) {
    bn_dx_pass(b, mean_dy, mean_dy_xhat, dx, dz);
  }
  return results;
}

}  // namespace

// One key for all devices: arguments of several are refused by name, not by the dispatcher.
STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CompositeExplicitAutograd, m) {
  m.impl("bn_act_forward", TORCH_BOX(&bn_act_forward));
  m.impl("bn_act_gradients", TORCH_BOX(&bn_act_gradients));
}

}  // namespace fastres
