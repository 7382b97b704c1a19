// Pointwise activations.
#pragma once
#include <ATen/core/Tensor.h>

namespace tessera {

// relu(x)^2, any shape; keeps x alone for the backward pass. fp32 inside, rounded once to x's dtype.
// Squared ReLU: So et al., "Primer", arXiv:2109.08668.
at::Tensor relu2(const at::Tensor& x);
// The plain composition, differentiable in any dtype.
at::Tensor relu2_ref(const at::Tensor& x);

}  // namespace tessera
