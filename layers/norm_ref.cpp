#define AT_PER_OPERATOR_HEADERS  // the operators alone, not every function
#include <ATen/TensorOperators.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>

#include "layers/norm.hpp"

namespace tessera {
namespace {

at::ScalarType inner_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace

at::Tensor rms_norm_ref(const at::Tensor& x_nd, const at::Tensor& weight_d, double eps, at::ScalarType out_dtype) {
  const auto dtype = inner_type(x_nd);
  const at::Tensor x = x_nd.to(dtype);
  return (x * at::rsqrt(x.square().mean(-1, true) + eps) * weight_d.to(dtype)).to(out_dtype);
}

at::Tensor gated_rms_norm_ref(const at::Tensor& y_ni, const at::Tensor& z_ni, const at::Tensor& weight_i, int64_t group_size, double eps,
                              at::ScalarType out_dtype) {
  const auto dtype = inner_type(y_ni);
  const at::Tensor v = (y_ni.to(dtype) * at::silu(z_ni.to(dtype))).view({y_ni.size(0), y_ni.size(1) / group_size, group_size});
  const at::Tensor normed = v * at::rsqrt(v.square().mean(-1, true) + eps);
  return (normed.view(y_ni.sizes()) * weight_i.to(dtype)).to(out_dtype);
}

}  // namespace tessera
