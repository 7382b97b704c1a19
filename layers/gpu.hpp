// The operators' kernels on the GPU: a table of functions over tensors, empty where there is no GPU.
// An operator asks on_gpu(x) in its forward and backward pass; where that is false it takes the CPU's path, or the plain composition.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "tessera/spans.hpp"

namespace tessera {

struct SsdSizes;
struct Dispatch;

// Step number t, from 1; max_norm 0: gradients as they are. See core/train/optimizer.hpp.
struct AdamWStep {
  double lr, beta1, beta2, eps, weight_decay, max_norm;
  int64_t t;
};

inline constexpr int64_t kMostRoutedExperts = 8192;  // a token's scores must fit into shared memory

// Arguments are those of the operator of the same name after its checks; gradients come in the dtype of what they belong to.
// `rows`: the first row of every span, and N. What returns several tensors leaves undefined those that belong to undefined inputs.
struct GpuKernels {
  bool (*takes)(const at::Tensor&) = nullptr;  // the tensor lies where these kernels run

  at::Tensor (*conv_forward)(const at::Tensor& x_nc, const at::Tensor& weight_c1w, const at::Tensor& bias_c, const std::vector<int64_t>& rows,
                             bool silu) = nullptr;
  at::Tensor (*conv_with_state)(const at::Tensor& x_nc, const at::Tensor& weight_c1w, const at::Tensor& bias_c, const Spans& spans, bool silu,
                                const at::Tensor& state_scw) = nullptr;
  std::array<at::Tensor, 3> (*conv_backward)(const at::Tensor& x_nc, const at::Tensor& dout_nc, const at::Tensor& weight_c1w,
                                             const at::Tensor& bias_c, const std::vector<int64_t>& rows, bool silu) = nullptr;  // of x, weight, bias

  std::array<at::Tensor, 2> (*norm_forward)(const at::Tensor& y_ni, const at::Tensor& z_ni, const at::Tensor& weight_i, int64_t group_size, double eps,
                                            at::ScalarType out_dtype) = nullptr;  // out, rstd fp32 [N, groups]; z undefined: rms_norm
  std::array<at::Tensor, 3> (*norm_backward)(const at::Tensor& y_ni, const at::Tensor& z_ni, const at::Tensor& weight_i, int64_t group_size,
                                             const at::Tensor& rstd_ng, const at::Tensor& dout_ni) = nullptr;  // of y, z, weight

  at::Tensor (*relu2_forward)(const at::Tensor& x) = nullptr;
  at::Tensor (*relu2_backward)(const at::Tensor& x, const at::Tensor& dy) = nullptr;
  // Of the tokens' streams of numbers under `key`: fp32 [N, width], and x with some of its elements 0. token_n int64 [N].
  at::Tensor (*uniform)(uint64_t key, const at::Tensor& token_n, int64_t width, int64_t first) = nullptr;
  at::Tensor (*dropout)(const at::Tensor& x_nw, uint64_t key, const at::Tensor& token_n, int64_t first, double p) = nullptr;

  // The router: fp32 scores and logits, of at most kMostRoutedExperts.
  at::Tensor (*choose_experts)(const at::Tensor& scores_ne, bool of_logits, const at::Tensor& bias_e, int64_t k, int64_t num_groups, int64_t topk_group) = nullptr;
  at::Tensor (*expert_counts)(const at::Tensor& indices_nk, const at::Tensor& valid_n, int64_t num_experts) = nullptr;  // valid_n: bool
  at::Tensor (*routed_weights)(const at::Tensor& logits_ne, const at::Tensor& indices_nk, bool normed, double scaling) = nullptr;
  at::Tensor (*routed_weights_backward)(const at::Tensor& logits_ne, const at::Tensor& indices_nk, bool normed, double scaling, const at::Tensor& dweights_nk) = nullptr;

