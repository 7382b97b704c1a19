#include "layers/expert_mlp.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>

#include "layers/activation.hpp"
#include "layers/gpu.hpp"
#include "layers/linear.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The kernels of a GPU.
struct ExpertMlp : torch::autograd::Function<ExpertMlp> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_nw, const at::Tensor& weights_nk, const at::Tensor& up_efw, const at::Tensor& down_ewf,
                            const at::Tensor& counts_e, const at::Tensor& slot_m, const at::Tensor& token_m, const at::Tensor& row_nk) {
    const auto [out_nw, u_mf] = gpu_kernels()->expert_mlp_forward(x_nw, weights_nk, up_efw, down_ewf, {counts_e, slot_m, token_m, row_nk});
    ctx->save_for_backward({x_nw, weights_nk, up_efw, down_ewf, counts_e, slot_m, token_m, row_nk, u_mf});
    return out_nw;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const auto [dx, dweights, dup, ddown] = gpu_kernels()->expert_mlp_backward(s[0], s[1], s[2], s[3], {s[4], s[5], s[6], s[7]}, s[8], grads[0]);
    return {dx, dweights, dup, ddown, {}, {}, {}, {}};
  }
};

void check(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& up, const at::Tensor& down, const Dispatch& d) {
  const auto shape = [](const at::Tensor& t) { return fmt::format("[{}]", fmt::join(t.sizes(), ", ")); };
  if (x.dim() == 2 && up.dim() == 3 && down.dim() == 3 && up.size(2) == x.size(1) && down.size(0) == up.size(0) && down.size(1) == up.size(2) && down.size(2) == up.size(1) &&
      weights.sizes() == d.row_nk.sizes() && d.row_nk.size(0) == x.size(0) && d.counts_e.size(0) == up.size(0))
    return;
  throw Error(ExitCode::kRuntime, fmt::format("[expert_mlp] x [N, W], weights [N, k], up [E, F, W] and down [E, W, F] must fit a dispatch of {} to {} experts, got {}, {}, {} and {}",
                                              shape(d.row_nk), d.counts_e.size(0), shape(x), shape(weights), shape(up), shape(down)));
}

}  // namespace

at::Tensor expert_mlp_ref(const at::Tensor& x_nw, const at::Tensor& weights_nk, const at::Tensor& up_efw, const at::Tensor& down_ewf, const Dispatch& d) {
  const at::Tensor h_mf = relu2(grouped_linear(permute_tokens(x_nw, d), up_efw, d.counts_e));
  return combine_tokens(grouped_linear(h_mf, down_ewf, d.counts_e), weights_nk, d);
}

at::Tensor expert_mlp(const at::Tensor& x_nw, const at::Tensor& weights_nk, const at::Tensor& up_efw, const at::Tensor& down_ewf, const Dispatch& d) {
  check(x_nw, weights_nk, up_efw, down_ewf, d);
  if (!on_gpu(up_efw) || up_efw.scalar_type() != at::kBFloat16 || x_nw.numel() == 0) return expert_mlp_ref(x_nw, weights_nk, up_efw, down_ewf, d);
  return ExpertMlp::apply(x_nw.to(at::kBFloat16), weights_nk.to(at::kFloat), up_efw, down_ewf, d.counts_e, d.slot_m, d.token_m, d.row_nk);
}

at::Tensor expert_mlp(Context&, const at::Tensor& x_nw, const at::Tensor& weights_nk, const Weight& up_efw, const Weight& down_ewf, const Dispatch& d) {
  return expert_mlp(x_nw, weights_nk, up_efw.tensor(), down_ewf.tensor(), d);
}

}  // namespace tessera
