// Depthwise causal convolution over the tokens of each document, with optional bias and SiLU.
#pragma once
#include <ATen/core/Tensor.h>

#include "tessera/context.hpp"
#include "tessera/spans.hpp"

namespace tessera {

// out[i, c] = act(bias[c] + sum_k weight[c, 0, k] * x[i - (width-1) + k, c]); what lies before a document's first token counts as zero.
// x_nc: [N, C] fp32 or bf16, rows may be strided (a slice of a packed matrix); weight_c1w: [C, 1, width], width >= 1; bias_c: [C] or undefined.
// Returns [N, C] in x's dtype: fp32 inside, one rounding. fp64 inputs take the reference composition. Keeps only its inputs for the backward pass.
// state_scw: undefined, or contiguous [slots, C, width-1], the last inputs of a sequence, oldest first: a span with start 0 begins from zeros, another
// from its slot; each slot then holds the inputs that its next span needs (one span a slot). No gradient flows in that case.
// Throws Error(kRuntime) that names the shape which does not fit.
at::Tensor causal_conv1d(const at::Tensor& x_nc, const at::Tensor& weight_c1w, const at::Tensor& bias_c, const Spans& spans, bool silu,
                         const at::Tensor& state_scw = {});
at::Tensor causal_conv1d_ref(const at::Tensor& x_nc, const at::Tensor& weight_c1w, const at::Tensor& bias_c, const Spans& spans, bool silu,
                             const at::Tensor& state_scw = {});

// Over the rows of ctx: where they are pieces of documents, what a piece needs of the rows before it comes from the ranks that hold them.
// The gradient reaches those ranks. Throws as above, and Error(kCollective).
at::Tensor causal_conv1d(Context& ctx, const at::Tensor& x_nc, const at::Tensor& weight_c1w, const at::Tensor& bias_c, bool silu,
                         const at::Tensor& state_scw = {});

}  // namespace tessera
