#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>

#include <limits>
#include <vector>

#include "layers/attention.hpp"

namespace tessera {

at::Tensor attention_ref(const at::Tensor& q_nhp, const at::Tensor& k_nkp, const at::Tensor& v_nkp, const Spans& spans, double scale,
                         int64_t window, const at::Tensor& k_cache_slkp, const at::Tensor& v_cache_slkp) {
  const auto repeats = q_nhp.size(1) / k_nkp.size(1);
  const auto acc = q_nhp.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  std::vector<at::Tensor> outputs;
  for (int64_t i = 0; i < spans.size(); ++i) {
    const auto& span = spans.list()[i];
    const auto row = spans.rows()[i], keys = span.start + span.length;
    auto k_tkp = k_nkp.narrow(0, row, span.length), v_tkp = v_nkp.narrow(0, row, span.length);
    if (k_cache_slkp.defined()) {
      const auto extend = [&](const at::Tensor& cache_slkp, const at::Tensor& fresh_tkp) {
        cache_slkp.select(0, span.state_slot).narrow(0, span.start, span.length).copy_(fresh_tkp);
        return cache_slkp.select(0, span.state_slot).narrow(0, 0, keys);
      };
      k_tkp = extend(k_cache_slkp, k_tkp), v_tkp = extend(v_cache_slkp, v_tkp);
    }
    const auto q_htp = q_nhp.narrow(0, row, span.length).transpose(0, 1).to(acc);
    const auto k_htp = k_tkp.repeat_interleave(repeats, 1).transpose(0, 1).to(acc);
    const auto v_htp = v_tkp.repeat_interleave(repeats, 1).transpose(0, 1).to(acc);
    const auto query_t1 = at::arange(span.start, keys, q_nhp.options().dtype(at::kLong)).unsqueeze(1);
    const auto key_1t = at::arange(keys, q_nhp.options().dtype(at::kLong)).unsqueeze(0);
    auto hidden_tt = key_1t > query_t1;
    if (window > 0) hidden_tt = hidden_tt.logical_or(key_1t <= query_t1 - window);
    const auto scores_htt = (at::matmul(q_htp, k_htp.transpose(1, 2)) * scale).masked_fill(hidden_tt, -std::numeric_limits<double>::infinity());
    outputs.push_back(at::matmul(at::softmax(scores_htt, -1), v_htp).transpose(0, 1).to(q_nhp.scalar_type()));
  }
  return outputs.empty() ? q_nhp : at::cat(outputs, 0);
}

}  // namespace tessera
