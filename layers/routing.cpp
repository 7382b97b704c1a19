#include "layers/routing.hpp"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sign.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <unordered_map>

#include "layers/gpu.hpp"
#include "layers/linear.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {

constexpr double kTiny = 1e-20;
constexpr int64_t kGrain = 1 << 13;  // scores a thread takes at least

[[noreturn]] void fail(const char* op, const std::string& what) { throw Error(ExitCode::kRuntime, fmt::format("[{}] {}", op, what)); }

void check_choice(const at::Tensor& scores_ne, const at::Tensor& bias_e, int64_t k, int64_t num_groups, int64_t topk_group) {
  constexpr auto op = "choose_experts";
  if (scores_ne.dim() != 2 || (scores_ne.scalar_type() != at::kFloat && scores_ne.scalar_type() != at::kDouble))
    fail(op, fmt::format("scores must be [N, E] in float32 or float64, got [{}] in {}", fmt::join(scores_ne.sizes(), ", "),
                         c10::toString(scores_ne.scalar_type())));
  const auto E = scores_ne.size(1);
  if (bias_e.defined() && (bias_e.dim() != 1 || bias_e.size(0) != E))
    fail(op, fmt::format("bias must be [{}], got [{}]", E, fmt::join(bias_e.sizes(), ", ")));
  if (k < 1 || k > E) fail(op, fmt::format("k must be in [1, {}], got {}", E, k));
  if (num_groups < 1 || E % num_groups || topk_group < 1 || topk_group > num_groups)
    fail(op, fmt::format("{} experts must split into num_groups = {} groups of which topk_group = {} are kept", E, num_groups, topk_group));
  if (num_groups > 1 && (E / num_groups < 2 || topk_group * (E / num_groups) < k))
    fail(op, fmt::format("groups must hold at least 2 experts and the kept ones at least k, got {} groups of {}, {} kept, k = {}", num_groups,
                         E / num_groups, topk_group, k));
}

// The first `count` of `order` become the indices of the greatest values, ties to the lower index; NaN must not occur.
template <class T>
void select_best(const T* values, int64_t* order, int64_t size, int64_t count) {
  std::iota(order, order + size, int64_t{0});
  if (count < size)
    std::nth_element(order, order + count, order + size,
                     [values](int64_t a, int64_t b) { return values[a] > values[b] || (values[a] == values[b] && a < b); });
}

template <class T>
struct Chooser {
  int64_t E, k, num_groups, topk_group;
  std::vector<T> biased = std::vector<T>(E), group_score = std::vector<T>(num_groups);
  std::vector<int64_t> order = std::vector<int64_t>(E);
  std::vector<char> kept = std::vector<char>(num_groups);

  void choose(const T* scores, const T* bias, int64_t* out) {
    constexpr T kLowest = -std::numeric_limits<T>::infinity();
    for (int64_t e = 0; e < E; ++e) {
      const T value = bias ? scores[e] + bias[e] : scores[e];
      biased[e] = std::isnan(value) ? kLowest : value;
    }
    if (num_groups > 1) drop_groups();
    select_best(biased.data(), order.data(), E, k);
    std::copy_n(order.begin(), k, out);
    std::sort(out, out + k);
  }

  void drop_groups() {
    constexpr T kLowest = -std::numeric_limits<T>::infinity();
    const auto size = E / num_groups;
    for (int64_t g = 0; g < num_groups; ++g) {
      T best = kLowest, second = kLowest;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) {
        second = std::max(second, std::min(best, biased[e]));
        best = std::max(best, biased[e]);
      }
      group_score[g] = best + second;
    }
    select_best(group_score.data(), order.data(), num_groups, topk_group);
    std::fill(kept.begin(), kept.end(), 0);
    for (int64_t i = 0; i < topk_group; ++i) kept[order[i]] = 1;
    for (int64_t e = 0; e < E; ++e)
      if (!kept[e / size]) biased[e] = kLowest;
  }
};

template <class T>
void choose_on_cpu(const at::Tensor& scores_ne, const at::Tensor& bias_e, const at::Tensor& out_nk, int64_t num_groups, int64_t topk_group) {
  const auto N = scores_ne.size(0), E = scores_ne.size(1), k = out_nk.size(1);
  const T* scores = scores_ne.const_data_ptr<T>();
  const T* bias = bias_e.defined() ? bias_e.const_data_ptr<T>() : nullptr;
  int64_t* out = out_nk.mutable_data_ptr<int64_t>();
  at::parallel_for(0, N, std::max<int64_t>(1, kGrain / E), [&](int64_t begin, int64_t end) {
    Chooser<T> chooser{E, k, num_groups, topk_group};
    for (int64_t n = begin; n < end; ++n) chooser.choose(scores + n * E, bias, out + n * k);
  });
}

