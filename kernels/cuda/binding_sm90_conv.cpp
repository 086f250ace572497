// torch.ops.fastres_cuda: records of the Hopper convolution for large batches, and its launch in training.
#include "any_bn_act.h"
#include "conv_arguments.h"
#include "sm90_conv.h"

namespace fastres {
namespace {

// second [N, C2, H2, W2] and second_weight [K, C2]: a 1x1 convolution of stride `second_stride` that is added, or none.
void sm90_conv_bn_act(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                      const Optional& residual, const Tensor& out, const Tensor& counter, Ints geometry, int64_t act,
                      double act_param, const Optional& second, const Optional& second_weight, Ints second_stride,
                      int64_t filters, int64_t pixels, int64_t cluster, bool by_position, const Tensor& record) {
  ThroughputConv p{};
  p.conv = conv_arguments(x, weight, scale, shift, residual, out, geometry, act, act_param);
  FASTRES_CHECK(second.has_value() == second_weight.has_value(), "second and second_weight: give both or none");
  if (second) {
    p.second_shape = second_shape(*second, x, out, second_stride);
    check_matrix(*second_weight, x, p.second_shape.k, p.second_shape.c, "second_weight");
    p.second = pointer(*second), p.second_weight = pointer(*second_weight);
  }
  check_counters(counter, x, 1);
  p.by_position = by_position;
  p.conv.counters = static_cast<int*>(pointer(counter));
  finish_record(x, record, [&] {
    return sm90_conv_record(p, type_of(x, "x"), static_cast<int>(filters), static_cast<int>(pixels),
                            static_cast<int>(cluster));
  });
}

// out = conv(x), and the mean and biased variance [K] of its channels before they are rounded.
void sm90_conv_stats(const Tensor& x, const Tensor& weight, const Tensor& out, const Tensor& counter,
                     const Tensor& scratch, Ints geometry, int64_t filters, int64_t pixels, int64_t cluster,
                     bool by_position, const Tensor& mean, const Tensor& var) {
  ThroughputConv t{};
  t.conv = conv_arguments(x, weight, {}, {}, {}, out, geometry, 0, 0.0);
  check_counters(counter, x, 1);
  t.by_position = by_position;
  t.conv.counters = static_cast<int*>(pointer(counter));
  const int64_t k = t.conv.shape.k;
  check_channels(mean, x, k, "mean");
  check_channels(var, x, k, "var");
  const ConvTileShape tile{static_cast<int>(filters), static_cast<int>(pixels)};
#ifndef FASTRES_EMULATOR
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
#endif
  try {
    const Sm90Conv p = sm90_conv_tiles(t, tile.filters, tile.pixels, static_cast<int>(cluster), 1);
    const int chunks = sm90_conv_chunks(p, tile);
    check_scratch(scratch, x, 12 * k * (chunks + moments_parts(chunks)), "scratch");
    t.moments = static_cast<float*>(pointer(scratch));
    Record records[3] = {sm90_conv_record(t, type_of(x, "x"), tile.filters, tile.pixels, static_cast<int>(cluster))};
    const int count = merge_moments_records({k, chunks, t.moments, t.moments + 3 * k * chunks,
                                             static_cast<float*>(pointer(mean)), static_cast<float*>(pointer(var))},
                                            records + 1);
    run_now(records, 1 + count, x);
  } catch (const std::invalid_argument& e) {
    fail("ValueError: ", e.what());
  }
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres_cuda, CompositeExplicitAutograd, m) {
  m.impl("sm90_conv_bn_act", TORCH_BOX(&fastres::sm90_conv_bn_act));
  m.impl("sm90_conv_stats", TORCH_BOX(&fastres::sm90_conv_stats));
}
