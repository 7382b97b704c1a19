#include "layers/collectives.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <numeric>

namespace tessera {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

int64_t address(const Group* group) { return reinterpret_cast<int64_t>(group); }
const Group& group_of(AutogradContext* ctx) { return *reinterpret_cast<const Group*>(ctx->saved_data["group"].toInt()); }

std::vector<int64_t> with_rows(const at::Tensor& like, int64_t rows) {
  auto shape = like.sizes().vec();
  shape[0] = rows;
  return shape;
}

// x with `rows` rows, the new ones zero: collectives take equal parts.
at::Tensor padded(const at::Tensor& x, int64_t rows) {
  if (x.size(0) == rows) return x.contiguous();
  std::vector<int64_t> pad(static_cast<size_t>(2 * x.dim()), 0);
  pad.back() = rows - x.size(0);
  return at::constant_pad_nd(x, pad);
}

at::Tensor gather(const at::Tensor& x, const std::vector<int64_t>& rows, const Group& group) {
  const auto most = *std::max_element(rows.begin(), rows.end());
  const bool even = std::all_of(rows.begin(), rows.end(), [most](int64_t n) { return n == most; });
  auto all = at::empty(with_rows(x, most * group.size()), x.options());
  if (all.numel() > 0) group.all_gather(all, padded(x, most));
  if (even) return all;
  std::vector<at::Tensor> parts;
  for (int64_t r = 0; r < group.size(); ++r) parts.push_back(all.narrow(0, r * most, rows[r]));
  return at::cat(parts, 0);
}

at::Tensor scatter_sum(const at::Tensor& y, const std::vector<int64_t>& rows, const Group& group) {
  const auto most = *std::max_element(rows.begin(), rows.end());
  const bool even = std::all_of(rows.begin(), rows.end(), [most](int64_t n) { return n == most; });
  at::Tensor all = y;
  if (!even) {
    std::vector<at::Tensor> parts;
    for (int64_t r = 0, row = 0; r < group.size(); row += rows[r++]) parts.push_back(padded(y.narrow(0, row, rows[r]), most));
    all = at::cat(parts, 0);
  }
  auto own = at::empty(with_rows(y, most), y.options());
  if (own.numel() > 0) group.reduce_scatter(own, all);
  return own.narrow(0, 0, rows[group.rank()]);
}

struct AllReduce : torch::autograd::Function<AllReduce> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, int64_t group) {
    ctx->saved_data["group"] = group;
    auto sum = x.clone(at::MemoryFormat::Contiguous);
    if (sum.numel() > 0) group_of(ctx).all_reduce(sum);
    return sum;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto sum = grads[0].clone(at::MemoryFormat::Contiguous);
    if (sum.numel() > 0) group_of(ctx).all_reduce(sum);
    return {sum, {}};
  }
};

struct GatherRows : torch::autograd::Function<GatherRows> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const std::vector<int64_t>& rows, int64_t group) {
    ctx->saved_data["group"] = group;
    ctx->saved_data["rows"] = rows;
    return gather(x, rows, group_of(ctx));
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {scatter_sum(grads[0].contiguous(), ctx->saved_data["rows"].toIntVector(), group_of(ctx)), {}, {}};
  }
};

struct ScatterRows : torch::autograd::Function<ScatterRows> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& y, const std::vector<int64_t>& rows, int64_t group) {
    ctx->saved_data["group"] = group;
    ctx->saved_data["rows"] = rows;
    return scatter_sum(y.contiguous(), rows, group_of(ctx));
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {gather(grads[0].contiguous(), ctx->saved_data["rows"].toIntVector(), group_of(ctx)), {}, {}};
  }
};

struct ExchangeRows : torch::autograd::Function<ExchangeRows> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const std::vector<int64_t>& in_rows, const std::vector<int64_t>& out_rows, int64_t group) {
    ctx->saved_data["group"] = group;
    ctx->saved_data["in"] = in_rows;
    ctx->saved_data["out"] = out_rows;
    auto out = at::empty(with_rows(x, std::accumulate(out_rows.begin(), out_rows.end(), int64_t{0})), x.options());
    group_of(ctx).all_to_all(out, x.contiguous(), out_rows, in_rows);
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto in_rows = ctx->saved_data["in"].toIntVector();
    auto out = at::empty(with_rows(grads[0], std::accumulate(in_rows.begin(), in_rows.end(), int64_t{0})), grads[0].options());
    group_of(ctx).all_to_all(out, grads[0].contiguous(), in_rows, ctx->saved_data["out"].toIntVector());
    return {out, {}, {}, {}};
  }
};

std::vector<int64_t> token_rows(const Context& ctx, const Group& group) {
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < group.size(); ++r) {
    const Range range = sequence_range(ctx.sequence_tokens(), group.size(), r);
    rows.push_back(range.end - range.begin);
  }
  return rows;
}

}  // namespace

at::Tensor all_reduce(const at::Tensor& x, const Group* group) { return group ? AllReduce::apply(x, address(group)) : x; }

at::Tensor gather_rows(const at::Tensor& x, const std::vector<int64_t>& rows, const Group* group) {
  return group ? GatherRows::apply(x, rows, address(group)) : x;
}

at::Tensor reduce_scatter_rows(const at::Tensor& y, const std::vector<int64_t>& rows, const Group* group) {
  return group ? ScatterRows::apply(y, rows, address(group)) : y;
}

at::Tensor exchange_rows(const at::Tensor& x, const std::vector<int64_t>& in_rows, const std::vector<int64_t>& out_rows, const Group* group) {
  return group ? ExchangeRows::apply(x, in_rows, out_rows, address(group)) : x;
}

at::Tensor gather_tokens(Context& ctx, const at::Tensor& x_nd) {
  const Group* group = ctx.tensor_group();
  return group ? gather_rows(x_nd, token_rows(ctx, *group), group) : x_nd;
}

at::Tensor reduce_scatter_tokens(Context& ctx, const at::Tensor& y_nd) {
  const Group* group = ctx.tensor_group();
  return group ? reduce_scatter_rows(y_nd, token_rows(ctx, *group), group) : y_nd;
}

at::Tensor keep_tokens(Context& ctx, const at::Tensor& y_nd) {
  const Group* group = ctx.tensor_group();
  if (!group) return y_nd;
  const Range range = sequence_range(ctx.sequence_tokens(), group->size(), group->rank());
  return y_nd.narrow(0, range.begin, range.end - range.begin);
}

}  // namespace tessera
