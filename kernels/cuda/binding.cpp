// torch.ops.fastres_cuda: element-wise primitives and the launching of records. The schemas are in
// fastres/backends/cuda_ops.py; the convolutions' records are made in binding_conv.cpp.
#include "any_add_relu.h"
#include "any_bn_act.h"
#include "tensor.h"

namespace fastres {
namespace {

void add_relu(const Tensor& a, const Tensor& b, const Tensor& out) {
  const Dense d = dense(a, "a");
  check_like(b, a, d, "b");
  check_like(out, a, d, "out");
  if (a.numel()) run_now(add_relu_record({pointer(a), pointer(b), pointer(out), a.numel()}, d.type, false), a);
}

void add_relu_backward(const Tensor& grad, const Tensor& out, const Tensor& grad_in) {
  const Dense d = dense(grad, "grad");
  check_like(out, grad, d, "out");
  check_like(grad_in, grad, d, "grad_in");
  if (grad.numel())
    run_now(add_relu_record({pointer(grad), pointer(out), pointer(grad_in), grad.numel()}, d.type, true), grad);
}

BnAct view(const Tensor& x, const Dense& d) {
  BnAct p{};
  p.n = d.n, p.c = d.c, p.s = d.s, p.nhwc = d.nhwc;
  p.x = pointer(x);
  FASTRES_CHECK(d.c <= 65535 || d.nhwc, "x has ", d.c, " channels in contiguous memory, at most 65535 are taken");
  return p;
}

void check_act(int64_t act) {
  FASTRES_CHECK(act >= 0 && act < 8, "act is ", act, ", expected a code from 0 to 7");
}

void bn_stats(const Tensor& x, const Tensor& scratch, const Tensor& mean, const Tensor& var) {
  const Dense d = dense(x, "x");
  check_channels(mean, x, d.c, "mean");
  check_channels(var, x, d.c, "var");
  FASTRES_CHECK(x.numel() > 0, "x is empty: it has no mean");
  check_scratch(scratch, x, bn_reduce_scratch(d.n * d.s, d.c, d.type), "scratch");
  BnAct p = view(x, d);
  p.partial = pointer(scratch);
  p.result0 = pointer(mean), p.result1 = pointer(var);
  run_now(bn_reduce_record(p, d.type, BnPass::kStats), x);
  run_now(bn_reduce_record(p, d.type, BnPass::kStatsFinish), x);
}

void bn_finalize(const Tensor& mean, const Tensor& var, const Optional& weight, const Optional& bias,
                 const Optional& running_mean, const Optional& running_var, double momentum, double eps, int64_t count,
                 const Tensor& invstd, const Tensor& scale, const Tensor& shift) {
  check_device(mean, "mean");
  const int64_t c = mean.numel();
  check_channels(mean, mean, c, "mean");
  check_channels(var, mean, c, "var");
  check_channels(weight, mean, c, "weight");
  check_channels(bias, mean, c, "bias");
  check_channels(invstd, mean, c, "invstd");
  check_channels(scale, mean, c, "scale");
  check_channels(shift, mean, c, "shift");
  FASTRES_CHECK(running_mean.has_value() == running_var.has_value(),
                "running_mean and running_var: give both or neither");
  const Type type = type_of(mean, "mean");
  Type running = type;
  if (running_mean) {
    FASTRES_CHECK(count > 1, "count is ", count, ", an unbiased variance needs more than 1");
    for (const auto& [t, name] : {std::pair{&*running_mean, "running_mean"}, std::pair{&*running_var, "running_var"}}) {
      check_same_device(*t, mean, name);
      check_shape(*t, {c}, name);
      FASTRES_CHECK(t->is_contiguous(), name, " must be contiguous");
    }
    running = type_of(*running_mean, "running_mean");
    FASTRES_CHECK_TYPE(type_of(*running_var, "running_var") == running, "running_var differs from running_mean in type");
    FASTRES_CHECK_TYPE((type == Type::kFp64) == (running == Type::kFp64),
                       "running_mean must be float64 exactly where mean is");
  }
  if (c == 0) return;
  const double unbiased = count > 1 ? static_cast<double>(count) / static_cast<double>(count - 1) : 1.0;
  run_now(bn_finalize_record({static_cast<int>(c), pointer(mean), pointer(var), pointer(weight), pointer(bias),
                              pointer(running_mean), pointer(running_var), momentum, eps, unbiased, pointer(invstd),
                              pointer(scale), pointer(shift), running},
                             type),
          mean);
}

void bn_act(const Tensor& x, const Optional& residual, const Tensor& scale, const Tensor& shift, int64_t act,
            double act_param, const Tensor& out) {
  const Dense d = dense(x, "x");
  check_like(residual, x, d, "residual");
  check_like(out, x, d, "out");
  check_channels(scale, x, d.c, "scale");
  check_channels(shift, x, d.c, "shift");
  check_act(act);
  if (x.numel() == 0) return;
  BnAct p = view(x, d);
  p.act = static_cast<int>(act), p.act_param = act_param;
  p.residual = pointer(residual);
  p.scale = pointer(scale), p.shift = pointer(shift);
  p.out = pointer(out);
  run_now(bn_act_record(p, d.type, BnPass::kForward), x);
}

BnAct backward_view(const Tensor& grad, const Dense& d, const Optional& x, const Optional& residual,
                    const Optional& out, const Tensor& mean, const Tensor& invstd, const Optional& weight,
                    const Optional& bias, int64_t act, double act_param) {
  check_like(x, grad, d, "x");
  check_like(residual, grad, d, "residual");
  check_like(out, grad, d, "out");
  check_channels(mean, grad, d.c, "mean");
  check_channels(invstd, grad, d.c, "invstd");
  check_channels(weight, grad, d.c, "weight");
  check_channels(bias, grad, d.c, "bias");
  check_act(act);
  FASTRES_CHECK(act != 1 || out || x, "out or x is needed: ReLU's mask is read or computed from it");
  FASTRES_CHECK(act <= 1 || x, "x is needed: the activation's argument is computed from it");
  BnAct p = view(grad, d);
  p.act = static_cast<int>(act), p.act_param = act_param;
  p.x = pointer(x), p.grad = pointer(grad), p.residual = pointer(residual), p.saved_out = pointer(out);
  p.mean = pointer(mean), p.invstd = pointer(invstd), p.weight = pointer(weight), p.bias = pointer(bias);
  return p;
}

void bn_act_backward_reduce(const Tensor& grad, const Tensor& x, const Optional& residual, const Optional& out,
                            const Tensor& mean, const Tensor& invstd, const Optional& weight, const Optional& bias,
                            int64_t act, double act_param, const Tensor& scratch, const Tensor& sum_dy,
                            const Tensor& sum_dy_xhat, const Optional& grad_residual) {
  const Dense d = dense(grad, "grad");
  BnAct p = backward_view(grad, d, x, residual, out, mean, invstd, weight, bias, act, act_param);
  check_channels(sum_dy, grad, d.c, "sum_dy");
  check_channels(sum_dy_xhat, grad, d.c, "sum_dy_xhat");
  check_like(grad_residual, grad, d, "grad_residual");
  FASTRES_CHECK(grad.numel() > 0, "grad is empty");
  check_scratch(scratch, grad, bn_reduce_scratch(d.n * d.s, d.c, d.type), "scratch");
  p.partial = pointer(scratch);
  p.result0 = pointer(sum_dy), p.result1 = pointer(sum_dy_xhat);
  p.grad_residual = pointer(grad_residual);
  run_now(bn_reduce_record(p, d.type, BnPass::kBackwardReduce), grad);
  run_now(bn_reduce_record(p, d.type, BnPass::kBackwardReduceFinish), grad);
}

void bn_act_backward(const Tensor& grad, const Optional& x, const Optional& residual, const Optional& out,
                     const Tensor& mean, const Tensor& invstd, const Optional& weight, const Optional& bias,
                     int64_t act, double act_param, const Optional& mean_dy, const Optional& mean_dy_xhat,
                     const Tensor& grad_x, const Optional& grad_residual) {
  const Dense d = dense(grad, "grad");
  BnAct p = backward_view(grad, d, x, residual, out, mean, invstd, weight, bias, act, act_param);
  check_channels(mean_dy, grad, d.c, "mean_dy");
  check_channels(mean_dy_xhat, grad, d.c, "mean_dy_xhat");
  FASTRES_CHECK(mean_dy.has_value() == mean_dy_xhat.has_value(), "mean_dy and mean_dy_xhat: give both or neither");
  FASTRES_CHECK(!mean_dy || x, "x is needed where mean_dy is given");
  check_like(grad_x, grad, d, "grad_x");
  check_like(grad_residual, grad, d, "grad_residual");
  if (grad.numel() == 0) return;
  p.mean_dy = pointer(mean_dy), p.mean_dy_xhat = pointer(mean_dy_xhat);
  p.out = pointer(grad_x), p.grad_residual = pointer(grad_residual);
  run_now(bn_act_record(p, d.type, BnPass::kBackward), grad);
}

// Launches `records` [count * sizeof(Record)] one after the other on the current stream of `device`.
void run_records(const Tensor& records, int64_t device) {
  FASTRES_CHECK(records.is_cpu() && records.is_contiguous() && records.scalar_type() == ScalarType::Byte &&
                    records.numel() % sizeof(Record) == 0,
                "records must be uint8 on the CPU, a multiple of ", sizeof(Record), " bytes");
  const auto* record = static_cast<const Record*>(records.data_ptr());
  const int64_t count = records.numel() / static_cast<int64_t>(sizeof(Record));
  for (int64_t i = 0; i < count; ++i) FASTRES_CHECK(record[i].magic == kRecordMagic, "records[", i, "] is no record");
#ifdef FASTRES_EMULATOR
  (void)device;
  launch(record, count, nullptr);
#else
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(static_cast<int32_t>(device), &stream));
  launch(record, count, static_cast<cudaStream_t>(stream));
#endif
}

}  // namespace
}  // namespace fastres

