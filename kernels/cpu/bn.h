// The passes of batch normalisation over memory that is known to fit: what the ops of one pass and those of a
// whole step share. Pointers to activations are of `d.type`, to numbers per channel of its accumulation type;
// null where an argument is not there.
#pragma once

#include "activation.h"
#include "tensor.h"

namespace fastres {

inline void check_act(int64_t act) {
  FASTRES_CHECK(act >= 0 && act < kActivations, "act is ", act, ", it takes 0 to ", kActivations - 1);
}

// Mean and biased variance of every channel; there must be values.
void bn_stats_pass(const Dense& d, const void* x, void* mean, void* var);

struct BnFinalize {
  const void *mean, *var, *weight, *bias;
  void *running_mean, *running_var;  // of `running` type
  ScalarType running;
  double momentum, eps;
  int64_t count;
  void *invstd, *scale, *shift;
};
void bn_finalize_pass(ScalarType type, int64_t channels, const BnFinalize& p);

// out = act(x * scale + shift + residual)
void bn_act_pass(const Dense& d, const void* x, const void* residual, const void* scale, const void* shift,
                 int64_t act, double act_param, void* out);

struct BnBackward {
  Dense d;
  const void *grad, *x, *residual, *out;
  const void *mean, *invstd, *weight, *bias;
  int64_t act;
  double param;
};
// dz (null: not wanted) and its sums.
void bn_reduce_pass(const BnBackward& b, void* sum_dy, void* sum_dy_xhat, void* dz);
// dx, and dz (null: not wanted).
void bn_dx_pass(const BnBackward& b, const void* mean_dy, const void* mean_dy_xhat, void* grad_x, void* dz);

}  // namespace fastres
