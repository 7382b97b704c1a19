#include "layers/ssd_scan.hpp"

#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>

#include "layers/gpu.hpp"
#include "layers/ssd_scan_cpu.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {

void require(bool holds, const char* what, const at::Tensor& got) {
  if (!holds)
    throw Error(ExitCode::kRuntime, fmt::format("[ssd_scan] {}, got {} [{}]", what, c10::toString(got.scalar_type()), fmt::join(got.sizes(), ", ")));
}

void check(const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h, const at::Tensor& D_h,
           const SsdSizes& z, const Spans& spans, const at::Tensor& state_shps) {
  if (z.num_heads < 1 || z.head_dim < 1 || z.num_groups < 1 || z.state_size < 1 || z.chunk < 1 || z.num_heads % z.num_groups != 0)
    throw Error(ExitCode::kRuntime, fmt::format("[ssd_scan] sizes must be positive and num_heads a multiple of num_groups, got num_heads {}, "
                                                "head_dim {}, num_groups {}, state_size {}, chunk {}",
                                                z.num_heads, z.head_dim, z.num_groups, z.state_size, z.chunk));
  const int64_t channels = z.num_heads * z.head_dim + 2 * z.num_groups * z.state_size, n = spans.num_tokens();
  require(xbc_nc.dim() == 2 && xbc_nc.size(0) == n && xbc_nc.size(1) == channels,
          fmt::format("xbc must be [{}, {}] (tokens, num_heads * head_dim + 2 * num_groups * state_size)", n, channels).c_str(), xbc_nc);
  require(xbc_nc.scalar_type() == at::kFloat || xbc_nc.scalar_type() == at::kBFloat16 || xbc_nc.scalar_type() == at::kDouble,
          "xbc must be fp32, bf16 or fp64", xbc_nc);
  require(dt_nh.dim() == 2 && dt_nh.size(0) == n && dt_nh.size(1) == z.num_heads, fmt::format("dt must be [{}, {}]", n, z.num_heads).c_str(), dt_nh);
  for (const at::Tensor* vector : {&dt_bias_h, &A_log_h, &D_h})
    require(vector->dim() == 1 && vector->size(0) == z.num_heads, fmt::format("dt_bias, A_log and D must be [{}]", z.num_heads).c_str(), *vector);
  if (!state_shps.defined()) return;
  require(state_shps.dim() == 4 && state_shps.size(1) == z.num_heads && state_shps.size(2) == z.head_dim && state_shps.size(3) == z.state_size &&
              state_shps.is_contiguous() && (state_shps.scalar_type() == at::kFloat || xbc_nc.scalar_type() == at::kDouble),
          fmt::format("state must be contiguous fp32 [slots, {}, {}, {}]", z.num_heads, z.head_dim, z.state_size).c_str(), state_shps);
  for (const Span& span : spans.list())
    require(span.state_slot >= 0 && span.state_slot < state_shps.size(0), fmt::format("state must hold slot {}", span.state_slot).c_str(), state_shps);
}

ssd_cpu::Inputs prepare(const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h,
                        const at::Tensor& D_h, const SsdSizes& sizes, std::vector<int64_t> rows) {
  auto plain = [](const at::Tensor& t) { return t.detach().to(at::kFloat).contiguous(); };
  const at::Tensor xbc = xbc_nc.detach();
  return {xbc.stride(1) == 1 ? xbc : xbc.contiguous(), plain(dt_nh), plain(dt_bias_h), plain(A_log_h), plain(D_h), sizes, std::move(rows)};
}

class SsdScan : public torch::autograd::Function<SsdScan> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h,
                            const at::Tensor& A_log_h, const at::Tensor& D_h, const SsdSizes& z, const std::vector<int64_t>& rows) {
    ctx->save_for_backward({xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h});
    ctx->saved_data["rows"] = rows;
    ctx->saved_data["sizes"] = std::vector<int64_t>{z.num_heads, z.head_dim, z.num_groups, z.state_size, z.chunk};
    ctx->saved_data["limits"] = std::vector<double>{z.dt_min, z.dt_max};
    if (on_gpu(xbc_nc)) return gpu_kernels()->scan_forward(xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h, z, rows);
    return ssd_cpu::forward(prepare(xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h, z, rows), nullptr, {});
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto z = ctx->saved_data["sizes"].toIntVector();
    const auto limits = ctx->saved_data["limits"].toDoubleVector();
    const SsdSizes sizes{z[0], z[1], z[2], z[3], z[4], limits[0], limits[1]};
    const auto rows = ctx->saved_data["rows"].toIntVector();
    if (on_gpu(saved[0])) {
      const auto g = gpu_kernels()->scan_backward(saved[0], saved[1], saved[2], saved[3], saved[4], sizes, rows, grads[0]);
      return {g[0], g[1], g[2], g[3], g[4], at::Tensor(), at::Tensor()};
    }
    const auto in = prepare(saved[0], saved[1], saved[2], saved[3], saved[4], sizes, rows);
    const ssd_cpu::Gradients g = ssd_cpu::backward(in, grads[0].to(at::kFloat).contiguous());
    return {g.xbc_nc, g.dt_nh.to(saved[1].scalar_type()), g.dt_bias_h.to(saved[2].scalar_type()), g.A_log_h.to(saved[3].scalar_type()),
            g.D_h.to(saved[4].scalar_type()), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor ssd_scan(const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h,
                    const at::Tensor& D_h, const SsdSizes& sizes, const Spans& spans, const at::Tensor& state_shps) {
  check(xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h, sizes, spans, state_shps);
  const bool gpu = on_gpu(xbc_nc);
  if ((!gpu && !xbc_nc.is_cpu()) || xbc_nc.scalar_type() == at::kDouble || spans.num_tokens() == 0)
    return ssd_scan_ref(xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h, sizes, spans, state_shps);
  if (!state_shps.defined()) return SsdScan::apply(xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h, sizes, spans.rows());
  const at::NoGradGuard no_grad;
  if (gpu) return gpu_kernels()->scan_with_state(xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h, sizes, spans, state_shps);
  const auto in = prepare(xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h, sizes, spans.rows());
  return spans.num_tokens() == spans.size() ? ssd_cpu::step(in, spans, state_shps) : ssd_cpu::forward(in, &spans, state_shps);
}

}  // namespace tessera
