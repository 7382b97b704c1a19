// Gradients of a function of tensors: by autograd, and by central differences in fp64.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <vector>

namespace tessera {

using TensorFn = std::function<at::Tensor(const std::vector<at::Tensor>&)>;

struct WithGradients {
  at::Tensor output;
  std::vector<at::Tensor> gradients;  // of sum(output * cotangent) for every input
};

// Inputs are cut off and made to require gradients.
inline WithGradients with_gradients(const TensorFn& fn, const std::vector<at::Tensor>& inputs, const at::Tensor& cotangent) {
  std::vector<at::Tensor> leaves;
  for (const at::Tensor& x : inputs) leaves.push_back(x.detach().requires_grad_());
  const at::Tensor out = fn(leaves);
  return {out.detach(), torch::autograd::grad({out}, leaves, {cotangent.to(out.scalar_type())})};
}

// The gradient of sum(fn(inputs) * cotangent) for inputs[which], element by element. fp64 inputs.
inline at::Tensor finite_difference(const TensorFn& fn, std::vector<at::Tensor> inputs, size_t which, const at::Tensor& cotangent,
                                    double step = 1e-5) {
  at::AutoGradMode no_grad(false);
  inputs[which] = inputs[which].detach().clone();
  at::Tensor gradient = at::empty_like(inputs[which]), x = inputs[which].view(-1), out = gradient.view(-1);
  const auto value = [&] { return fn(inputs).mul(cotangent).sum().item<double>(); };
  for (int64_t i = 0; i < x.numel(); ++i) {
    const double at_rest = x[i].item<double>();
    x[i].fill_(at_rest + step);
    const double above = value();
    x[i].fill_(at_rest - step);
    const double below = value();
    x[i].fill_(at_rest);
    out[i].fill_((above - below) / (2 * step));
  }
  return gradient;
}

}  // namespace tessera