#ifndef FASTRES_EMULATOR
// "" or why the CUDA runtime that this library carries cannot work here, the driver being older than it above all: PyTorch
// may well work beside it, with a runtime of its own.
extern "C" __attribute__((visibility("default"))) const char* fastres_cuda_why_not() {
  static std::string reason;
  int devices = 0, runtime = 0, driver = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  reason = "the library was built with CUDA " + version(runtime) + ", the driver " +
           (driver ? "is for CUDA " + version(driver) : std::string("is not there")) + ": " + cudaGetErrorString(status);
  return reason.c_str();
}
#endif

// One key for all devices: run_records' tensor lives on the CPU, and the checks above know where the others must be.
STABLE_TORCH_LIBRARY_IMPL(fastres_cuda, CompositeExplicitAutograd, m) {
  m.impl("add_relu", TORCH_BOX(&fastres::add_relu));
  m.impl("add_relu_backward", TORCH_BOX(&fastres::add_relu_backward));
  m.impl("bn_stats", TORCH_BOX(&fastres::bn_stats));
  m.impl("bn_finalize", TORCH_BOX(&fastres::bn_finalize));
  m.impl("bn_act", TORCH_BOX(&fastres::bn_act));
  m.impl("bn_act_backward_reduce", TORCH_BOX(&fastres::bn_act_backward_reduce));
  m.impl("bn_act_backward", TORCH_BOX(&fastres::bn_act_backward));
  m.impl("run_records", TORCH_BOX(&fastres::run_records));
}