  // ssd_scan. bf16 inputs: operands of products are rounded to bf16 (decayed C B^T, weighted x, states between chunks), sums are fp32; y is bf16.
  at::Tensor (*scan_forward)(const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h, const at::Tensor& D_h,
                             const SsdSizes& sizes, const std::vector<int64_t>& rows) = nullptr;
  at::Tensor (*scan_with_state)(const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h,
                                const at::Tensor& D_h, const SsdSizes& sizes, const Spans& spans, const at::Tensor& state_shps) = nullptr;
  std::array<at::Tensor, 5> (*scan_backward)(const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h,
                                             const at::Tensor& D_h, const SsdSizes& sizes, const std::vector<int64_t>& rows,
                                             const at::Tensor& dy_ni) = nullptr;  // of xbc, dt, dt_bias, A_log, D
  // Experts: see layers/experts.hpp, and the sums that its operators and their gradients are made of. Counts stay on the device.
  std::array<at::Tensor, 4> (*dispatch)(const at::Tensor& indices_nk, int64_t num_experts) = nullptr;  // counts_e, slot_m, token_m, row_nk
  at::Tensor (*take_rows)(const at::Tensor& x_nd, const at::Tensor& token_m) = nullptr;
  at::Tensor (*sum_rows)(const at::Tensor& y_md, const at::Tensor& w_nk, const at::Tensor& row_nk) = nullptr;  // w undefined: ones
  at::Tensor (*spread_rows)(const at::Tensor& dout_nd, const at::Tensor& w_nk, const at::Tensor& row_nk) = nullptr;
  at::Tensor (*row_products)(const at::Tensor& dout_nd, const at::Tensor& y_md, const at::Tensor& row_nk) = nullptr;
  // bf16 alone. Gradients of x and w, undefined where they are not wanted.
  at::Tensor (*grouped_linear_forward)(const at::Tensor& x_md, const at::Tensor& w_eod, const at::Tensor& counts_e) = nullptr;
  std::array<at::Tensor, 2> (*grouped_linear_backward)(const at::Tensor& x_md, const at::Tensor& w_eod, const at::Tensor& counts_e, const at::Tensor& dy_mo, bool want_x,
                                                       bool want_w) = nullptr;
  // bf16 alone. The output, and u [M, F] for the backward pass; gradients of x, weights, up and down.
  std::array<at::Tensor, 2> (*expert_mlp_forward)(const at::Tensor& x_nw, const at::Tensor& weights_nk, const at::Tensor& up_efw, const at::Tensor& down_ewf,
                                                  const Dispatch& dispatch) = nullptr;
  std::array<at::Tensor, 4> (*expert_mlp_backward)(const at::Tensor& x_nw, const at::Tensor& weights_nk, const at::Tensor& up_efw, const at::Tensor& down_ewf,
                                                   const Dispatch& dispatch, const at::Tensor& u_mf, const at::Tensor& dout_nw) = nullptr;
  // Attention of spans to a cache, as `attention` defines it, of heads of up to 256 channels in one dtype; and rows of k and v [N, K, P] to their places in it.
  void (*attend_cache)(const at::Tensor& q_nhp, const Spans& spans, double scale, int64_t window, const at::Tensor& k_cache_slkp, const at::Tensor& v_cache_slkp,
                       const at::Tensor& out_nhp) = nullptr;
  void (*write_cache)(const at::Tensor& k_nkp, const at::Tensor& v_nkp, const Spans& spans, const at::Tensor& k_cache_slkp, const at::Tensor& v_cache_slkp) = nullptr;

  // A chunk of logits, contiguous [c, V], which become their gradient; see layers/cross_entropy.hpp. Over ranks: the greatest logit [c], and [2, c] of sum
  // exp(logit - greatest) and the target's logit; then the gradient from the log-sum-exp of all. How many logits are as great as picked_c, fp32 [c].
  void (*softmax_rows)(const at::Tensor& logits_cv, const at::Tensor& targets_c, const at::Tensor& loss_c, bool want_gradient) = nullptr;
  std::array<at::Tensor, 2> (*softmax_sums)(const at::Tensor& logits_cv, const at::Tensor& targets_c, int64_t first) = nullptr;
  void (*softmax_gradient)(const at::Tensor& logits_cv, const at::Tensor& targets_c, int64_t first, const at::Tensor& lse_c) = nullptr;
  at::Tensor (*count_as_great)(const at::Tensor& logits_cv, const at::Tensor& picked_c) = nullptr;

  // A step in place over flat fp32 buffers, and into their bf16 copy (undefined: none). norm: fp32 [] of the gradients; where it is not finite nothing changes.
  void (*adamw)(const at::Tensor& data, const at::Tensor& grad, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& compute, const at::Tensor& norm,
                const AdamWStep& step) = nullptr;
};

// nullptr where no kernels are there. A library that has some gives its table when it is loaded; the last one given counts.
const GpuKernels* gpu_kernels();
void use_gpu_kernels(const GpuKernels* kernels);

// Whether the kernels take x: it lies where they run and is fp32 or bf16.
bool on_gpu(const at::Tensor& x);
// Whether t, of any dtype, lies where kernels run.
bool lies_on_gpu(const at::Tensor& t);

}  // namespace tessera
