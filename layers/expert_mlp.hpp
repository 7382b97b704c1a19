// The routed experts of a mixture as one operator: squared-ReLU feed-forwards over the tokens that were sent to them.
// Letters: N tokens, k experts per token, E experts, W width of an expert's input and output, F its inner width.
#pragma once
#include "layers/experts.hpp"
#include "tessera/context.hpp"
#include "tessera/weights.hpp"

namespace tessera {

// out[n] = sum_j weights[n, j] down_e relu(up_e x[n])^2 with e = the j-th expert of token n: x_nw [N, W], weights_nk [N, k] fp32 (fp64 for fp64), up_efw [E, F, W],
// down_ewf [E, W, F] -> [N, W] in the weights' dtype, to which x is cast. On a GPU in bf16 rows are gathered as they are multiplied, the square and the weights are
// part of the products, only up_e x is kept for the backward pass, and no count of rows reaches the host; elsewhere it is the composition of the operators in
// layers/experts.hpp and linear.hpp. Throws Error(kRuntime) where shapes do not fit.
at::Tensor expert_mlp(Context& ctx, const at::Tensor& x_nw, const at::Tensor& weights_nk, const Weight& up_efw, const Weight& down_ewf, const Dispatch& dispatch);
at::Tensor expert_mlp(const at::Tensor& x_nw, const at::Tensor& weights_nk, const at::Tensor& up_efw, const at::Tensor& down_ewf, const Dispatch& dispatch);
// The composition.
at::Tensor expert_mlp_ref(const at::Tensor& x_nw, const at::Tensor& weights_nk, const at::Tensor& up_efw, const at::Tensor& down_ewf, const Dispatch& dispatch);

}  // namespace tessera
