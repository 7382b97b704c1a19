#define AT_PER_OPERATOR_HEADERS  // the operators alone, not every function
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "layers/conv.hpp"

namespace tessera {

at::Tensor causal_conv1d_ref(const at::Tensor& x_nc, const at::Tensor& weight_c1w, const at::Tensor& bias_c, const Spans& spans, bool silu,
                             const at::Tensor& state_scw) {
  const at::AutoGradMode grad(at::GradMode::is_enabled() && !state_scw.defined());
  const auto dtype = x_nc.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t N = x_nc.size(0), C = x_nc.size(1), halo = weight_c1w.size(2) - 1;
  const at::Tensor x = x_nc.to(dtype), weight = weight_c1w.to(dtype);
  auto tap = [&](int64_t k) { return weight.select(2, k).view({1, C}); };
  at::Tensor out;
  if (!state_scw.defined()) {
    const at::Tensor position = spans.positions_n(x.device()).view({N, 1});
    for (int64_t k = halo; k >= 0; --k) {
      const int64_t shift = std::min(halo - k, N);
      at::Tensor moved = shift == 0 ? x : at::cat({at::zeros({shift, C}, x.options()), x.narrow(0, 0, N - shift)});
      if (shift > 0) moved = moved * position.ge(halo - k).to(dtype);
      out = out.defined() ? out + tap(k) * moved : tap(k) * moved;
    }
  } else {
    at::Tensor state = state_scw;
    std::vector<at::Tensor> rows;
    for (int64_t s = 0; s < spans.size(); ++s) {
      const Span& span = spans.list()[s];
      const at::Tensor before = span.start > 0 ? state.select(0, span.state_slot).transpose(0, 1).to(dtype) : at::zeros({halo, C}, x.options());
      const at::Tensor all = at::cat({before, x.narrow(0, spans.rows()[s], span.length)});
      at::Tensor sum;
      for (int64_t k = halo; k >= 0; --k) {
        const at::Tensor product = tap(k) * all.narrow(0, k, span.length);
        sum = sum.defined() ? sum + product : product;
      }
      rows.push_back(sum);
      state.select(0, span.state_slot).copy_(all.narrow(0, span.length, halo).transpose(0, 1));
    }
    out = rows.empty() ? x : at::cat(rows);
  }
  if (bias_c.defined()) out = out + bias_c.to(dtype);
  return (silu ? at::silu(out) : out).to(x_nc.scalar_type());
}

}  // namespace tessera
