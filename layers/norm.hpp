// Root-mean-square norms, plain and gated. Statistics and products in fp32, one rounding at the end; fp64 inputs take the reference composition.
#pragma once
#include <ATen/core/Tensor.h>

#include "tessera/ranks.hpp"

namespace tessera {

// x / sqrt(mean(x^2) + eps) * weight over the last dimension.
// x_nd: [N, D] fp32 or bf16; weight_d: [D]. Returns [N, D] in out_dtype. Keeps x and one number a row for the backward pass.
// Throws Error(kRuntime) on shapes that do not fit. Source: arXiv:1910.07467.
at::Tensor rms_norm(const at::Tensor& x_nd, const at::Tensor& weight_d, double eps, at::ScalarType out_dtype);
at::Tensor rms_norm_ref(const at::Tensor& x_nd, const at::Tensor& weight_d, double eps, at::ScalarType out_dtype);

// Mamba2's output norm: v = y * silu(z), then v / sqrt(mean(v^2 over each group_size channels) + eps) * weight: the gate comes first.
// y_ni: [N, I] fp32, or bf16 with z in bf16; z_ni: [N, I] fp32 or bf16, rows may be strided; weight_i: [I]; group_size divides I. Returns [N, I] in out_dtype.
// Keeps y, z and one number a group for the backward pass. Throws as above. Source: arXiv:2405.21060, section 7.
at::Tensor gated_rms_norm(const at::Tensor& y_ni, const at::Tensor& z_ni, const at::Tensor& weight_i, int64_t group_size, double eps,
                          at::ScalarType out_dtype);
at::Tensor gated_rms_norm_ref(const at::Tensor& y_ni, const at::Tensor& z_ni, const at::Tensor& weight_i, int64_t group_size, double eps,
                              at::ScalarType out_dtype);
// The same where the group_size channels of a group lie over the ranks of `part`, as many on each: y, z and weight hold this rank's group_size /
// part->size(), and the sum of squares is summed over the ranks, and its gradient. nullptr: as above. Throws Error(kCollective) too.
at::Tensor gated_rms_norm(const at::Tensor& y_ni, const at::Tensor& z_ni, const at::Tensor& weight_i, int64_t group_size, double eps,
                          at::ScalarType out_dtype, const Group* part);

}  // namespace tessera
