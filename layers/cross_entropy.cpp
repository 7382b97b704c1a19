#include "layers/cross_entropy.hpp"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "layers/gpu.hpp"
#include "layers/vector_math.hpp"
#include "layers/matmul.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {

using vec::load;
using vec::store;

constexpr int64_t kLanes = 16;

template <class T>
float row_top(const T* row, int64_t num_words) {
  float lanes[kLanes];
  const auto full = num_words / kLanes * kLanes;
  std::fill_n(lanes, kLanes, -std::numeric_limits<float>::infinity());
  for (int64_t v = 0; v < full; v += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = load(row + v + j) > lanes[j] ? load(row + v + j) : lanes[j];
  float top = *std::max_element(lanes, lanes + kLanes);
  for (auto v = full; v < num_words; ++v) top = std::max(top, load(row + v));
  return top;
}

// sum exp(row - top)
template <class T>
double row_sum(const T* row, int64_t num_words, float top) {
  float lanes[kLanes] = {};
  const auto full = num_words / kLanes * kLanes;
  for (int64_t v = 0; v < full; v += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += vec::exp(load(row + v + j) - top);
  double sum = 0;
  for (const auto lane : lanes) sum += lane;
  for (auto v = full; v < num_words; ++v) sum += vec::exp(load(row + v) - top);
  return sum;
}

// The logits become their gradient softmax - onehot; `target` lies outside [0, num_words) where another rank holds it.
template <class T>
void row_gradient(T* row, int64_t num_words, int64_t target, float lse) {
  const bool held = target >= 0 && target < num_words;
  const float picked = held ? vec::exp(load(row + target) - lse) - 1.f : 0.f;
  for (int64_t v = 0; v < num_words; ++v) store(row + v, vec::exp(load(row + v) - lse));
  if (held) store(row + target, picked);
}

template <class Body>
void for_rows(const at::Tensor& logits_cv, const Body& body) {
  const auto num_words = logits_cv.size(1);
  at::parallel_for(0, logits_cv.size(0), std::max<int64_t>(1, 16384 / num_words), [&](int64_t begin, int64_t end) {
    for (auto i = begin; i < end; ++i) body(i);
  });
}

template <class T>
void softmax_rows(const at::Tensor& logits_cv, const at::Tensor& targets_c, const at::Tensor& loss_c, bool want_grad) {
  const auto num_words = logits_cv.size(1);
  auto* logits = static_cast<T*>(logits_cv.data_ptr());
  const auto* targets = targets_c.const_data_ptr<int64_t>();
  auto* loss = loss_c.data_ptr<float>();
  for_rows(logits_cv, [=](int64_t i) {
    auto* row = logits + i * num_words;
    if (targets[i] < 0) {
      loss[i] = 0, std::fill_n(row, want_grad ? num_words : 0, T{});
      return;
    }
    const float top = row_top(row, num_words), lse = top + static_cast<float>(std::log(row_sum(row, num_words, top)));
    loss[i] = lse - load(row + targets[i]);
    if (want_grad) row_gradient(row, num_words, targets[i], lse);
  });
}

// The same where the ranks of a group hold the words from `first` on: the greatest logit, then the sum and the target's logit are made of all ranks'.
template <class T>
void softmax_rows(const at::Tensor& logits_cv, const at::Tensor& targets_c, const at::Tensor& loss_c, bool want_grad, const Group& group, int64_t first) {
  const auto num_rows = logits_cv.size(0), num_words = logits_cv.size(1);
  auto* logits = static_cast<T*>(logits_cv.data_ptr());
  const auto* targets = targets_c.const_data_ptr<int64_t>();
  const auto top_c = at::empty({num_rows}, loss_c.options()), sums_2c = at::empty({2, num_rows}, loss_c.options());
  auto *top = top_c.data_ptr<float>(), *sum = sums_2c.data_ptr<float>(), *picked = sum + num_rows, *loss = loss_c.data_ptr<float>();
  for_rows(logits_cv, [=](int64_t i) { top[i] = row_top(logits + i * num_words, num_words); });
  group.all_reduce(top_c, Reduce::kMax);
  for_rows(logits_cv, [=](int64_t i) {
    const auto target = targets[i] - first;
    sum[i] = static_cast<float>(row_sum(logits + i * num_words, num_words, top[i]));
    picked[i] = targets[i] >= 0 && target >= 0 && target < num_words ? load(logits + i * num_words + target) : 0.f;
  });
  group.all_reduce(sums_2c);
  for_rows(logits_cv, [=](int64_t i) {
    auto* row = logits + i * num_words;
    const float lse = top[i] + std::log(sum[i]);
    loss[i] = targets[i] < 0 ? 0.f : lse - picked[i];
    if (want_grad && targets[i] < 0) std::fill_n(row, num_words, T{});
    else if (want_grad) row_gradient(row, num_words, targets[i] - first, lse);
  });
}

// In plain operators, in any dtype and on any device.
void softmax_plain(at::Tensor& logits_cv, const at::Tensor& targets_c, const at::Tensor& loss_c, bool want_grad, const Group* group, int64_t first) {
  const auto l_cv = logits_cv.to(loss_c.scalar_type());
  const auto zero = at::zeros({}, loss_c.options());
  const auto valid_c1 = targets_c.ge(0).unsqueeze(1), local_c1 = (targets_c - first).unsqueeze(1);
  const auto held_c1 = valid_c1.logical_and(local_c1.ge(0)).logical_and(local_c1.lt(l_cv.size(1))), index_c1 = local_c1.clamp(0, l_cv.size(1) - 1);
  auto picked_c1 = at::where(held_c1, l_cv.gather(1, index_c1), zero);
  at::Tensor lse_c1;
  if (group) {
    const auto top_c1 = l_cv.amax({1}, /*keepdim=*/true);
    group->all_reduce(top_c1, Reduce::kMax);
    const auto sums_2c1 = at::stack({(l_cv - top_c1).exp_().sum(1, true), picked_c1});
    group->all_reduce(sums_2c1);
    lse_c1 = sums_2c1[0].log().add_(top_c1), picked_c1 = sums_2c1[1];
  } else {
    lse_c1 = at::logsumexp(l_cv, {1}, /*keepdim=*/true);
  }
  loss_c.copy_(at::where(valid_c1, lse_c1 - picked_c1, zero).squeeze(1));
  if (!want_grad) return;
  auto p_cv = (l_cv - lse_c1).exp_();
  p_cv.scatter_add_(1, index_c1, held_c1.to(p_cv.scalar_type()).neg_());
  logits_cv.copy_(at::where(valid_c1, p_cv, zero));
}

// By the GPU's kernels.
void softmax_on_gpu(at::Tensor& logits_cv, const at::Tensor& targets_c, const at::Tensor& loss_c, bool want_grad, const Group* group, int64_t first) {
  if (!group) return gpu_kernels()->softmax_rows(logits_cv, targets_c, loss_c, want_grad);
  const auto [own_c, sums_2c] = gpu_kernels()->softmax_sums(logits_cv, targets_c, first);
  const auto top_c = own_c.clone();
  group->all_reduce(top_c, Reduce::kMax);
  sums_2c[0].mul_((own_c - top_c).exp_());
  group->all_reduce(sums_2c);
  const auto lse_c = sums_2c[0].log().add_(top_c);
  loss_c.copy_(at::where(targets_c.ge(0), lse_c - sums_2c[1], at::zeros({}, loss_c.options())));
  if (want_grad) gpu_kernels()->softmax_gradient(logits_cv, targets_c, first, lse_c);
}

// Losses of a chunk into loss_c; the logits become their gradient where it is wanted.
void softmax_chunk(at::Tensor& logits_cv, const at::Tensor& targets_c, const at::Tensor& loss_c, bool want_grad, const Group* group, int64_t first) {
  const auto rows = [&]<class T>(T) {
    if (group) softmax_rows<T>(logits_cv, targets_c, loss_c, want_grad, *group, first);
    else softmax_rows<T>(logits_cv, targets_c, loss_c, want_grad);
  };
  if (on_gpu(logits_cv)) softmax_on_gpu(logits_cv, targets_c, loss_c, want_grad, group, first);
  else if (logits_cv.is_cpu() && logits_cv.scalar_type() == at::kFloat) rows(float{});
  else if (logits_cv.is_cpu() && logits_cv.scalar_type() == at::kBFloat16) rows(c10::BFloat16{});
  else softmax_plain(logits_cv, targets_c, loss_c, want_grad, group, first);
}

struct Result {
  at::Tensor loss_n;  // fp32, or fp64
  at::Tensor dh_nd;   // undefined where not wanted
  at::Tensor dw_vd;   // fp32, or fp64; the weight's dtype after a single chunk
};

// Every rank of the group takes as many chunks, whatever it wants.
Result run(const at::Tensor& h_nd, const at::Tensor& w_vd, const at::Tensor& targets_n, const Group* group, int64_t chunk, bool want_dh, bool want_dw) {
  const auto N = h_nd.size(0), V = w_vd.size(0), first = group ? group->rank() * V : 0;
  const auto acc = w_vd.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (chunk <= 0) chunk = std::max<int64_t>(1, kLogitBytes / (V * static_cast<int64_t>(w_vd.element_size())));
  chunk = std::min(chunk, std::max<int64_t>(N, 1));
  Result out{.loss_n = at::empty({N}, h_nd.options().dtype(acc))};
  if (want_dh) out.dh_nd = at::empty(h_nd.sizes(), h_nd.options());
  const auto buffer_cv = at::empty({chunk, V}, w_vd.options());
  for (int64_t row = 0; row < N; row += chunk) {
    const auto n = std::min(chunk, N - row);
    const auto h_cd = h_nd.narrow(0, row, n);
    auto logits_cv = buffer_cv.narrow(0, 0, n);
    product_into(logits_cv, h_cd, w_vd.t());
    softmax_chunk(logits_cv, targets_n.narrow(0, row, n), out.loss_n.narrow(0, row, n), want_dh || want_dw, group, first);
    if (want_dh) {
      auto dh_cd = out.dh_nd.narrow(0, row, n);
      product_into(dh_cd, logits_cv, w_vd);
    }
    if (!want_dw) continue;
    // A single chunk's product needs no wider sum.
    if (!out.dw_vd.defined()) out.dw_vd = product(logits_cv.t(), h_cd);
    else if (w_vd.scalar_type() == acc) product_into(out.dw_vd, logits_cv.t(), h_cd, /*add=*/true);
    else out.dw_vd = out.dw_vd.to(acc).add_(product(logits_cv.t(), h_cd));
  }
  if (want_dw && !out.dw_vd.defined()) out.dw_vd = at::zeros(w_vd.sizes(), w_vd.options());
  return out;
}

struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& h_nd, const at::Tensor& w_vd,
                            const at::Tensor& targets_n, int64_t group_address, int64_t chunk, bool want_dh, bool want_dw) {
    const auto* group = reinterpret_cast<const Group*>(group_address);
    // Rows without a target cost no product. A device is not asked how many there are: it would have to be waited for.
    const auto valid_n = targets_n.ge(0);
    const bool select = h_nd.is_cpu() && !on_gpu(h_nd) && !valid_n.all().item<bool>();
    const auto rows_m = select ? at::nonzero(valid_n).squeeze(1) : at::Tensor();
    auto result = select ? run(h_nd.index_select(0, rows_m), w_vd, targets_n.index_select(0, rows_m), group, chunk, want_dh, want_dw)
                         : run(h_nd, w_vd, targets_n, group, chunk, want_dh, want_dw);
    if (want_dh && select) result.dh_nd = at::zeros(h_nd.sizes(), h_nd.options()).index_copy_(0, rows_m, result.dh_nd);
    if (want_dh) ctx->saved_data["dh"] = result.dh_nd;
    if (want_dw) ctx->saved_data["dw"] = result.dw_vd;
    ctx->saved_data["dtype"] = static_cast<int64_t>(w_vd.scalar_type());
    if (group && group->rank() != 0) return at::zeros({}, result.loss_n.options());  // rank 0 counts it for all
    return result.loss_n.sum(at::kDouble).to(result.loss_n.scalar_type());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    auto& saved = ctx->saved_data;
    if (!saved.count("dtype")) throw Error(ExitCode::kRuntime, "[linear_cross_entropy] the backward pass must run once, got a second call");
    const auto dtype = static_cast<at::ScalarType>(saved["dtype"].toInt());
    at::Tensor dh_nd, dw_vd;
    if (saved.count("dh")) dh_nd = saved["dh"].toTensor();
    if (saved.count("dw")) dw_vd = saved["dw"].toTensor();
    saved.clear();
    if (dh_nd.defined()) dh_nd.mul_(grads[0]);
    if (dw_vd.defined()) dw_vd = dw_vd.mul_(grads[0]).to(dtype);
    return {dh_nd, dw_vd, {}, {}, {}, {}, {}};
  }
};

