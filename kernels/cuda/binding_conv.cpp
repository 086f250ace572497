// torch.ops.fastres_cuda: records of the kernels that plans are made of.
#include "any_max_pool.h"
#include "any_pool_linear.h"
#include "conv_arguments.h"
#include "conv_latency.h"
#include "shifted_block.h"

namespace fastres {
namespace {

void sm80_conv_bn_act(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                      const Optional& residual, const Tensor& out, const Optional& workspace, const Optional& counters,
                      Ints geometry, int64_t act, double act_param, int64_t block_m, int64_t block_n, int64_t splits,
                      const Tensor& record) {
  ConvBnAct p = conv_arguments(x, weight, scale, shift, residual, out, geometry, act, act_param);
  const Type type = type_of(x, "x");
  const int64_t steps = ceil_div(p.shape.depth(), type == Type::kFp32 ? 16 : 32);
  FASTRES_CHECK(splits >= 1 && splits <= steps, "splits is ", splits, ", expected 1 to ", steps);
  FASTRES_CHECK(block_m > 0 && block_n > 0, "block_m and block_n must be positive");
  const int m = static_cast<int>(block_m), n = static_cast<int>(block_n), parts = static_cast<int>(splits);
  const ConvTiles tiles = ConvTiles::of(p.shape, m, n, parts);
  FASTRES_CHECK(tiles.blocks() < int64_t{1} << 31, "more than 2^31 blocks");
  if (splits > 1) {
    FASTRES_CHECK(workspace && counters, "splits > 1 needs a workspace and counters");
    check_scratch(*workspace, x, tiles.blocks() * block_m * block_n * 4, "workspace");
    check_counters(*counters, x, tiles.tiles());
  }
  p.partial = static_cast<float*>(pointer(workspace)), p.counters = static_cast<int*>(pointer(counters));
  finish_record(x, record, [&] { return sm80_conv_record(p, type, m, n, parts); });
}

// second [N, C2, H2, W2]: a tensor that a 1x1 convolution of stride `second_stride` adds, or none. box: images, rows and
// columns of output pixels that a block takes.
void sm90_conv_latency(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                       const Optional& residual, const Tensor& out, Ints geometry, int64_t act, double act_param,
                       const Optional& second, Ints second_stride, Ints box, int64_t filters, int64_t cluster,
                       const Tensor& record) {
  check_device(x, "x");
  check_nhwc(x, "x");
  check_nhwc(out, "out");
  LatencyConv p{};
  if (second) {
    p.second_shape = second_shape(*second, x, out, second_stride);
    p.second = pointer(*second);
  }
  const ConvShape shape = conv_shape(x, out, geometry);
  p.conv = conv_arguments(x, weight, scale, shift, residual, out, geometry, act, act_param,
                          latency_weight_row(shape, p.second_shape.c));
  FASTRES_CHECK(!second || shape.groups == 1, "second: takes one group, there are ", shape.groups);
  FASTRES_CHECK(box.size() == 3, "box has ", box.size(), " numbers, expected 3");
  for (size_t i = 0; i < 3; ++i) FASTRES_CHECK(box[i] >= 1 && box[i] <= 64, "box[", i, "] is ", box[i]);
  const int64_t steps = latency_weight_row(shape, static_cast<int>(round_up(p.second_shape.c, 64))) / 64;
  FASTRES_CHECK(cluster >= 1 && cluster <= steps, "cluster is ", cluster, ", expected 1 to ", steps);
  finish_record(x, record, [&] {
    return sm90_conv_latency_record(p, type_of(x, "x"), static_cast<int>(box[0]), static_cast<int>(box[1]),
                                    static_cast<int>(box[2]), static_cast<int>(filters), static_cast<int>(cluster));
  });
}

void sm90_shifted_block(const Tensor& x, const Tensor& conv_weight, const Tensor& conv, const Tensor& expand_weight,
                        const Tensor& expand, const Optional& reduce_weight, const Optional& reduce,
                        const Tensor& residual, const Tensor& out, const Optional& next, const Tensor& counter,
                        const Tensor& record) {
  check_device(x, "x");
  const Type type = type_of(x, "x");
  FASTRES_CHECK_TYPE(type == Type::kBf16 || type == Type::kFp16, "x is ", name_of(x.scalar_type()),
                     ", expected bfloat16 or float16");
  FASTRES_CHECK(x.dim() == 4 && x.numel() > 0, "x has the shape ", shape_of(x.sizes()), ", expected [N, 64, H, W]");
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3);
  const auto pixels = [&](const Tensor& t, int64_t channels, const char* name) {
    check_same_device(t, x, name);
    check_nhwc(t, name);
    FASTRES_CHECK_TYPE(type_of(t, name) == type, name, " differs from x in type");
    check_shape(t, {n, channels, h, w}, name);
  };
  constexpr int64_t kC = kBlockChannels, kE = kBlockExpanded;
  pixels(x, kC, "x");
  pixels(residual, kE, "residual");
  pixels(out, kE, "out");
  check_matrix(conv_weight, x, kC, 9 * kC, "conv_weight");
  check_matrix(expand_weight, x, kE, kC, "expand_weight");
  FASTRES_CHECK(next.has_value() == reduce.has_value() && next.has_value() == reduce_weight.has_value(),
                "next, reduce and reduce_weight: give all or none");
  ShiftedBlockTensors t{static_cast<int>(n), static_cast<int>(h), static_cast<int>(w)};
  t.conv = check_pairs(conv, x, kC, "conv");
  t.expand = check_pairs(expand, x, kE, "expand");
  if (next) {
    pixels(*next, kC, "next");
    check_matrix(*reduce_weight, x, kC, kE, "reduce_weight");
    t.reduce = check_pairs(*reduce, x, kC, "reduce");
  }
  check_counters(counter, x, 1);
  t.x = pointer(x), t.residual = pointer(residual), t.out = pointer(out), t.next = pointer(next);
  t.conv_weight = pointer(conv_weight), t.expand_weight = pointer(expand_weight);
  t.reduce_weight = pointer(reduce_weight);
  t.counter = static_cast<int*>(pointer(counter));
  finish_record(x, record, [&] { return shifted_block_record(t, type); });
}

// window: height and width, stride, padding, dilation (height, width each).
void any_max_pool(const Tensor& x, const Tensor& out, Ints window, const Tensor& record) {
  check_device(x, "x");
  check_nhwc(x, "x");
  check_same_device(out, x, "out");
  check_nhwc(out, "out");
  const Type type = type_of(x, "x");
  FASTRES_CHECK_TYPE(type_of(out, "out") == type, "out differs from x in type");
  FASTRES_CHECK(window.size() == 8, "window has ", window.size(), " numbers, expected 8");
  for (size_t i = 0; i < 8; ++i)
    FASTRES_CHECK(window[i] >= (i == 4 || i == 5 ? 0 : 1) && window[i] < 1 << 15, "window[", i, "] is ", window[i]);
  FASTRES_CHECK(x.numel() > 0 && out.numel() > 0, "x and out must not be empty");
  FASTRES_CHECK(out.size(0) == x.size(0) && out.size(1) == x.size(1), "out has the shape ", shape_of(out.sizes()),
                ", x ", shape_of(x.sizes()));
  const auto g = [&](int i) { return static_cast<int>(window[i]); };
  MaxPool p{pointer(x), pointer(out), out.size(0) * out.size(2) * out.size(3)};
  p.h = static_cast<int>(x.size(2)), p.w = static_cast<int>(x.size(3)), p.c = static_cast<int>(x.size(1));
  p.p = static_cast<int>(out.size(2)), p.q = static_cast<int>(out.size(3));
  p.r = g(0), p.s = g(1), p.stride_h = g(2), p.stride_w = g(3), p.pad_h = g(4), p.pad_w = g(5);
  p.dilation_h = g(6), p.dilation_w = g(7);
  // A window that lies in the padding altogether has no maximum; PyTorch allows none.
  FASTRES_CHECK((p.p - 1) * p.stride_h - p.pad_h < p.h && (p.q - 1) * p.stride_w - p.pad_w < p.w,
                "out has the shape ", shape_of(out.sizes()), ": its last window starts outside of x");
  finish_record(x, record, [&] { return max_pool_record(p, type); });
}

void any_pool_linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& out,
                     const Tensor& workspace, const Tensor& counters, const Tensor& record) {
  check_device(x, "x");
  check_nhwc(x, "x");
  const Type type = type_of(x, "x");
  FASTRES_CHECK_TYPE(type != Type::kFp64, "x is float64, expected float32, bfloat16 or float16");
  const int bytes = type == Type::kFp32 ? 4 : 2;
  PoolLinear p{};
  p.n = static_cast<int>(x.size(0)), p.c = static_cast<int>(x.size(1));
  p.pixels = static_cast<int>(x.size(2) * x.size(3)), p.k = static_cast<int>(out.size(out.dim() - 1));
  FASTRES_CHECK(x.numel() > 0 && p.k > 0, "x and out must not be empty");
  FASTRES_CHECK(p.c * bytes % 16 == 0, "x has ", p.c, " channels, a multiple of ", 16 / bytes, " is taken");
  check_matrix(weight, x, p.k, p.c, "weight");
  check_matrix(out, x, p.n, p.k, "out");
  check_channels(bias, x, p.k, "bias");
  const int parts = pool_parts(p.c, bytes);
  check_scratch(workspace, x, int64_t{4} * parts * p.n * p.k, "workspace");
  check_counters(counters, x, ceil_div(p.k, kPoolRows));
  p.x = pointer(x), p.weight = pointer(weight), p.out = pointer(out);
  p.bias = static_cast<const float*>(pointer(bias));
  p.partial = static_cast<float*>(pointer(workspace)), p.counters = static_cast<int*>(pointer(counters));
  finish_record(x, record, [&] { return pool_linear_record(p, type); });
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres_cuda, CompositeExplicitAutograd, m) {
  m.impl("sm80_conv_bn_act", TORCH_BOX(&fastres::sm80_conv_bn_act));
  m.impl("sm90_conv_latency", TORCH_BOX(&fastres::sm90_conv_latency));
  m.impl("sm90_shifted_block", TORCH_BOX(&fastres::sm90_shifted_block));
  m.impl("any_max_pool", TORCH_BOX(&fastres::any_max_pool));
  m.impl("any_pool_linear", TORCH_BOX(&fastres::any_pool_linear));
}
