// Kernels of rms_norm and gated_rms_norm, on plain pointers. N rows of I channels in groups of D: rms_norm has one group, a row.
#pragma once
#include "layers/cuda/types.hpp"

namespace tessera::gpu {

struct NormShape {
  int64_t N, groups, D;  // a row is groups * D channels
};

// Channels of every row, rows `stride` elements apart, a row's channels consecutive.
struct NormRows {
  const void* data;
  Type type;
  int64_t stride;
};

// y [N, I]; z like it (in bf16 where y is), or null data: no gate. weight [I] contiguous.
struct NormInputs {
  NormRows y, z;
  const void* weight;
  Type weight_type;
};

// out [N, I] contiguous in out_type, rstd fp32 [N, groups] = 1 / sqrt(mean of the squares + eps).
Status norm_forward(const NormShape& shape, const NormInputs& in, float eps, void* out, Type out_type, float* rstd, Stream stream);

// Rows of `partials`, each [I].
int64_t norm_partials(const NormShape& shape);
// dy and dz (null without z) contiguous in the types of y and z; partials fp32 [norm_partials, I], which sum to the weight's gradient.
Status norm_backward(const NormShape& shape, const NormInputs& in, const float* rstd, const NormRows& dout, void* dy, void* dz, float* partials, Stream stream);

}  // namespace tessera::gpu
