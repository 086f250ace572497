// Global average pool and the linear layer after it, for small batches.
#pragma once

#include "launch.h"

namespace fastres {

struct PoolLinear {
  const void *x, *weight;  // [n, pixels, c], [k, c]
  const float* bias;       // [k] or null
  void* out;               // [n, k]
  float* partial;          // [parts, n, k]
  int* counters;           // [row_blocks], zero
  int n, pixels, c, k, parts, row_blocks;
};

constexpr int kPoolRows = 64;   // outputs a block
constexpr int kPoolLanes = 16;  // threads that share an output, 16 bytes of channels each

FASTRES_BOTH constexpr int pool_parts(int c, int element_bytes) {
  return static_cast<int>(ceil_div(c, kPoolLanes * 16 / element_bytes));
}

Record pool_linear_record(PoolLinear p, Type type);

}  // namespace fastres
