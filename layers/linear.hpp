// Products of activations with a layer's matrices. Every matrix of a block passes here, so that low-rank adapters, low-precision
// compute and overlapped tensor parallelism have one place to live.
// Letters: N tokens, M rows sorted by expert, D input width, O output width, E experts.
#pragma once
#include <ATen/core/Tensor.h>

#include "tessera/context.hpp"
#include "tessera/weights.hpp"

namespace tessera {

// y = x W^T + b: x_nd [N, D], w_od [O, D], bias_o [O] or undefined -> [N, O] in the weight's dtype, to which x is cast.
// Throws Error(kRuntime) with the shapes when they do not fit.
at::Tensor linear(Context& ctx, const at::Tensor& x_nd, const Weight& w_od, const Weight& bias_o = {});
at::Tensor linear(const at::Tensor& x_nd, const at::Tensor& w_od, const at::Tensor& bias_o = {});

// The same for the last product of a block whose output is a partial sum over the tensor-parallel ranks: each adds bias / tp, so that
// the sum holds the bias once and its gradients sum to the whole.
at::Tensor partial_sum_linear(Context& ctx, const at::Tensor& x_nd, const Weight& w_od, const Weight& bias_o = {});

// Rows of expert e times W_e^T: x_md [M, D] with the rows of expert 0 first, w_eod [E, O, D], counts_e int64 [E] (any device; where
// x is on a GPU in bf16 nothing waits for it, else it is read on the host) with sum M -> [M, O] in the weight's dtype. An expert may have no rows: its gradient is zero.
// Throws Error(kRuntime) with the shapes when they do not fit, and with the counts where they are on the host.
at::Tensor grouped_linear(Context& ctx, const at::Tensor& x_md, const Weight& w_eod, const at::Tensor& counts_e);
at::Tensor grouped_linear(const at::Tensor& x_md, const at::Tensor& w_eod, const at::Tensor& counts_e);

}  // namespace tessera
