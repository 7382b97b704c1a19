// The optimizer's step on the GPU: tensors to pointers.
#include "layers/cuda/adamw.hpp"

#include <cmath>

#include "layers/cuda/table.hpp"
#include "layers/cuda/tensors.hpp"

namespace tessera::gpu {
namespace {

void step(const at::Tensor& data, const at::Tensor& grad, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& compute, const at::Tensor& norm, const AdamWStep& s) {
  const Launches launches("adamw", data);
  const double t = static_cast<double>(s.t), unbiased1 = 1 - std::pow(s.beta1, t), unbiased2 = 1 - std::pow(s.beta2, t);
  const auto fp32 = [](double v) { return static_cast<float>(v); };
  const AdamWFactors factors{.beta1 = fp32(s.beta1), .one_less_beta1 = fp32(1 - s.beta1), .beta2 = fp32(s.beta2), .one_less_beta2 = fp32(1 - s.beta2), .eps = fp32(s.eps),
                             .decay = fp32(1 - s.lr * s.weight_decay), .rate = fp32(s.lr / unbiased1), .root = fp32(1 / std::sqrt(unbiased2)), .max_norm = fp32(s.max_norm)};
  const AdamWBuffers buffers{.data = data.mutable_data_ptr<float>(), .grad = grad.const_data_ptr<float>(), .exp_avg = exp_avg.mutable_data_ptr<float>(),
                             .exp_avg_sq = exp_avg_sq.mutable_data_ptr<float>(), .compute = compute.defined() ? static_cast<bf16*>(compute.mutable_data_ptr()) : nullptr, .n = data.numel()};
  launches.check(adamw(buffers, factors, norm.const_data_ptr<float>(), launches.stream()));
}

}  // namespace

void add_adamw(GpuKernels& table) { table.adamw = step; }

}  // namespace tessera::gpu
