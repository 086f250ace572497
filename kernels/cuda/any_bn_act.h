// Batch normalisation with residual and activation, in passes over a dense tensor [N, C, S] or [N, S, C] (`nhwc`).
#pragma once

#include "launch.h"

namespace fastres {

// Finishing: scale, shift and running statistics from mean and var, all [C].
struct BnFinalize {
  int c;
  const void *mean, *var, *weight, *bias;
  void *running_mean, *running_var;  // null or `running_type`, which is fp64 exactly where mean is
  double momentum, eps, unbiased;    // unbiased = count / (count - 1)
  void *invstd, *scale, *shift;
  Type running_type;
};

struct BnAct {
  int64_t n, c, s;
  int nhwc, act;
  double act_param;
  const void *x, *residual, *grad, *saved_out;                          // element type
  const void *scale, *shift;                                            // [C], forward
  const void *mean, *invstd, *weight, *bias;                            // [C], backward; weight and bias may be null
  void *mean_dy, *mean_dy_xhat;                                         // [C] or null: written with the sums, then read
  void *out, *grad_residual;                                            // element type
  void* partial;                                                        // [kMaxChunks, C, 3] of the computed type
  void* merged;                                                         // as partial; null: result0 and result1
  void *result0, *result1;                                              // [C]: mean, var or sum_dy, sum_dy_xhat
  BnFinalize finalize;                                                  // done with mean and var, if it has an invstd

  // Filled in by the record functions: the tensor as rows of vectors (NCHW: a row is one channel's plane).
  int64_t rows, cols;
  int width, chunks;
};

constexpr int kMaxChunks = 512;

// Scratch of the reducing passes over `values` values a channel: one item of three numbers a chunk and channel.
inline int64_t bn_reduce_scratch(int64_t values, int64_t c, Type type) {
  const int64_t chunks = values / 8 + 1 < kMaxChunks ? values / 8 + 1 : kMaxChunks;
  return chunks * c * 3 * (type == Type::kFp64 ? 8 : 4);
}

// From the moments of `chunks` runs of values a channel, partial [chunks, c, 3] in fp32 (how many, their mean, the sum of
// squared deviations from it), to mean and biased variance. Many runs are first merged to few, in `merged`.
struct MergeMoments {
  int64_t c;
  int chunks;
  void *partial, *merged;  // merged: [moments_parts, c, 3]
  float *mean, *var;
};
constexpr int moments_parts(int chunks) { return chunks > kMaxChunks ? 64 : 0; }
// Returns how many records it made.
int merge_moments_records(const MergeMoments& p, Record* records);

enum class BnPass { kForward, kBackward, kStats, kStatsFinish, kBackwardReduce, kBackwardReduceFinish };
Record bn_act_record(const BnAct& p, Type type, BnPass pass);
Record bn_reduce_record(const BnAct& p, Type type, BnPass pass);
Record bn_finalize_record(const BnFinalize& p, Type type);

}  // namespace fastres
