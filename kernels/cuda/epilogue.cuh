// From fp32 sums to the output: act(sum * scale[k] + shift[k] + residual), rounded once.
#pragma once

#include "activation.cuh"

namespace fastres {

struct Epilogue {
  const void* residual;
  const float *scale, *shift;
  void* out;
  int act;
  float act_param;
};

// V consecutive channels from `channel` on of the output element `at` ([pixel, channel] flat). `count` < V: only so
// many of them exist. `aligned`: at is a multiple of V, and rows are too.
template <class T, int V>
FASTRES_DEVICE void finish(const Epilogue& e, const float (&sum)[V], int64_t at, int channel, int count, bool aligned) {
  const T* residual = static_cast<const T*>(e.residual);
  T* out = static_cast<T*>(e.out);
  if (aligned && count >= V) {
    Pack<T, V> r;
    if (residual) r = load<T, V>(residual + at);
    Pack<T, V> y;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      float z = sum[j] * e.scale[channel + j] + e.shift[channel + j];
      if (residual) z += widen(r.v[j]);
      // ReLU and identity without the switch: it costs code in every unrolled copy.
      if (e.act > kRelu) {
        z = activate(e.act, z, e.act_param);
      } else if (e.act == kRelu) {
        z = relu(z);
      }
      y.v[j] = narrow<T>(z);
    }
    store<T, V>(out + at, y);
    return;
  }
#pragma unroll 1
  for (int j = 0; j < V; ++j) {
    if (j >= count) return;
    float z = sum[0];
    // Registers have no index: pick sum[j].
#pragma unroll
    for (int i = 1; i < V; ++i)
      if (i == j) z = sum[i];
    z = z * e.scale[channel + j] + e.shift[channel + j];
    if (residual) z += widen(residual[at + j]);
    out[at + j] = narrow<T>(activate(e.act, z, e.act_param));
  }
}

}  // namespace fastres
