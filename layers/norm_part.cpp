// The gated norm of a group that lies over several ranks, from ATen operators.
#define AT_PER_OPERATOR_HEADERS  // the operators alone, not every function
#include <ATen/TensorOperators.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "layers/collectives.hpp"
#include "layers/norm.hpp"
#include "tessera/error.hpp"

namespace tessera {

at::Tensor gated_rms_norm(const at::Tensor& y_ni, const at::Tensor& z_ni, const at::Tensor& weight_i, int64_t group_size, double eps,
                          at::ScalarType out_dtype, const Group* part) {
  if (!part) return gated_rms_norm(y_ni, z_ni, weight_i, group_size, eps, out_dtype);
  if (y_ni.dim() != 2 || z_ni.sizes() != y_ni.sizes() || weight_i.dim() != 1 || weight_i.size(0) != y_ni.size(1) || y_ni.size(1) * part->size() != group_size)
    throw Error(ExitCode::kRuntime, fmt::format("[gated_rms_norm] over the {} ranks of {}, y and z must be [N, I] and weight [I] with {} I = group_size {}, got [{}], [{}] and [{}]",
                                                part->size(), part->name(), part->size(), group_size, fmt::join(y_ni.sizes(), ", "), fmt::join(z_ni.sizes(), ", "),
                                                fmt::join(weight_i.sizes(), ", ")));
  const auto dtype = y_ni.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor v_ni = y_ni.to(dtype) * at::silu(z_ni.to(dtype));
  const at::Tensor squares_n1 = all_reduce(v_ni.square().sum(-1, true), part);
  return (v_ni * at::rsqrt(squares_n1 / static_cast<double>(group_size) + eps) * weight_i.to(dtype)).to(out_dtype);
}

}  // namespace tessera