void check(const at::Tensor& h_nd, const at::Tensor& w_vd, const at::Tensor& targets_n, const Group* group) {
  const auto fail = [](const std::string& what) { throw Error(ExitCode::kRuntime, "[linear_cross_entropy] " + what); };
  const auto shape = [](const at::Tensor& t) { return fmt::format("[{}]", fmt::join(t.sizes(), ", ")); };
  if (h_nd.dim() != 2 || w_vd.dim() != 2 || h_nd.size(1) != w_vd.size(1))
    fail(fmt::format("h [N, D] and lm_head [V, D] must share D, got h {} and lm_head {}", shape(h_nd), shape(w_vd)));
  if (targets_n.scalar_type() != at::kLong || targets_n.dim() != 1 || targets_n.size(0) != h_nd.size(0))
    fail(fmt::format("targets must be int64 [N], got {} {} for h {}", c10::toString(targets_n.scalar_type()), shape(targets_n), shape(h_nd)));
  if (!targets_n.is_cpu() || targets_n.numel() == 0) return;
  const auto top = targets_n.max().item<int64_t>(), num_words = w_vd.size(0) * (group ? group->size() : 1);
  if (top >= num_words) fail(fmt::format("targets must lie below the vocabulary's {}, got {}", num_words, top));
}

}  // namespace

