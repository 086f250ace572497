// torch.ops.fastres_cuda: records of the Hopper convolution for large batches.
#include "conv_arguments.h"
#include "sm90_conv.h"

namespace fastres {
namespace {

// second [N, C2, H2, W2] and second_weight [K, C2]: a 1x1 convolution of stride `second_stride` that is added, or none.
void sm90_conv_bn_act(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                      const Optional& residual, const Tensor& out, const Tensor& counter, Ints geometry, int64_t act,
                      double act_param, const Optional& second, const Optional& second_weight, Ints second_stride,
                      int64_t filters, int64_t pixels, int64_t cluster, const Tensor& record) {
  ThroughputConv p{};
  p.conv = conv_arguments(x, weight, scale, shift, residual, out, geometry, act, act_param);
  FASTRES_CHECK(second.has_value() == second_weight.has_value(), "second and second_weight: give both or none");
  if (second) {
    p.second_shape = second_shape(*second, x, out, second_stride);
    check_matrix(*second_weight, x, p.second_shape.k, p.second_shape.c, "second_weight");
    p.second = pointer(*second), p.second_weight = pointer(*second_weight);
  }
  check_counters(counter, x, 1);
  p.conv.counters = static_cast<int*>(pointer(counter));
  finish_record(x, record, [&] {
    return sm90_conv_record(p, type_of(x, "x"), static_cast<int>(filters), static_cast<int>(pixels),
                            static_cast<int>(cluster));
  });
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres_cuda, CompositeExplicitAutograd, m) {
  m.impl("sm90_conv_bn_act", TORCH_BOX(&fastres::sm90_conv_bn_act));
}