// The row of every token's document in a table over documents, [N], and how many rows it has: documents are numbered as they come, over ranks by
// their own numbers, which all ranks know.
std::pair<std::vector<int64_t>, int64_t> document_of_token(const Spans& spans, const Group* sequence, at::Device device) {
  std::unordered_map<int64_t, int64_t> numbers;
  std::vector<int64_t> document_n;
  document_n.reserve(static_cast<size_t>(spans.num_tokens()));
  int64_t size = 0;
  for (const Span& span : spans.list()) {
    const auto number = sequence ? span.document : numbers.try_emplace(span.document, size).first->second;
    size = std::max(size, number + 1);
    document_n.insert(document_n.end(), static_cast<size_t>(span.length), number);
  }
  if (!sequence) return {std::move(document_n), size};
  const auto most = at::full({1}, size, at::TensorOptions(at::kLong).device(device));
  sequence->all_reduce(most, Reduce::kMax);
  return {std::move(document_n), most.item<int64_t>()};
}

void check_mask(const at::Tensor& valid_n, int64_t num_tokens) {
  if (valid_n.dim() != 1 || valid_n.size(0) != num_tokens)
    fail("routing", fmt::format("the mask of valid tokens must be [{}], got [{}]", num_tokens, fmt::join(valid_n.sizes(), ", ")));
}

at::Tensor as_weights(const at::Tensor& valid_n, int64_t num_tokens, const at::TensorOptions& options) {
  if (!valid_n.defined()) return at::ones({num_tokens}, options);
  check_mask(valid_n, num_tokens);
  return valid_n.to(options);
}

bool kernels_take(const at::Tensor& scores_ne) {
  return on_gpu(scores_ne) && scores_ne.scalar_type() == at::kFloat && scores_ne.size(1) <= kMostRoutedExperts;
}

struct RoutedWeights : torch::autograd::Function<RoutedWeights> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& logits_ne, const at::Tensor& indices_nk, bool normed, double scaling) {
    ctx->save_for_backward({logits_ne, indices_nk});
    ctx->saved_data["normed"] = normed, ctx->saved_data["scaling"] = scaling;
    return gpu_kernels()->routed_weights(logits_ne, indices_nk, normed, scaling);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    return {gpu_kernels()->routed_weights_backward(saved[0], saved[1], ctx->saved_data["normed"].toBool(), ctx->saved_data["scaling"].toDouble(), grads[0]), {}, {}, {}};
  }
};

}  // namespace

at::Tensor router_logits(Context& ctx, const at::Tensor& x_nd, const Weight& gate_ed) { return linear(ctx, x_nd, gate_ed); }

at::Tensor choose_experts(const at::Tensor& scores_ne, const at::Tensor& bias_e, int64_t k, int64_t num_groups, int64_t topk_group) {
  check_choice(scores_ne, bias_e, k, num_groups, topk_group);
  if (kernels_take(scores_ne)) return gpu_kernels()->choose_experts(scores_ne, /*of_logits=*/false, bias_e, k, num_groups, topk_group);
  if (!scores_ne.is_cpu()) return choose_experts_ref(scores_ne, bias_e, k, num_groups, topk_group);
  const auto scores = scores_ne.detach().contiguous();
  const auto bias = bias_e.defined() ? bias_e.detach().to(scores.scalar_type()).contiguous() : bias_e;
  const auto out_nk = at::empty({scores.size(0), k}, scores.options().dtype(at::kLong));
  if (scores.scalar_type() == at::kFloat) choose_on_cpu<float>(scores, bias, out_nk, num_groups, topk_group);
  else choose_on_cpu<double>(scores, bias, out_nk, num_groups, topk_group);
  return out_nk;
}

at::Tensor even_experts(const at::Tensor& number_n, int64_t k, int64_t num_experts) {
  if (k < 1 || k > num_experts) fail("even_experts", fmt::format("k must be in [1, {}], got {}", num_experts, k));
  const auto choice_nk = number_n.unsqueeze(1).remainder(num_experts) * k + at::arange(k, number_n.options()).unsqueeze(0);
  return std::get<0>(choice_nk.remainder(num_experts).sort(1));
}

at::Tensor expert_weights(const at::Tensor& scores_ne, const at::Tensor& indices_nk, bool norm_topk_prob, double scaling) {
  auto weights_nk = scores_ne.gather(1, indices_nk);
  if (norm_topk_prob) weights_nk = weights_nk / (weights_nk.sum(1, true) + kTiny);
  return weights_nk * scaling;
}