at::Tensor linear_cross_entropy(const at::Tensor& h_nd, const at::Tensor& lm_head_vd, const at::Tensor& targets_n, const Group* tensor, int64_t chunk_tokens) {
  check(h_nd, lm_head_vd, targets_n, tensor);
  const bool grad = at::GradMode::is_enabled();
  return LinearCrossEntropy::apply(h_nd.to(lm_head_vd.scalar_type()).contiguous(), lm_head_vd, targets_n.contiguous(), reinterpret_cast<int64_t>(tensor), chunk_tokens,
                                   grad && h_nd.requires_grad(), grad && lm_head_vd.requires_grad());
}

at::Tensor linear_cross_entropy(const at::Tensor& h_nd, const Weight& lm_head_vd, const at::Tensor& targets_n, const Group* tensor, int64_t chunk_tokens) {
  return linear_cross_entropy(h_nd, lm_head_vd.tensor(), targets_n, tensor, chunk_tokens);
}

at::Tensor cross_entropy_per_token(const at::Tensor& h_nd, const at::Tensor& lm_head_vd, const at::Tensor& targets_n, const Group* tensor, int64_t chunk_tokens) {
  check(h_nd, lm_head_vd, targets_n, tensor);
  at::AutoGradMode no_grad(false);
  return run(h_nd.to(lm_head_vd.scalar_type()).contiguous(), lm_head_vd, targets_n.contiguous(), tensor, chunk_tokens, false, false).loss_n;
}

