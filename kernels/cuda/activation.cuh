// Activations by code (fastres/activation.py): value and derivative. NaN goes through all of them, as in PyTorch.
#pragma once

#include "types.cuh"

namespace fastres {

enum Activation { kIdentity, kRelu, kRelu6, kSilu, kGelu, kLeakyRelu, kGeluTanh, kHardswish, kActivations };

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588;

__host__ __device__ inline float fast_exp(float v) { return expf(v); }
__host__ __device__ inline double fast_exp(double v) { return exp(v); }
__host__ __device__ inline float error_function(float v) { return erff(v); }
__host__ __device__ inline double error_function(double v) { return erf(v); }
__host__ __device__ inline float hyperbolic_tangent(float v) { return tanhf(v); }
__host__ __device__ inline double hyperbolic_tangent(double v) { return tanh(v); }

template <class A>
__host__ __device__ inline A relu(A z) {
  return z < A(0) ? A(0) : z;
}

template <class A>
__host__ __device__ inline A activate(int act, A z, A param) {
  switch (act) {
    case kRelu: return relu(z);
    case kRelu6: return z < A(0) ? A(0) : (z > A(6) ? A(6) : z);
    case kSilu: return z / (A(1) + fast_exp(-z));
    case kGelu: return A(0.5) * z * (A(1) + error_function(z * A(kSqrtHalf)));
    case kLeakyRelu: return z > A(0) ? z : z * param;
    case kGeluTanh:
      return A(0.5) * z * (A(1) + hyperbolic_tangent(A(kSqrt2OverPi) * (z + A(0.044715) * z * z * z)));
    case kHardswish: return z * (z <= A(-3) ? A(0) : (z >= A(3) ? A(1) : (z + A(3)) / A(6)));
    default: return z;
  }
}

// d activate / dz; PyTorch's choice at the kinks (0 at 0 for ReLU, at 0 and 6 for ReLU6).
template <class A>
__host__ __device__ inline A activate_slope(int act, A z, A param) {
  switch (act) {
    case kRelu: return z <= A(0) ? A(0) : A(1);
    case kRelu6: return z <= A(0) || z >= A(6) ? A(0) : A(1);
    case kSilu: {
      const A s = A(1) / (A(1) + fast_exp(-z));
      return s * (A(1) + z * (A(1) - s));
    }
    case kGelu:
      return A(0.5) * (A(1) + error_function(z * A(kSqrtHalf))) + z * A(kInvSqrt2Pi) * fast_exp(A(-0.5) * z * z);
    case kLeakyRelu: return z > A(0) ? A(1) : param;
    case kGeluTanh: {
      const A t = hyperbolic_tangent(A(kSqrt2OverPi) * (z + A(0.044715) * z * z * z));
      return A(0.5) * (A(1) + t) + A(0.5) * z * (A(1) - t * t) * A(kSqrt2OverPi) * (A(1) + A(3 * 0.044715) * z * z);
    }
    case kHardswish: return z <= A(-3) ? A(0) : (z >= A(3) ? A(1) : (A(2) * z + A(3)) / A(6));
    default: return A(1);
  }
}

}  // namespace fastres
