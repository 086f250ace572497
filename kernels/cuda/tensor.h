// Checks of what comes from Python, before anything is launched.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace fastres {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Python turns these prefixes into a TypeError or a ValueError (backends/cuda_ops.py).
#define FASTRES_CHECK_TYPE(ok, ...) \
  if (!(ok)) ::fastres::fail("TypeError: ", __VA_ARGS__)
#define FASTRES_CHECK(ok, ...) \
  if (!(ok)) ::fastres::fail("ValueError: ", __VA_ARGS__)

template <class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Byte: return "uint8";
    default: return "another type";
  }
}

template <class Array>
std::string shape_of(const Array& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  return text.str() + ']';
}

inline Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return Type::kBf16;
    case ScalarType::Half: return Type::kFp16;
    case ScalarType::Float: return Type::kFp32;
    case ScalarType::Double: return Type::kFp64;
    default: fail("TypeError: ", name, " must be float32, float64, bfloat16 or float16");
  }
}

inline void check_device(const Tensor& t, const char* name) {
#ifdef FASTRES_EMULATOR
  FASTRES_CHECK(t.is_cpu(), name, " must be a CPU tensor: this is the emulator");
#else
  FASTRES_CHECK(t.is_cuda(), name, " must be a CUDA tensor");
#endif
}

inline void check_same_device(const Tensor& t, const Tensor& x, const char* name) {
  check_device(t, name);
  FASTRES_CHECK(t.get_device_index() == x.get_device_index(), name, " is on another device than the first tensor");
}

// A dense tensor [N, C, *spatial] in one of two orders: N planes of C, or rows of C channels.
struct Dense {
  Type type;
  int64_t n = 0, c = 0, s = 1;  // s: product of the spatial sizes
  bool nhwc = false;            // channels innermost
};

// Strides of size-1 dimensions mean nothing; an empty tensor is dense in any order.
inline bool is_dense(const Tensor& x, bool nhwc) {
  if (x.numel() == 0) return true;
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t rank = static_cast<int64_t>(sizes.size());
  int64_t expected = 1;
  const auto matches = [&](int64_t d) {
    const bool ok = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return ok;
  };
  if (nhwc && !matches(1)) return false;
  for (int64_t d = rank - 1; d >= (nhwc ? 2 : 1); --d)
    if (!matches(d)) return false;
  return matches(0);
}

inline Dense dense(const Tensor& x, const char* name) {
  check_device(x, name);
  const auto sizes = x.sizes();
  FASTRES_CHECK(sizes.size() >= 2, name, " must have the shape [N, C, *spatial], it has ", shape_of(sizes));
  Dense d{type_of(x, name), sizes[0], sizes[1]};
  for (size_t i = 2; i < sizes.size(); ++i) d.s *= sizes[i];
  const bool planes = is_dense(x, false);
  FASTRES_CHECK(planes || is_dense(x, true), name, " must be dense, contiguous or channels_last, it has the shape ",
                shape_of(sizes), " and the strides ", shape_of(x.strides()));
  // With one pixel both orders are the same memory: long rows are the faster view.
  d.nhwc = !planes || (d.s == 1 && d.c > 1);
  return d;
}

inline void check_shape(const Tensor& t, std::initializer_list<int64_t> want, const char* name) {
  const auto got = t.sizes();
  bool same = got.size() == want.size();
  for (size_t i = 0; same && i < got.size(); ++i) same = got[i] == want.begin()[i];
  FASTRES_CHECK(same, name, " has the shape ", shape_of(got), ", expected ",
                shape_of(std::vector<int64_t>(want.begin(), want.end())));
}

inline void check_like(const Tensor& t, const Tensor& x, const Dense& d, const char* name) {
  check_same_device(t, x, name);
  FASTRES_CHECK_TYPE(t.scalar_type() == x.scalar_type(), name, " is ", name_of(t.scalar_type()), ", expected ",
                     name_of(x.scalar_type()));
  const auto got = t.sizes(), want = x.sizes();
  bool same = got.size() == want.size();
  for (size_t i = 0; same && i < got.size(); ++i) same = got[i] == want[i];
  FASTRES_CHECK(same, name, " has the shape ", shape_of(got), ", expected ", shape_of(want));
  FASTRES_CHECK(is_dense(t, d.nhwc), name, " must have the memory format of the first tensor (",
                d.nhwc ? "channels_last" : "contiguous", "), its strides are ", shape_of(t.strides()));
}
inline void check_like(const Optional& t, const Tensor& x, const Dense& d, const char* name) {
  if (t) check_like(*t, x, d, name);
}

// A vector of c per-channel numbers: fp32, or fp64 beside fp64 activations.
inline void check_channels(const Tensor& t, const Tensor& x, int64_t c, const char* name) {
  check_same_device(t, x, name);
  const ScalarType want = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  FASTRES_CHECK_TYPE(t.scalar_type() == want, name, " is ", name_of(t.scalar_type()), ", expected ", name_of(want));
  check_shape(t, {c}, name);
  FASTRES_CHECK(c <= 1 || t.strides()[0] == 1, name, " must be contiguous");
}
inline void check_channels(const Optional& t, const Tensor& x, int64_t c, const char* name) {
  if (t) check_channels(*t, x, c, name);
}

// Scratch of at least `bytes` bytes.
inline void check_scratch(const Tensor& t, const Tensor& x, int64_t bytes, const char* name) {
  check_same_device(t, x, name);
  FASTRES_CHECK_TYPE(t.scalar_type() == ScalarType::Byte, name, " is ", name_of(t.scalar_type()), ", expected uint8");
  FASTRES_CHECK(t.is_contiguous() && t.numel() >= bytes, name, " has ", t.numel(), " bytes, needs ", bytes);
}

inline void* pointer(const Tensor& t) { return t.data_ptr(); }
inline void* pointer(const Optional& t) { return t ? t->data_ptr() : nullptr; }

// Launches `count` records, each overlapping with the one before where it can, on the current stream of the tensor's
// device.
inline void run_now(const Record* records, int64_t count, const Tensor& x) {
#ifdef FASTRES_EMULATOR
  (void)x;
  launch(records, count, nullptr);
#else
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  launch(records, count, static_cast<cudaStream_t>(stream));
#endif
}
inline void run_now(const Record& record, const Tensor& x) { run_now(&record, 1, x); }

}  // namespace fastres
