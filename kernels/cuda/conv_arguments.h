// Checks of the arguments that the bindings of convolutions share, and how a record comes out of them.
#pragma once

#include "conv.h"
#include "tensor.h"

namespace fastres {

using Ints = torch::headeronly::IntHeaderOnlyArrayRef;

// What `make` makes, on x's device, goes into the bytes of `record`.
template <class Make>
void finish_record(const Tensor& x, const Tensor& record, const Make& make) {
  FASTRES_CHECK(record.is_cpu() && record.is_contiguous() && record.scalar_type() == ScalarType::Byte &&
                    record.numel() == sizeof(Record),
                "record must be uint8 on the CPU, ", sizeof(Record), " bytes");
#ifdef FASTRES_EMULATOR
  (void)x;
#else
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
#endif
  try {
    Record made = make();
    allow_overlap(made);
    std::memcpy(record.data_ptr(), &made, sizeof made);
  } catch (const std::invalid_argument& e) {
    fail("ValueError: ", e.what());
  }
}

inline void check_counters(const Tensor& counters, const Tensor& x, int64_t count) {
  check_same_device(counters, x, "counters");
  FASTRES_CHECK_TYPE(counters.scalar_type() == ScalarType::Int, "counters must be int32");
  FASTRES_CHECK(counters.is_contiguous() && counters.numel() >= count, "counters has ", counters.numel(),
                " entries, needs ", count);
}

inline void check_nhwc(const Tensor& t, const char* name) {
  FASTRES_CHECK(t.dim() == 4 && is_dense(t, true), name, " must be a dense channels_last [N, C, H, W] tensor, it has ",
                shape_of(t.sizes()), " with the strides ", shape_of(t.strides()));
  FASTRES_CHECK(t.numel() < int64_t{1} << 31, name, " has ", t.numel(), " elements, fewer than 2^31 are taken");
  FASTRES_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, name, " must be 16-byte aligned");
}

// geometry: filter height and width, stride, padding, dilation (height, width each), groups.
inline ConvShape conv_shape(const Tensor& x, const Tensor& out, Ints geometry) {
  FASTRES_CHECK(geometry.size() == 9, "geometry has ", geometry.size(), " numbers, expected 9");
  for (size_t i = 0; i < 9; ++i)
    FASTRES_CHECK(geometry[i] >= (i == 4 || i == 5 ? 0 : 1) && geometry[i] < 1 << 15, "geometry[", i, "] is ",
                  geometry[i]);
  const auto g = [&](int i) { return static_cast<int>(geometry[i]); };
  const auto xs = x.sizes(), ys = out.sizes();
  ConvShape v{};
  v.n = static_cast<int>(xs[0]), v.c = static_cast<int>(xs[1]), v.h = static_cast<int>(xs[2]);
  v.w = static_cast<int>(xs[3]);
  v.k = static_cast<int>(ys[1]), v.p = static_cast<int>(ys[2]), v.q = static_cast<int>(ys[3]);
  v.r = g(0), v.s = g(1), v.stride_h = g(2), v.stride_w = g(3), v.pad_h = g(4), v.pad_w = g(5);
  v.dilation_h = g(6), v.dilation_w = g(7), v.groups = g(8);
  FASTRES_CHECK(v.c % v.groups == 0 && v.k % v.groups == 0, v.groups, " groups do not divide ", v.c, " and ", v.k);
  const auto extent = [](int size, int kernel, int stride, int padding, int dilation) {
    const int span = size + 2 * padding - dilation * (kernel - 1) - 1;
    return span < 0 ? 0 : span / stride + 1;
  };
  const int p = extent(v.h, v.r, v.stride_h, v.pad_h, v.dilation_h);
  const int q = extent(v.w, v.s, v.stride_w, v.pad_w, v.dilation_w);
  FASTRES_CHECK(ys[0] == xs[0] && v.p == p && v.q == q, "out has the shape ", shape_of(ys), ", expected [", v.n, ", ",
                v.k, ", ", p, ", ", q, "]");
  return v;
}

