// torch.ops.fastres_cuda: bn_act's forward and its gradients, each a whole in one call: on small tensors calls are what
// costs. They return no tensors at all where an argument is not as the passes take it (another memory order, another
// type, no values); then nothing has been written, and the caller converts or refuses it by name.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <vector>

#include "any_bn_act.h"
#include "tensor.h"

namespace fastres {
namespace {

constexpr int kIdentity = 0, kRelu = 1, kRelu6 = 2, kActivations = 8;  // of activation.cuh

bool is_beside(const Tensor& t, const Tensor& x) {
#ifdef FASTRES_EMULATOR
  return t.is_cpu() && x.is_cpu();
#else
  return t.is_cuda() && t.get_device_index() == x.get_device_index();
#endif
}

bool is_float(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

std::optional<Dense> taken(const Tensor& x) {
  const size_t rank = x.sizes().size();
  if (!is_beside(x, x) || !is_float(x) || x.numel() == 0 || rank < 2) return {};
  // channels_last is what PyTorch calls so: images and volumes
  if (!is_dense(x, false) && !((rank == 4 || rank == 5) && is_dense(x, true))) return {};
  const Dense d = dense(x, "x");
  if (d.c > 65535 && !d.nhwc) return {};
  return d;
}

bool is_like(const Optional& t, const Tensor& x, const Dense& d) {
  if (!t) return true;
  if (!is_beside(*t, x) || t->scalar_type() != x.scalar_type()) return false;
  const auto got = t->sizes(), want = x.sizes();
  if (got.size() != want.size()) return false;
  for (size_t i = 0; i < got.size(); ++i)
    if (got[i] != want[i]) return false;
  return is_dense(*t, d.nhwc);
}

ScalarType number_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

bool is_vector(const Tensor& t, const Tensor& x, const Dense& d, ScalarType type) {
  return is_beside(t, x) && t.scalar_type() == type && t.sizes().size() == 1 && t.sizes()[0] == d.c &&
         (d.c <= 1 || t.strides()[0] == 1);
}
bool is_vector(const Optional& t, const Tensor& x, const Dense& d) {
  return !t || is_vector(*t, x, d, number_type(x));
}

bool takes_running(const Optional& mean, const Optional& var, const Tensor& x, const Dense& d, bool training) {
  if (!mean || !var) return training && !mean && !var;
  if (!training) return is_vector(mean, x, d) && is_vector(var, x, d);
  const ScalarType type = mean->scalar_type();
  return is_float(*mean) && (type == ScalarType::Double) == (d.type == Type::kFp64) && is_vector(*mean, x, d, type) &&
         is_vector(*var, x, d, type);
}

Tensor empty(const Tensor& x, int64_t rank, const int64_t* sizes, const int64_t* strides, ScalarType type) {
  int32_t device = 0;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, sizes, strides, static_cast<int32_t>(type), device,
                                                  x.get_device_index(), &made));
  return Tensor(made);
}

Tensor empty_like(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  return empty(x, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), x.scalar_type());
}

Tensor empty_vector(const Tensor& x, int64_t size, ScalarType type) {
  const int64_t stride = 1;
  return empty(x, 1, &size, &stride, type);
}

// What lives as long as the call: rows of numbers per channel, and behind them the scratch of a reducing pass. Its
// memory goes back before the kernels have run; whoever gets it next comes later on the same stream.
class Scratch {
 public:
  Scratch(const Tensor& x, const Dense& d, int64_t rows, bool reduces)
      : row_(d.c * (d.type == Type::kFp64 ? 8 : 4)),
        rows_(rows),
        bytes_(empty_vector(x, rows * row_ + (reduces ? bn_reduce_scratch(d.n * d.s, d.c, d.type) : 0),
                            ScalarType::Byte)) {}
  void* operator[](int64_t row) const { return static_cast<std::byte*>(bytes_.data_ptr()) + row * row_; }
  void* partial() const { return (*this)[rows_]; }

 private:
  int64_t row_, rows_;
  Tensor bytes_;
};

BnAct view(const Dense& d, int64_t act, double act_param) {
  BnAct p{};
  p.n = d.n, p.c = d.c, p.s = d.s, p.nhwc = d.nhwc;
  p.act = static_cast<int>(act), p.act_param = act_param;
  return p;
}