at::Tensor top_word_is(const at::Tensor& h_nd, const at::Tensor& lm_head_vd, const at::Tensor& targets_n, const Group* tensor, int64_t chunk_tokens) {
  check(h_nd, lm_head_vd, targets_n, tensor);
  at::AutoGradMode no_grad(false);
  const auto V = lm_head_vd.size(0), first = tensor ? tensor->rank() * V : 0;
  const auto rows_m = at::nonzero(targets_n.ge(0)).squeeze(1);  // as many on every rank
  const auto h_md = h_nd.index_select(0, rows_m).to(lm_head_vd.scalar_type()), local_m1 = (targets_n.index_select(0, rows_m) - first).unsqueeze(1);
  const auto hits_m = at::empty({rows_m.size(0)}, targets_n.options().dtype(at::kBool));
  if (chunk_tokens <= 0) chunk_tokens = std::max<int64_t>(1, kLogitBytes / (V * static_cast<int64_t>(sizeof(float))));
  for (int64_t row = 0; row < rows_m.size(0); row += chunk_tokens) {
    const auto n = std::min(chunk_tokens, rows_m.size(0) - row);
    const auto logits_cv = product(h_md.narrow(0, row, n), lm_head_vd.t()), index_c1 = local_m1.narrow(0, row, n);
    const auto held_c1 = index_c1.ge(0).logical_and(index_c1.lt(V));
    const auto picked_c1 = at::where(held_c1, logits_cv.gather(1, index_c1.clamp(0, V - 1)).to(at::kFloat), at::zeros({}, hits_m.options().dtype(at::kFloat)));
    if (tensor) tensor->all_reduce(picked_c1);
    const auto as_great_c = on_gpu(logits_cv) ? gpu_kernels()->count_as_great(logits_cv.contiguous(), picked_c1.squeeze(1).contiguous())
                                              : logits_cv.to(at::kFloat).ge(picked_c1).sum({1}).to(at::kFloat);  // the target itself among them
    if (tensor) tensor->all_reduce(as_great_c);
    hits_m.narrow(0, row, n).copy_(as_great_c.eq(1));
  }
  return at::zeros({targets_n.size(0)}, hits_m.options()).index_copy_(0, rows_m, hits_m);
}

}  // namespace tessera
