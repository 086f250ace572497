#pragma once

#include "launch.h"

namespace fastres {

// out = max(a + b, 0), `count` elements; with `backward` out = b > 0 ? a : 0 (a: gradient, b: the forward's output).
struct AddRelu {
  const void *a, *b;
  void* out;
  int64_t count;
};
Record add_relu_record(const AddRelu& p, Type type, bool backward);

}  // namespace fastres
