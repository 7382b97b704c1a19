#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "layers/attention.hpp"
#include "layers/attention_check.hpp"

namespace tessera {

namespace {

constexpr int64_t kScores = 1 << 21;  // of a block of queries, all heads together, where one query's are no more

// Sum over the queries at positions [begin, begin + n) of the entropies: q_nkrp [n, K, H/K, P], and the keys k_mkp from position `low` on -> [K, H/K].
at::Tensor sum_of_entropies(const at::Tensor& q_nkrp, const at::Tensor& k_mkp, int64_t begin, int64_t low, int64_t window, double scale) {
  const auto n = q_nkrp.size(0), K = q_nkrp.size(1), R = q_nkrp.size(2), m = k_mkp.size(0);
  const auto options = q_nkrp.options().dtype(at::kLong);
  const auto query_n1 = at::arange(begin, begin + n, options).unsqueeze(1), key_1m = at::arange(low, low + m, options).unsqueeze(0);
  auto hidden_nm = key_1m > query_n1;
  if (window > 0) hidden_nm = hidden_nm.logical_or(key_1m <= query_n1 - window);
  const auto scores_krnm = at::matmul(q_nkrp.permute({1, 2, 0, 3}).reshape({K, R * n, -1}), k_mkp.permute({1, 2, 0})).view({K, R, n, m}).mul(scale);
  const auto log_krnm = at::log_softmax(scores_krnm.masked_fill(hidden_nm, -std::numeric_limits<double>::infinity()), -1);
  return -(log_krnm.exp() * log_krnm.masked_fill(hidden_nm, 0)).sum(-1).sum(-1, false, at::kDouble);
}

}  // namespace

at::Tensor attention_entropy(const at::Tensor& q_nhp, const at::Tensor& k_nkp, const Spans& spans, double scale, int64_t window, const at::Tensor& k_cache_slkp) {
  check_attention(q_nhp, k_nkp, k_nkp, spans, window, k_cache_slkp, k_cache_slkp);
  const at::NoGradGuard no_grad;
  const auto H = q_nhp.size(1), K = k_nkp.size(1);
  const auto dtype = q_nhp.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto sum_kr = at::zeros({K, H / K}, q_nhp.options().dtype(at::kDouble));
  for (int64_t s = 0; s < spans.size(); ++s) {
    const Span& span = spans.list()[s];
    const auto row = spans.rows()[s], end = span.start + span.length;
    auto k_mkp = k_nkp.narrow(0, row, span.length).to(dtype);
    if (span.start > 0) k_mkp = at::cat({k_cache_slkp.select(0, span.state_slot).narrow(0, 0, span.start).to(dtype), k_mkp});
    const auto q_nkrp = q_nhp.narrow(0, row, span.length).to(dtype).unflatten(1, {K, H / K});
    const auto most_keys = window > 0 ? std::min(end, window + span.length) : end;
    const auto block = std::clamp<int64_t>(kScores / std::max<int64_t>(1, H * most_keys), 1, span.length);
    for (int64_t i = 0; i < span.length; i += block) {
      const auto n = std::min(block, span.length - i), begin = span.start + i, low = window > 0 ? std::max<int64_t>(0, begin + 1 - window) : 0;
      sum_kr += sum_of_entropies(q_nkrp.narrow(0, i, n), k_mkp.narrow(0, low, begin + n - low), begin, low, window, scale);
    }
  }
  return sum_kr.flatten() / std::max<double>(1, static_cast<double>(spans.num_tokens()));
}

}  // namespace tessera
