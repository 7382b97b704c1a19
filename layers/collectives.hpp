// Differentiable exchanges between ranks. Each function is the identity where `group` is nullptr, a group of one rank.
// Gradients follow the rule of tessera/ranks.hpp: of the sum of all ranks' losses.
// Letters: N rows of all ranks together, n_r rows of rank r.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "tessera/context.hpp"
#include "tessera/ranks.hpp"

namespace tessera {

// The sum over the ranks, on every rank; the gradient is the sum of theirs.
at::Tensor all_reduce(const at::Tensor& x, const Group* group);

// x [n_r, ...] -> [N, ...], the ranks' rows one after the other; rows[r] = n_r, known to all. The gradient of a row is the sum of all ranks'.
at::Tensor gather_rows(const at::Tensor& x, const std::vector<int64_t>& rows, const Group* group);

// y [N, ...], a summand of every rank -> [n_r, ...], the sums of this rank's rows. The reverse of gather_rows and its gradient.
at::Tensor reduce_scatter_rows(const at::Tensor& y, const std::vector<int64_t>& rows, const Group* group);

// x: in_rows[r] rows for rank r one after the other -> out_rows[r] rows from rank r one after the other. The gradient goes the way back.
at::Tensor exchange_rows(const at::Tensor& x, const std::vector<int64_t>& in_rows, const std::vector<int64_t>& out_rows, const Group* group);

// Tokens cut over the tensor-parallel ranks, as `sequence_range` cuts ctx.sequence_tokens(): [n_r, D] -> [N, D] ...
at::Tensor gather_tokens(Context& ctx, const at::Tensor& x_nd);
// ... summands [N, D] -> the sums of this rank's tokens [n_r, D] ...
at::Tensor reduce_scatter_tokens(Context& ctx, const at::Tensor& y_nd);
// ... what every rank computed alike [N, D] -> this rank's tokens [n_r, D].
at::Tensor keep_tokens(Context& ctx, const at::Tensor& y_nd);

}  // namespace tessera
