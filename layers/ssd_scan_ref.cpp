// The chunked scan from ATen operators. M chunks of Q tokens, R heads a group.
#define AT_PER_OPERATOR_HEADERS  // the operators alone, not every function
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <numeric>
#include <vector>

#include "layers/chunks.hpp"
#include "layers/ssd_scan.hpp"

namespace tessera {
namespace {

at::Tensor index(const std::vector<int64_t>& values, const at::Tensor& like) { return at::tensor(values, at::kLong).to(like.device()); }

}  // namespace

double ssd_scan_ref_flops(const SsdSizes& z, int64_t chunk) {
  const double Q = static_cast<double>(chunk), P = static_cast<double>(z.head_dim), S = static_cast<double>(z.state_size);
  return 2 * (static_cast<double>(z.num_groups) * Q * Q * S + static_cast<double>(z.num_heads) * (Q * Q * P + 2 * Q * P * S));
}

at::Tensor ssd_scan_ref(const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h,
                        const at::Tensor& D_h, const SsdSizes& z, const Spans& spans, const at::Tensor& state_shps) {
  const at::AutoGradMode grad(at::GradMode::is_enabled() && !state_shps.defined());
  const auto dtype = xbc_nc.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t H = z.num_heads, P = z.head_dim, G = z.num_groups, S = z.state_size, R = H / G, N = spans.num_tokens();
  if (N == 0) return xbc_nc.narrow(1, 0, H * P).to(dtype) * D_h.to(dtype).repeat_interleave(P);
  const Chunks chunks(spans, z.chunk, xbc_nc.device());
  const int64_t Q = chunks.length(), M = std::accumulate(chunks.at_place().begin(), chunks.at_place().end(), int64_t{0});
  const at::Tensor xbc = xbc_nc.to(dtype);
  const at::Tensor x = chunks.split(xbc.narrow(1, 0, H * P)).view({M, Q, H, P}).permute({0, 2, 1, 3}).reshape({M * H, Q, P});
  const at::Tensor B = chunks.split(xbc.narrow(1, H * P, G * S)).view({M, Q, G, S}).permute({0, 2, 1, 3});
  const at::Tensor C = chunks.split(xbc.narrow(1, H * P + G * S, G * S)).view({M, Q, G, S}).permute({0, 2, 1, 3});
  auto by_head = [&](const at::Tensor& t_mgqs) { return t_mgqs.unsqueeze(2).expand({M, G, R, Q, S}).reshape({M * H, Q, S}); };

  // Padding has d = 0: it neither decays nor adds. The threshold of softplus is out of reach, so that it is the plain formula.
  const at::Tensor d_nh = at::softplus(dt_nh.to(dtype) + dt_bias_h.to(dtype), 1, 40).clamp(z.dt_min, z.dt_max);
  const at::Tensor d = chunks.split(d_nh).permute({0, 2, 1}).reshape({M * H, Q});
  const at::Tensor A = A_log_h.to(dtype).exp().neg();
  const at::Tensor lam = (d.view({M, H, Q}) * A.view({1, H, 1})).cumsum(2).view({M * H, Q});
  const at::Tensor last = lam.narrow(1, Q - 1, 1);
  const at::Tensor above = at::ones({Q, Q}, lam.options().dtype(at::kBool)).triu(1);
  const at::Tensor E = (lam.unsqueeze(2) - lam.unsqueeze(1)).masked_fill(above, -std::numeric_limits<double>::infinity()).exp();

  const at::Tensor CB = at::bmm(C.reshape({M * G, Q, S}), B.reshape({M * G, Q, S}).transpose(1, 2));
  const at::Tensor mix = CB.view({M, G, 1, Q, Q}).expand({M, G, R, Q, Q}).reshape({M * H, Q, Q}) * E * d.unsqueeze(1);
  at::Tensor y = at::bmm(mix, x);
  const at::Tensor weight = ((last - lam).exp() * d).unsqueeze(2);
  const at::Tensor added = at::bmm((x * weight).transpose(1, 2), by_head(B)).view({M, H, P, S});
  const at::Tensor through = last.exp().view({M, H, 1, 1});

  // The state entering every chunk, place by place.
  at::Tensor state = at::zeros({spans.size(), H, P, S}, xbc.options());
  std::vector<int64_t> slots(chunks.order().size()), resumes(chunks.order().size());
  for (size_t k = 0; k < slots.size(); ++k)
    slots[k] = spans.list()[chunks.order()[k]].state_slot, resumes[k] = spans.list()[chunks.order()[k]].start > 0;
  if (state_shps.defined()) {
    const at::Tensor kept = index(resumes, xbc).to(at::kBool).view({-1, 1, 1, 1});
    state = at::where(kept, at::index_select(state_shps, 0, index(slots, xbc)).to(dtype), state);
  }
  std::vector<at::Tensor> entering;
  int64_t at_chunk = 0;
  for (const int64_t active : chunks.at_place()) {
    entering.push_back(state.narrow(0, 0, active));
    const at::Tensor next = through.narrow(0, at_chunk, active) * entering.back() + added.narrow(0, at_chunk, active);
    state = active == state.size(0) ? next : at::cat({next, state.narrow(0, active, state.size(0) - active)});
    at_chunk += active;
  }
  if (state_shps.defined()) {
    at::Tensor written = state_shps;
    written.index_copy_(0, index(slots, xbc), state.to(state_shps.scalar_type()));
  }
  y = y + at::bmm(by_head(C) * lam.exp().unsqueeze(2), at::cat(entering).view({M * H, P, S}).transpose(1, 2));
  y = y.view({M, H, Q, P}) + D_h.to(dtype).view({1, H, 1, 1}) * x.view({M, H, Q, P});
  return chunks.join(y.permute({0, 2, 1, 3}).reshape({M, Q, H * P}));
}

}  // namespace tessera
