// What every op does first: check its tensors, find their memory order, choose the element type.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "vec.h"

namespace fastres {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Elements below which a second thread costs more than it saves (ATen's own figure).
constexpr int64_t kGrain = 32768;

// Python turns these prefixes into a TypeError or a ValueError (backends/cpu_ops.py).
#define FASTRES_CHECK_TYPE(ok, ...) FASTRES_CHECK_(ok, "TypeError: ", __VA_ARGS__)
#define FASTRES_CHECK(ok, ...) FASTRES_CHECK_(ok, "ValueError: ", __VA_ARGS__)
#define FASTRES_CHECK_(ok, kind, ...)                          \
  do {                                                         \
    if (__builtin_expect(!(ok), 0)) fail(kind, ##__VA_ARGS__); \
  } while (0)

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

inline ScalarType acc_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A dense tensor [N, C, *spatial] in one of two orders: N planes of C, or rows of C channels.
struct Dense {
  ScalarType type;
  int64_t n = 0, c = 0, s = 1;  // s: product of the spatial sizes
  bool nhwc = false;            // channels innermost
  int64_t numel() const { return n * c * s; }
  int64_t rows() const { return n * s; }
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
  FASTRES_CHECK(x.is_cpu(), name, " must be a CPU tensor");
  const ScalarType type = x.scalar_type();
  FASTRES_CHECK_TYPE(type == ScalarType::Float || type == ScalarType::Double ||
                         type == ScalarType::BFloat16 || type == ScalarType::Half,
                     name, " must be float32, float64, bfloat16 or float16");
  const auto sizes = x.sizes();
  FASTRES_CHECK(sizes.size() >= 2, name, " must have the shape [N, C, *spatial], it has ", shape_of(sizes));
  Dense d{type, sizes[0], sizes[1]};
  for (size_t i = 2; i < sizes.size(); ++i) d.s *= sizes[i];
  const bool planes = is_dense(x, false);
  FASTRES_CHECK(planes || is_dense(x, true), name,
                " must be dense, contiguous or channels_last, it has the shape ", shape_of(sizes),
                " and the strides ", shape_of(x.strides()));
  // With one pixel both orders are the same memory: long rows are the faster view.
  d.nhwc = !planes || (d.s == 1 && d.c > 1);
  return d;
}

inline void check_like(const Tensor& t, const Tensor& x, const Dense& d, const char* name) {
  FASTRES_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  FASTRES_CHECK_TYPE(t.scalar_type() == d.type, name, " is ", name_of(t.scalar_type()), ", expected ",
                     name_of(d.type));
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

// A vector of per-channel numbers, fp32 (fp64 if the activations are).
inline void check_channels(const Tensor& t, const Dense& d, const char* name) {
  FASTRES_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  FASTRES_CHECK_TYPE(t.scalar_type() == acc_type(d.type), name, " is ", name_of(t.scalar_type()),
                     ", expected ", name_of(acc_type(d.type)));
  const auto sizes = t.sizes();
  FASTRES_CHECK(sizes.size() == 1 && sizes[0] == d.c, name, " has the shape ", shape_of(sizes),
                ", expected [", d.c, "]");
  FASTRES_CHECK(d.c <= 1 || t.strides()[0] == 1, name, " must be contiguous");
}

inline void check_channels(const Optional& t, const Dense& d, const char* name) {
  if (t) check_channels(*t, d, name);
}

inline void* pointer(const Tensor& t) { return t.data_ptr(); }
inline void* pointer(const Optional& t) { return t ? t->data_ptr() : nullptr; }

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// f(T{}) with the element type.
template <class F>
void dispatch(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: fail("TypeError: ", "unexpected element type");
  }
}

}  // namespace fastres
