// Attention where documents are cut over ranks. A piece that goes on with a document attends to keys of other ranks, then to its own; every other
// span of a rank begins its document, and is attended to as ever. B keys before a piece of n tokens, M = B + n.
#define AT_PER_OPERATOR_HEADERS  // the operators alone, not every function
#include <ATen/TensorOperators.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "layers/attention.hpp"
#include "layers/pieces.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {

constexpr int64_t kBlock = 512;  // queries whose mask is held at once

// x_nkp as [1, K, N, P].
at::Tensor heads(const at::Tensor& x_nkp) { return x_nkp.transpose(0, 1).unsqueeze(0); }
// Head r of every kv head's query heads.
at::Tensor share(const at::Tensor& x_nhp, int64_t kv_heads, int64_t r) { return x_nhp.unflatten(1, {kv_heads, -1}).select(2, r); }

// Two flash-attention calls for each of the heads that share keys: all keys before the piece, and causally its own. Softmax sums join by their
// logarithms; a backward call that is given the joint output and logarithm computes its part of the joint gradient.
struct ContinuedAttention : torch::autograd::Function<ContinuedAttention> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q_nhp, const at::Tensor& k_mkp, const at::Tensor& v_mkp, double scale) {
    const int64_t n = q_nhp.size(0), B = k_mkp.size(0) - n, K = k_mkp.size(1);
    const at::Tensor out_nhp = at::empty(q_nhp.sizes(), q_nhp.options());
    std::vector<at::Tensor> saved{q_nhp, k_mkp, v_mkp, out_nhp};
    for (int64_t r = 0; r < q_nhp.size(1) / K; ++r) {
      const at::Tensor q = heads(share(q_nhp, K, r));
      const auto attend = [&](int64_t row, int64_t rows, bool causal) {
        return at::_scaled_dot_product_flash_attention_for_cpu(q, heads(k_mkp.narrow(0, row, rows)), heads(v_mkp.narrow(0, row, rows)), 0.0, causal, std::nullopt, scale);
      };
      const auto [before, lse_before] = attend(0, B, false);
      const auto [own, lse_own] = attend(B, n, true);
      const at::Tensor lse = at::logaddexp(lse_before, lse_own);
      const auto weight = [&](const at::Tensor& part) { return (part - lse).exp().unsqueeze(3); };
      share(out_nhp, K, r).copy_((before * weight(lse_before) + own * weight(lse_own)).squeeze(0).transpose(0, 1));
      saved.push_back(lse);
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["scale"] = scale;
    return out_nhp;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &q_nhp = saved[0], &k_mkp = saved[1], &v_mkp = saved[2], &out_nhp = saved[3];
    const double scale = ctx->saved_data["scale"].toDouble();
    const int64_t n = q_nhp.size(0), B = k_mkp.size(0) - n, K = k_mkp.size(1);
    const at::Tensor dout_nhp = grads[0].contiguous(), dq_nhp = at::empty(q_nhp.sizes(), q_nhp.options());
    const auto acc = k_mkp.options().dtype(at::kFloat);
    const at::Tensor dk_mkp = at::zeros(k_mkp.sizes(), acc), dv_mkp = at::zeros(v_mkp.sizes(), acc);
    for (int64_t r = 0; r < q_nhp.size(1) / K; ++r) {
      const at::Tensor q = heads(share(q_nhp, K, r)), out = heads(share(out_nhp, K, r)), dout = heads(share(dout_nhp, K, r));
      const auto pull = [&](int64_t row, int64_t rows, bool causal) {
        const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, heads(k_mkp.narrow(0, row, rows)), heads(v_mkp.narrow(0, row, rows)), out, saved[4 + static_cast<size_t>(r)], 0.0, causal, std::nullopt, scale);
        dk_mkp.narrow(0, row, rows).add_(dk.squeeze(0).transpose(0, 1));
        dv_mkp.narrow(0, row, rows).add_(dv.squeeze(0).transpose(0, 1));
        return dq.to(at::kFloat);
      };
      share(dq_nhp, K, r).copy_((pull(0, B, false) + pull(B, n, true)).squeeze(0).transpose(0, 1));
    }
    return {dq_nhp, dk_mkp.to(k_mkp.scalar_type()), dv_mkp.to(v_mkp.scalar_type()), {}};
  }
};