RouterScores router_scores(const at::Tensor& logits_ne) {
  return {logits_ne, logits_ne.dim() == 2 && kernels_take(logits_ne) ? at::Tensor() : at::sigmoid(logits_ne)};
}
at::Tensor choose_experts(const RouterScores& scores, const at::Tensor& bias_e, int64_t k, int64_t num_groups, int64_t topk_group) {
  if (scores.scores_ne.defined()) return choose_experts(scores.scores_ne, bias_e, k, num_groups, topk_group);
  check_choice(scores.logits_ne, bias_e, k, num_groups, topk_group);
  return gpu_kernels()->choose_experts(scores.logits_ne, /*of_logits=*/true, bias_e, k, num_groups, topk_group);
}
at::Tensor expert_weights(const RouterScores& scores, const at::Tensor& indices_nk, bool norm_topk_prob, double scaling) {
  if (scores.scores_ne.defined()) return expert_weights(scores.scores_ne, indices_nk, norm_topk_prob, scaling);
  return RoutedWeights::apply(scores.logits_ne, indices_nk, norm_topk_prob, scaling);
}

at::Tensor seq_aux_loss(const at::Tensor& logits_ne, const Spans& spans, const at::Tensor& valid_n, int64_t k, const Group* sequence) {
  const auto N = logits_ne.size(0), E = logits_ne.size(1);
  if (N != spans.num_tokens()) fail("seq_aux_loss", fmt::format("logits must be [{}, E], got [{}, {}]", spans.num_tokens(), N, E));
  const auto scores_ne = at::sigmoid(logits_ne);
  // The sum over documents of sum_e P_e c_e is a sum over tokens whose coefficients carry no gradient.
  at::Tensor coefficient_ne;
  {
    at::NoGradGuard no_grad;
    const auto [document_n, num_documents] = document_of_token(spans, sequence, logits_ne.device());
    const auto document = at::tensor(at::ArrayRef<int64_t>(document_n), at::kLong).to(logits_ne.device());
    const auto valid = as_weights(valid_n, N, logits_ne.options());
    const auto chosen_nk = choose_experts(scores_ne, {}, k);
    // The choices of every expert, then the tokens.
    auto count_dx = at::zeros({num_documents * (E + 1)}, logits_ne.options());
    count_dx.index_add_(0, (document.unsqueeze(1) * (E + 1) + chosen_nk).flatten(), valid.unsqueeze(1).expand({N, k}).flatten());
    count_dx.index_add_(0, document * (E + 1) + E, valid);
    if (sequence && num_documents > 0) sequence->all_reduce(count_dx);
    count_dx = count_dx.view({num_documents, E + 1});
    const auto factor_d1 = count_dx.narrow(1, E, 1).clamp_min(1).square().reciprocal() * (static_cast<double>(E) / static_cast<double>(k));
    const auto coefficient_de = count_dx.narrow(1, 0, E) * factor_d1;
    coefficient_ne = coefficient_de.index_select(0, document) * valid.unsqueeze(1);
  }
  return (scores_ne / (scores_ne.sum(1, true) + kTiny) * coefficient_ne).sum();
}

at::Tensor router_z_loss(const at::Tensor& logits_ne, const at::Tensor& valid_n) {
  const auto z_n = at::logsumexp(logits_ne, {1});
  if (!valid_n.defined()) return z_n.square().sum();
  check_mask(valid_n, z_n.size(0));
  return z_n.masked_fill(valid_n.logical_not(), 0).square().sum();
}

at::Tensor expert_counts(const at::Tensor& indices_nk, const at::Tensor& valid_n, int64_t num_experts) {
  if (valid_n.defined()) check_mask(valid_n, indices_nk.size(0));
  if (lies_on_gpu(indices_nk) && num_experts <= kMostRoutedExperts && (!valid_n.defined() || valid_n.scalar_type() == at::kBool))
    return gpu_kernels()->expert_counts(indices_nk, valid_n, num_experts);
  const auto options = indices_nk.options().dtype(at::kFloat);
  const auto N = indices_nk.size(0), k = indices_nk.size(1);
  const auto weight = as_weights(valid_n, N, options).unsqueeze(1).expand({N, k}).flatten();
  return at::zeros({num_experts}, options).index_add_(0, indices_nk.flatten(), weight);
}

void update_router_bias(at::Tensor& bias_e, const at::Tensor& counts_e, double rate) {
  at::NoGradGuard no_grad;
  if (bias_e.sizes() != counts_e.sizes())
    fail("update_router_bias", fmt::format("bias and counts must have one shape, got [{}] and [{}]", fmt::join(bias_e.sizes(), ", "),
                                           fmt::join(counts_e.sizes(), ", ")));
  // In fp64: the mean of a global batch's counts must hit an equal count exactly.
  const auto counts = counts_e.to(bias_e.device()).to(at::kDouble);
  bias_e.add_(at::sign(counts.mean() - counts).to(bias_e.scalar_type()), rate);
}

}  // namespace tessera