// Pairs of fp32 numbers by channel, [c, 2].
inline const float* check_pairs(const Tensor& t, const Tensor& x, int64_t c, const char* name) {
  check_same_device(t, x, name);
  FASTRES_CHECK_TYPE(t.scalar_type() == ScalarType::Float, name, " is ", name_of(t.scalar_type()),
                     ", expected float32");
  check_shape(t, {c, 2}, name);
  FASTRES_CHECK(t.is_contiguous() && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, name,
                " must be contiguous and 16-byte aligned");
  return static_cast<const float*>(pointer(t));
}

// A matrix of x's type, [rows, columns].
inline void check_matrix(const Tensor& t, const Tensor& x, int64_t rows, int64_t columns, const char* name) {
  check_same_device(t, x, name);
  FASTRES_CHECK_TYPE(t.scalar_type() == x.scalar_type(), name, " differs from x in type");
  check_shape(t, {rows, columns}, name);
  FASTRES_CHECK(t.is_contiguous() && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, name,
                " must be contiguous and 16-byte aligned");
}

// second [N, C2, H2, W2]: a tensor that a 1x1 convolution of this stride adds to the same outputs.
inline ConvShape second_shape(const Tensor& second, const Tensor& x, const Tensor& out, Ints stride) {
  check_same_device(second, x, "second");
  check_nhwc(second, "second");
  FASTRES_CHECK_TYPE(second.scalar_type() == x.scalar_type(), "second differs from x in type");
  FASTRES_CHECK(stride.size() == 2, "second_stride has ", stride.size(), " numbers, expected 2");
  const int64_t one[] = {1, 1, stride[0], stride[1], 0, 0, 1, 1, 1};
  return conv_shape(second, out, Ints(one, 9));
}

// Everything but the tiles. `row`: elements of a filter's row of weights, where it is not the depth alone. Only
// statistics go without scale and shift.
inline ConvBnAct conv_arguments(const Tensor& x, const Tensor& weight, const Optional& scale, const Optional& shift,
                         const Optional& residual, const Tensor& out, Ints geometry, int64_t act, double act_param,
                         int64_t row = 0) {
  check_device(x, "x");
  check_nhwc(x, "x");
  check_same_device(out, x, "out");
  check_nhwc(out, "out");
  const Type type = type_of(x, "x");
  FASTRES_CHECK_TYPE(type != Type::kFp64, "x is float64, expected float32, bfloat16 or float16");
  FASTRES_CHECK_TYPE(type_of(out, "out") == type, "out differs from x in type");
  ConvBnAct p{};
  p.shape = conv_shape(x, out, geometry);
  FASTRES_CHECK(x.numel() > 0 && out.numel() > 0, "x and out must not be empty");
  FASTRES_CHECK(act >= 0 && act < 8, "act is ", act, ", expected a code from 0 to 7");
  if (!row) row = round_up(p.shape.depth(), type == Type::kFp32 ? 4 : 8);
  check_matrix(weight, x, p.shape.k, row, "weight");
  check_channels(scale, x, p.shape.k, "scale");
  check_channels(shift, x, p.shape.k, "shift");
  if (residual) {
    check_same_device(*residual, x, "residual");
    check_nhwc(*residual, "residual");
    FASTRES_CHECK_TYPE(type_of(*residual, "residual") == type, "residual differs from x in type");
    check_shape(*residual, {p.shape.n, p.shape.k, p.shape.p, p.shape.q}, "residual");
  }
  p.x = pointer(x), p.weight = pointer(weight), p.residual = pointer(residual), p.out = pointer(out);
  p.scale = static_cast<const float*>(pointer(scale)), p.shift = static_cast<const float*>(pointer(shift));
  p.weight_row = static_cast<int>(row), p.act = static_cast<int>(act), p.act_param = static_cast<float>(act_param);
  return p;
}

}  // namespace fastres
