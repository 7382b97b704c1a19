// The Mamba2 scan: state space duality computed by chunks, forward and backward.
// N tokens, H heads of P channels, G groups with state size S; head h reads group floor(h / (H/G)).
#pragma once
#include <ATen/core/Tensor.h>

#include <limits>

#include "tessera/context.hpp"
#include "tessera/spans.hpp"

namespace tessera {

struct SsdSizes {
  int64_t num_heads = 0, head_dim = 0, num_groups = 1, state_size = 0;
  int64_t chunk = 128;  // tokens; changes rounding and speed, not the mathematics
  double dt_min = 0, dt_max = std::numeric_limits<double>::infinity();
};

// y_t = s_t C_t + D x_t with s_t = exp(d_t A) s_{t-1} + d_t x_t B_t^T, d = clamp(softplus(dt + dt_bias), dt_min, dt_max), A = -exp(A_log).
// xbc_nc: [N, H*P + 2*G*S] = [x | B | C], fp32 or bf16, rows may be strided (a slice of a packed matrix); dt_nh: [N, H];
// dt_bias_h, A_log_h, D_h: [H]. Returns [N, H*P] in fp32; everything inside is fp32. fp64 inputs take the reference composition.
// On a GPU chunks are of the kernels' own length, and the products of bf16 inputs take operands rounded to bf16 and y is bf16 too; sums are fp32.
// state_shps: undefined, or fp32 [slots, H, P, S]: a span with start 0 begins from zeros, another from its slot; each slot then holds the
// state after its span (one span a slot). No gradient flows in that case.
// Keeps only its inputs for the backward pass. A document's values do not depend on the others', bit for bit.
// Throws Error(kRuntime) that names the shape which does not fit. Source: arXiv:2405.21060, section 6.
at::Tensor ssd_scan(const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h,
                    const at::Tensor& D_h, const SsdSizes& sizes, const Spans& spans, const at::Tensor& state_shps = {});

// Over the rows of ctx. Where they are pieces of documents, every chunk's last state and decay go to all context-parallel ranks, and each adds to its
// pieces what the states that enter them leave: exp(decay since) C_t s. Sums of decays are fp32 (fp64 for fp64). Throws as above, and Error(kCollective).
at::Tensor ssd_scan(Context& ctx, const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h,
                    const at::Tensor& D_h, const SsdSizes& sizes, const at::Tensor& state_shps = {});

// The same from differentiable ATen operators, on any device, in fp64 for fp64 inputs and fp32 otherwise. Documents are cut into chunks of
// min(chunk, longest span), the last one padded: see ssd_scan_ref_flops.
at::Tensor ssd_scan_ref(const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h,
                        const at::Tensor& D_h, const SsdSizes& sizes, const Spans& spans, const at::Tensor& state_shps = {});

// FLOPs of the reference's matrix products, forward, per padded chunk of `chunk` tokens:
// C B^T once a group, M x, the chunk's state, and the entering state's share once a head.
double ssd_scan_ref_flops(const SsdSizes& sizes, int64_t chunk);

}  // namespace tessera
