// rms_norm and gated_rms_norm on the GPU: tensors to pointers.
#include "layers/cuda/norm.hpp"

#include <ATen/ops/empty.h>

#include "layers/cuda/table.hpp"
#include "layers/cuda/tensors.hpp"

namespace tessera::gpu {
namespace {

NormRows rows_of(const at::Tensor& t) { return t.defined() ? NormRows{t.const_data_ptr(), type_of(t), t.stride(0)} : NormRows{nullptr, Type::kFloat, 0}; }

// Tensors as kernels take them, kept for as long as their pointers are used.
struct Prepared {
  Prepared(const at::Tensor& y_ni, const at::Tensor& z_ni, const at::Tensor& weight_i, int64_t group_size)
      : y(unit_stride(y_ni.detach())), weight(weight_i.detach().to(weight_i.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat).contiguous()) {
    if (z_ni.defined()) z = unit_stride(z_ni.detach());
    in = {.y = rows_of(y), .z = rows_of(z), .weight = weight.const_data_ptr(), .weight_type = type_of(weight)};
    shape = {.N = y.size(0), .groups = y.size(1) / group_size, .D = group_size};
  }
  const char* op() const { return z.defined() ? "gated_rms_norm" : "rms_norm"; }
  at::Tensor y, z, weight;
  NormInputs in{};
  NormShape shape{};
};

std::array<at::Tensor, 2> forward(const at::Tensor& y_ni, const at::Tensor& z_ni, const at::Tensor& weight_i, int64_t group_size, double eps, at::ScalarType out_dtype) {
  const Prepared p(y_ni, z_ni, weight_i, group_size);
  const Launches launches(p.op(), y_ni);
  at::Tensor out = at::empty(p.y.sizes(), p.y.options().dtype(out_dtype)), rstd = at::empty({p.shape.N, p.shape.groups}, p.y.options().dtype(at::kFloat));
  launches.check(norm_forward(p.shape, p.in, static_cast<float>(eps), out.mutable_data_ptr(), type_of(out), rstd.mutable_data_ptr<float>(), launches.stream()));
  return {out, rstd};
}

std::array<at::Tensor, 3> backward(const at::Tensor& y_ni, const at::Tensor& z_ni, const at::Tensor& weight_i, int64_t group_size, const at::Tensor& rstd_ng,
                                   const at::Tensor& dout_ni) {
  const Prepared p(y_ni, z_ni, weight_i, group_size);
  const Launches launches(p.op(), y_ni);
  const at::Tensor dout = unit_stride(dout_ni);
  at::Tensor dy = at::empty(p.y.sizes(), p.y.options()), dz;
  if (p.z.defined()) dz = at::empty(p.z.sizes(), p.z.options());
  at::Tensor partials = at::empty({norm_partials(p.shape), p.y.size(1)}, p.y.options().dtype(at::kFloat));
  launches.check(norm_backward(p.shape, p.in, rstd_ng.const_data_ptr<float>(), rows_of(dout), dy.mutable_data_ptr(), dz.defined() ? dz.mutable_data_ptr() : nullptr,
                               partials.mutable_data_ptr<float>(), launches.stream()));
  return {dy, dz, sum_partials(launches, partials, weight_i)[0]};
}

}  // namespace

void add_norm(GpuKernels& table) {
  table.norm_forward = forward;
  table.norm_backward = backward;
}

}  // namespace tessera::gpu
