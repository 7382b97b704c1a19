// The scan where documents are cut over ranks: the scan from zero states, and what the entering states add. R heads a group, T rows of a piece.
#define AT_PER_OPERATOR_HEADERS  // the operators alone, not every function
#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

#include <vector>

#include "layers/collectives.hpp"
#include "layers/pieces.hpp"
#include "layers/ssd_scan.hpp"

namespace tessera {
namespace {

struct Rows {
  at::Tensor xbc_nc, d_nh, decay_nh;  // of this rank; d and d A in the inner dtype
  SsdSizes z;
  at::ScalarType dtype;

  // Columns of xbc as [groups, T, width], in the inner dtype.
  at::Tensor groups(int64_t row, int64_t rows, int64_t column, int64_t width) const {
    return xbc_nc.narrow(0, row, rows).narrow(1, column, z.num_groups * width).to(dtype).view({rows, z.num_groups, width}).transpose(0, 1);
  }
  int64_t inner() const { return z.num_heads * z.head_dim; }

  // What rows [row, row + T) leave: their state from zero, and the sum of their decays: [H P S + H].
  at::Tensor summary(int64_t row, int64_t rows) const {
    const int64_t R = z.num_heads / z.num_groups;
    const at::Tensor decay = decay_nh.narrow(0, row, rows);
    // The sum over the rows behind each one, from the back: a difference of long sums would lose what is left near the end.
    const at::Tensor later = rows == 0 ? decay : at::cat({decay.narrow(0, 1, rows - 1), at::zeros_like(decay.narrow(0, 0, 1))}).flip(0).cumsum(0).flip(0);
    const at::Tensor weight = (later.exp() * d_nh.narrow(0, row, rows)).view({rows, z.num_groups, R}).transpose(0, 1).unsqueeze(3);
    const at::Tensor x = groups(row, rows, 0, R * z.head_dim).view({z.num_groups, rows, R, z.head_dim});
    const at::Tensor state = at::bmm((x * weight).reshape({z.num_groups, rows, R * z.head_dim}).transpose(1, 2), groups(row, rows, inner(), z.state_size));
    return at::cat({state.flatten(), decay.sum(0)});
  }

  // What a state [H P S] that enters before rows [row, row + T) adds to their outputs: [T, H P].
  at::Tensor left_by(const at::Tensor& state, int64_t row, int64_t rows) const {
    const int64_t G = z.num_groups, R = z.num_heads / G;
    const at::Tensor C = groups(row, rows, inner() + G * z.state_size, z.state_size);
    const at::Tensor y = at::bmm(C, state.view({G, R * z.head_dim, z.state_size}).transpose(1, 2)).transpose(0, 1).reshape({rows, z.num_heads, z.head_dim});
    return (y * decay_nh.narrow(0, row, rows).cumsum(0).exp().unsqueeze(2)).reshape({rows, inner()});
  }
};

}  // namespace

at::Tensor ssd_scan(Context& ctx, const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h,
                    const at::Tensor& D_h, const SsdSizes& z, const at::Tensor& state_shps) {
  if (!ctx.cut()) return ssd_scan(xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h, z, ctx.spans(), state_shps);
  require_pieces("ssd_scan", ctx, xbc_nc, state_shps.defined());
  const at::Tensor y_ni = ssd_scan(xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h, z, ctx.spans());
  const auto dtype = y_ni.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor d_nh = at::softplus(dt_nh.to(dtype) + dt_bias_h.to(dtype), 1, 40).clamp(z.dt_min, z.dt_max);
  const Rows rows{.xbc_nc = xbc_nc, .d_nh = d_nh, .decay_nh = d_nh * A_log_h.to(dtype).exp().neg(), .z = z, .dtype = dtype};

  const auto chunks = pieces_of(*ctx.cut());
  const int64_t ranks = ctx.cut()->num_ranks(), last = 2 * ranks - 1, states = rows.inner() * z.state_size;
  const int64_t own[] = {ctx.cut()->rank(), last - ctx.cut()->rank()};
  std::vector<at::Tensor> summaries;
  for (const int64_t i : own) summaries.push_back(rows.summary(chunks[i].local + chunks[i].length - chunks[i].tail, chunks[i].tail));
  const at::Tensor all = gather_rows(at::stack(summaries), std::vector<int64_t>(static_cast<size_t>(ranks), 2), ctx.context_group());

  // The state behind each chunk in turn, as far as this rank needs it; a chunk without rows passes it on.
  std::vector<at::Tensor> parts;
  at::Tensor state;
  for (int64_t i = 0; i <= own[1]; ++i) {
    const Piece& chunk = chunks[i];
    if (i == own[0] || i == own[1]) {
      if (chunk.head > 0) parts.push_back(y_ni.narrow(0, chunk.local, chunk.head) + rows.left_by(state, chunk.local, chunk.head));
      parts.push_back(y_ni.narrow(0, chunk.local + chunk.head, chunk.length - chunk.head));
    }
    if (chunk.tail == 0) continue;
    const at::Tensor left = all[i < ranks ? 2 * chunk.rank : 2 * chunk.rank + 1], added = left.narrow(0, 0, states);
    if (!chunk.through()) state = added;
    else state = (state.view({z.num_heads, -1}) * left.narrow(0, states, z.num_heads).exp().unsqueeze(1)).flatten() + added;
  }
  // Joined even where no state entered, so that the gradients' exchange has every rank in it.
  parts.push_back(all.narrow(0, 0, 0).narrow(1, 0, rows.inner()));
  return at::cat(parts);
}

}  // namespace tessera
