#pragma once

#include "launch.h"

namespace fastres {

struct MaxPool {
  const void* x;
  void* out;
  int64_t pixels;  // of the output, all images
  int h, w, c, p, q, r, s, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};
Record max_pool_record(const MaxPool& p, Type type);

}  // namespace fastres