// Block after block of queries under a mask, over the keys that one of them sees: for windows, fp64 and GPUs.
at::Tensor blocks(const at::Tensor& q_nhp, const at::Tensor& k_mkp, const at::Tensor& v_mkp, int64_t window, double scale) {
  const int64_t n = q_nhp.size(0), B = k_mkp.size(0) - n, repeats = q_nhp.size(1) / k_mkp.size(1);
  const auto options = q_nhp.options().dtype(at::kLong);
  const at::Tensor k_mhp = k_mkp.repeat_interleave(repeats, 1), v_mhp = v_mkp.repeat_interleave(repeats, 1);  // once: what every block keeps are views
  std::vector<at::Tensor> outputs;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t rows = std::min(kBlock, n - i), high = B + i + rows, low = window > 0 ? std::max<int64_t>(0, B + i + 1 - window) : 0;
    const at::Tensor query_n1 = at::arange(B + i, high, options).unsqueeze(1), key_1m = at::arange(low, high, options).unsqueeze(0);
    at::Tensor seen_nm = key_1m <= query_n1;
    if (window > 0) seen_nm = seen_nm.logical_and(key_1m > query_n1 - window);
    const auto seen = [&](const at::Tensor& x_mhp) { return heads(x_mhp.narrow(0, low, high - low)); };
    outputs.push_back(at::scaled_dot_product_attention(heads(q_nhp.narrow(0, i, rows)), seen(k_mhp), seen(v_mhp), seen_nm, 0.0, false, scale).squeeze(0).transpose(0, 1));
  }
  return at::cat(outputs);
}

at::Tensor continued(const at::Tensor& q_nhp, const at::Tensor& k_mkp, const at::Tensor& v_mkp, int64_t window, double scale) {
  const bool all = window == 0 || window >= k_mkp.size(0);
  if (all && k_mkp.size(0) > q_nhp.size(0) && q_nhp.is_cpu() && q_nhp.scalar_type() != at::kDouble)
    return ContinuedAttention::apply(q_nhp.contiguous(), k_mkp, v_mkp, scale);
  return blocks(q_nhp, k_mkp, v_mkp, all ? 0 : window, scale);
}

}  // namespace

at::Tensor attention(Context& ctx, const at::Tensor& q_nhp, const at::Tensor& k_nkp, const at::Tensor& v_nkp, double scale, int64_t window,
                     const at::Tensor& k_cache_slkp, const at::Tensor& v_cache_slkp) {
  if (!ctx.cut()) return attention(q_nhp, k_nkp, v_nkp, ctx.spans(), scale, window, k_cache_slkp, v_cache_slkp);
  require_pieces("attention", ctx, q_nhp, k_cache_slkp.defined());
  if (q_nhp.dim() != 3 || k_nkp.dim() != 3 || k_nkp.sizes() != v_nkp.sizes() || k_nkp.size(0) != q_nhp.size(0) || k_nkp.size(2) != q_nhp.size(2) || k_nkp.size(1) < 1 ||
      q_nhp.size(1) % k_nkp.size(1) != 0 || window < 0)
    throw Error(ExitCode::kRuntime, fmt::format("[attention] q must be [N, H, P], k and v [N, K, P] with H % K == 0, and the window not negative, got q [{}], k [{}], v [{}], window {}",
                                                fmt::join(q_nhp.sizes(), ", "), fmt::join(k_nkp.sizes(), ", "), fmt::join(v_nkp.sizes(), ", "), window));
  const int64_t P = q_nhp.size(2);
  const RowsBefore keys(ctx, at::cat({k_nkp, v_nkp}, 2), window > 0 ? window - 1 : std::numeric_limits<int64_t>::max());

  // Rows [first, last) of every part of the result: a piece that goes on, or what begins here, which one call takes together.
  std::vector<int64_t> lengths;
  for (const Span& span : ctx.spans().list())
    if (span.start == 0) lengths.push_back(span.length);
  std::vector<at::Tensor> q, k, v, parts;
  for (const int64_t which : {0, 1}) {
    const Piece& chunk = keys.own(which);
    const int64_t row = chunk.local + chunk.head, rows = chunk.length - chunk.head;
    q.push_back(q_nhp.narrow(0, row, rows)), k.push_back(k_nkp.narrow(0, row, rows)), v.push_back(v_nkp.narrow(0, row, rows));
  }
  const at::Tensor begun = attention(at::cat(q), at::cat(k), at::cat(v), Spans::documents(lengths), scale, window);
  for (int64_t which = 0, row = 0; which < 2; ++which) {
    const Piece& chunk = keys.own(which);
    if (chunk.head > 0) {
      const at::Tensor before = keys(which);
      const auto with_own = [&](int64_t column, const at::Tensor& own_nkp) { return at::cat({before.narrow(2, column, P), own_nkp.narrow(0, chunk.local, chunk.head)}); };
      parts.push_back(continued(q_nhp.narrow(0, chunk.local, chunk.head), with_own(0, k_nkp), with_own(P, v_nkp), window, scale));
    }
    parts.push_back(begun.narrow(0, row, chunk.length - chunk.head));
    row += chunk.length - chunk.head;
  }
  // Joined even where nothing goes on, so that the gradients' exchange has every rank in it.
  parts.push_back(keys.none().narrow(2, 0, P).reshape({0, q_nhp.size(1), P}));
  return at::cat(parts);
}

}  // namespace tessera
