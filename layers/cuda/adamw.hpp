// The optimizer's step over a flat buffer, on plain pointers.
#pragma once
#include "layers/cuda/types.hpp"

namespace tessera::gpu {

// Of n values, all fp32: the masters, their gradients and moments; compute: their bf16 copy, or null.
struct AdamWBuffers {
  float* data;
  const float* grad;
  float *exp_avg, *exp_avg_sq;
  bf16* compute;
  int64_t n;
};

// Factors of a step, see AdamWStep in layers/gpu.hpp. decay = 1 - lr * weight_decay, rate = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t).
struct AdamWFactors {
  float beta1, one_less_beta1, beta2, one_less_beta2, eps, decay, rate, root, max_norm;
};

// norm: fp32 on the device. Where it is not finite nothing is written.
Status adamw(const AdamWBuffers& buffers, const AdamWFactors& factors, const float* norm, Stream stream);

}  // namespace tessera::gpu