// training: {out, mean, invstd} of the batch, running statistics moved; else {out, invstd} of the running ones.
// What is given is not returned: the batch's mean (with its variance), and `into`, which is written instead of a new
// `out` and may be x.
std::vector<Tensor> bn_act_forward(const Tensor& x, const Optional& residual, const Optional& weight,
                                   const Optional& bias, const Optional& running_mean, const Optional& running_var,
                                   const Optional& mean, const Optional& var, bool training, double momentum,
                                   double eps, int64_t act, double act_param, const Optional& into) {
  const auto shape = taken(x);
  if (!shape) return {};
  const Dense& d = *shape;
  const int64_t count = d.n * d.s;
  if (!is_like(residual, x, d) || !is_like(into, x, d) || !is_vector(weight, x, d) || !is_vector(bias, x, d) ||
      !takes_running(running_mean, running_var, x, d, training) || !is_vector(mean, x, d) || !is_vector(var, x, d) ||
      mean.has_value() != var.has_value() || (mean && !training) || act < 0 || act >= kActivations ||
      (training && count < 2))
    return {};
  const bool reduces = training && !mean;
  const Scratch scratch(x, d, 3, reduces);
  std::vector<Tensor> results;
  void* out = into ? pointer(into) : pointer(results.emplace_back(empty_like(x)));
  BnFinalize f{};
  f.c = static_cast<int>(d.c);
  f.mean = pointer(training ? mean : running_mean), f.var = pointer(training ? var : running_var);
  f.weight = pointer(weight), f.bias = pointer(bias);
  if (training && running_mean) {
    f.running_mean = pointer(running_mean), f.running_var = pointer(running_var);
    f.running_type = type_of(*running_mean, "running_mean");
  }
  f.momentum = momentum, f.eps = eps;
  f.unbiased = count > 1 ? static_cast<double>(count) / static_cast<double>(count - 1) : 1.0;
  f.scale = scratch[0], f.shift = scratch[1];

  BnAct p = view(d, act, act_param);
  p.x = pointer(x);
  if (reduces) p.result0 = pointer(results.emplace_back(empty_vector(x, d.c, number_type(x))));
  f.invstd = pointer(results.emplace_back(empty_vector(x, d.c, number_type(x))));
  Record records[3];
  int made = 0;
  if (reduces) {
    p.result1 = scratch[2], p.partial = scratch.partial(), p.finalize = f;
    records[made++] = bn_reduce_record(p, d.type, BnPass::kStats);
    records[made++] = bn_reduce_record(p, d.type, BnPass::kStatsFinish);
  } else {
    records[made++] = bn_finalize_record(f, d.type);
  }
  // not before: how a pass cuts the tensor up, and so its bits, depends on the alignment of all that it is given
  p.residual = pointer(residual), p.out = out;
  p.scale = f.scale, p.shift = f.shift;
  records[made++] = bn_act_record(p, d.type, BnPass::kForward);
  run_now(records, made, x);
  return results;
}

// The gradients asked for by the bits of `wanted`, in this order: x, residual, weight, bias.
std::vector<Tensor> bn_act_gradients(const Tensor& grad, const Optional& x, const Optional& residual,
                                     const Optional& weight, const Optional& bias, const Tensor& mean,
                                     const Tensor& invstd, const Optional& out, bool batch_stats, int64_t act,
                                     double act_param, int64_t wanted) {
  const auto shape = taken(grad);
  if (!shape) return {};
  const Dense& d = *shape;
  const bool for_x = wanted & 1, for_residual = wanted & 2, for_weight = wanted & 4, for_bias = wanted & 8;
  const bool centres = for_x && batch_stats, sums = centres || for_weight || for_bias;
  const bool recomputes = act > kRelu || (act == kRelu && !out);
  const ScalarType numbers = number_type(grad);
  if (!is_like(x, grad, d) || !is_like(residual, grad, d) || !is_like(out, grad, d) || !is_vector(weight, grad, d) ||
      !is_vector(bias, grad, d) || !is_vector(mean, grad, d, numbers) || !is_vector(invstd, grad, d, numbers) ||
      act < 0 || act >= kActivations || (!x && (recomputes || centres || for_weight)))
    return {};
  std::vector<Tensor> results;
  void *dx = nullptr, *dz = nullptr;
  if (for_x) dx = pointer(results.emplace_back(empty_like(grad)));
  if (for_residual) dz = pointer(results.emplace_back(empty_like(grad)));
  BnAct p = view(d, act, act_param);
  p.grad = pointer(grad), p.x = x ? pointer(x) : pointer(grad);
  p.residual = pointer(residual), p.saved_out = pointer(out);
  p.mean = pointer(mean), p.invstd = pointer(invstd), p.weight = pointer(weight), p.bias = pointer(bias);

  Record records[3];
  int made = 0;
  std::optional<Scratch> scratch;
  if (sums) {
    scratch.emplace(grad, d, 4, true);
    p.partial = scratch->partial();
    p.result1 = for_weight ? pointer(results.emplace_back(empty_vector(grad, d.c, numbers))) : (*scratch)[0];
    p.result0 = for_bias ? pointer(results.emplace_back(empty_vector(grad, d.c, numbers))) : (*scratch)[1];
    if (centres) p.mean_dy = (*scratch)[2], p.mean_dy_xhat = (*scratch)[3];
    // dz, once it is written, is all that the second pass needs of grad, out and residual, provided that it has
    // lost nothing in the type of the activations.
    const bool exact = act <= kRelu6 || numbers == grad.scalar_type();
    p.grad_residual = exact ? dz : nullptr;
    records[made++] = bn_reduce_record(p, d.type, BnPass::kBackwardReduce);
    records[made++] = bn_reduce_record(p, d.type, BnPass::kBackwardReduceFinish);
    if (p.grad_residual) {
      p.grad = dz, p.residual = p.saved_out = nullptr, p.act = kIdentity;
      dz = nullptr;
    }
  }
  std::optional<Tensor> unused;  // dx comes with dz where nobody asked for it
  if (dz && !dx) dx = pointer(unused.emplace(empty_like(grad)));
  if (dx) {
    p.out = dx, p.grad_residual = dz;
    records[made++] = bn_act_record(p, d.type, BnPass::kBackward);
  }
  if (made) run_now(records, made, grad);
  return results;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres_cuda, CompositeExplicitAutograd, m) {
  m.impl("bn_act_forward", TORCH_BOX(&fastres::bn_act_forward));
  m.impl("bn_act_gradients", TORCH_BOX(&fastres::bn_act_gradients));
}
