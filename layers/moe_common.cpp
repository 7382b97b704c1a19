#include "layers/moe_common.hpp"

#include <ATen/TensorOperators.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "layers/activation.hpp"
#include "layers/collectives.hpp"
#include "layers/expert_mlp.hpp"
#include "layers/linear.hpp"
#include "layers/routing.hpp"

namespace tessera {
namespace {

constexpr auto kBias = "gate.e_score_correction_bias";
constexpr auto kLoad = "expert_load";  // Context::count

}  // namespace

HfTable moe_hf() {
  return {.layer_words = {"moe"},
          .inert = {"moe_shared_expert_overlap"},
          .must_be = {{"n_shared_experts", int64_t{1}}, {"mlp_hidden_act", std::string("relu2")}},
          .unsaid = {"aux_loss_coeff", "z_loss_coeff", "bias_update_rate"}};
}

std::string nearest_divisors(int64_t value, int64_t wanted, int64_t limit) {
  constexpr int64_t kMost = 1 << 22;  // tried: more take a while, and nobody has so many groups
  int64_t below = 0, above = 0;
  for (int64_t d = 1; d <= std::min({value, limit, kMost}); ++d) {
    if (value % d) continue;
    if (d <= wanted) below = d;
    else if (!above) above = d;
  }
  if (below && above) return fmt::format("nearest: {}, {}", below, above);
  return fmt::format("nearest: {}", below ? below : above);
}

namespace {

// A size that a mesh axis cuts into equal parts.
void check_parts(const char* key, const char* what, int64_t size, const char* axis, int64_t degree, Issues& issues) {
  if (size % degree == 0) return;
  const int64_t below = size / degree * degree, above = below + degree;
  issues.add(key, fmt::format("{}must be a multiple of {}, got {} % {} = {}", what, axis, size, degree, size % degree),
             below ? fmt::format("nearest: {}, {}", below, above) : fmt::format("nearest: {}", above));
}

}  // namespace

void check_moe(const MoeConfig& c, const Env& env, Issues& issues) {
  check_parts("num_experts", "the number of experts ", c.num_experts, "expert_parallel_degree", env.mesh.ep, issues);
  check_parts("intermediate_size", "", c.intermediate_size, "expert_tensor_parallel_degree", env.mesh.etp, issues);
  check_parts("shared_intermediate_size", "", c.shared_intermediate_size, "tensor_parallel_degree", env.mesh.tp, issues);
  if (c.top_k > c.num_experts)
    issues.add("top_k", fmt::format("must be at most the number of experts, got {} > {}", c.top_k, c.num_experts),
               fmt::format("nearest: {}", c.num_experts));
  if (c.topk_group > c.num_groups)
    issues.add("topk_group", fmt::format("must be at most num_groups, got {} > {}", c.topk_group, c.num_groups),
               fmt::format("nearest: {}", c.num_groups));
  if (c.num_groups == 1 || c.top_k > c.num_experts) return;
  if (c.num_experts % c.num_groups) {
    issues.add("num_groups", fmt::format("must divide the number of experts, got {} % {} = {}", c.num_experts, c.num_groups, c.num_experts % c.num_groups),
               nearest_divisors(c.num_experts, c.num_groups, c.num_experts / 2));
    return;
  }
  const auto size = c.num_experts / c.num_groups;
  if (size < 2) {
    issues.add("num_groups", fmt::format("must leave at least 2 experts a group, got {} / {} = {}", c.num_experts, c.num_groups, size),
               nearest_divisors(c.num_experts, c.num_experts / 2, c.num_experts / 2));
    return;
  }
  if (c.topk_group <= c.num_groups && c.topk_group * size < c.top_k)
    issues.add("topk_group", fmt::format("must keep groups of at least top_k = {} experts in all, got {} * {} = {}", c.top_k, c.topk_group, size, c.topk_group * size),
               fmt::format("nearest: {}", (c.top_k + size - 1) / size));
}

ParamTable moe_params(const MoeConfig& c, const Env& env, int64_t router_width, int64_t expert_width) {
  const auto D = env.hidden_size, W = expert_width, E = c.num_experts, F = c.intermediate_size, S = c.shared_intermediate_size;
  const auto in = Init::normal(env.init_std), out = Init::normal(env.init_std / std::sqrt(static_cast<double>(env.num_layers)));
  ParamTable table{
      {.name = "gate.weight", .shape = {E, router_width}, .shards = replicated(), .init = in, .fp32 = true},
      {.name = "experts.up_proj.weight", .shape = {E, F, W}, .shards = {{Axis::kExpert, 0}, {Axis::kExpertTensor, 1}}, .init = in,
       .hf_name = "mixer.experts.{}.up_proj.weight", .hf_packed_name = "mixer.experts.up_proj"},
      {.name = "experts.down_proj.weight", .shape = {E, W, F}, .shards = {{Axis::kExpert, 0}, {Axis::kExpertTensor, 2}}, .init = out,
       .hf_name = "mixer.experts.{}.down_proj.weight", .hf_packed_name = "mixer.experts.down_proj"},
  };
  if (S == 0) return table;
  table.push_back({.name = "shared_experts.up_proj.weight", .shape = {S, D}, .shards = {{Axis::kTensor, 0}}, .init = in});
  table.push_back({.name = "shared_experts.down_proj.weight", .shape = {D, S}, .shards = {{Axis::kTensor, 1}}, .init = out});
  if (!c.bias) return table;
  table.push_back({.name = "shared_experts.up_proj.bias", .shape = {S}, .shards = {{Axis::kTensor, 0}}, .init = Init::constant(0), .decay = false});
  table.push_back({.name = "shared_experts.down_proj.bias", .shape = {D}, .shards = replicated(), .init = Init::constant(0), .decay = false});
  return table;
}

BufferTable moe_buffers(const MoeConfig& c) { return {{.name = kBias, .shape = {c.num_experts}}}; }

ExchangeTable moe_exchanges(const MoeConfig& c, const Env& env, int64_t expert_width) {
  using X = Exchange;
  const auto E = c.num_experts, D = env.hidden_size, etp = env.mesh.etp, rows = c.top_k * etp;
  ExchangeTable table{{.name = kLoad, .over = X::Over::kStage, .per = X::Per::kStep, .elements = E, .bytes = 4}};
  if (c.z_loss_coeff > 0) table.push_back({.name = "z", .over = X::Over::kStage, .per = X::Per::kLoss, .elements = 1, .bytes = 8});
  if (c.aux_loss_coeff > 0) {
    table.push_back({.name = "seq_aux", .over = X::Over::kStage, .per = X::Per::kLoss, .elements = 1, .bytes = 8});
    table.push_back({.name = "number of documents", .over = X::Over::kSequence, .per = X::Per::kCall, .elements = 1, .bytes = 8, .backward = false});
    table.push_back({.name = "load of documents", .over = X::Over::kSequence, .per = X::Per::kDocument, .elements = E + 1, .bytes = 4, .backward = false});
  }
  if (env.mesh.ep * etp > 1) {
    table.push_back({.name = "rows of experts", .over = X::Over::kExperts, .form = X::Form::kSend, .per = X::Per::kCall, .elements = E * etp, .bytes = 8, .backward = false, .again = false});
    table.push_back({.name = "rows to experts", .over = X::Over::kExperts, .form = X::Form::kSend, .elements = rows * expert_width});
    table.push_back({.name = "rows from experts", .over = X::Over::kExperts, .form = X::Form::kSend, .elements = rows * expert_width});
  }
  if (c.shared_intermediate_size > 0 && env.mesh.tp > 1) {
    table.push_back({.name = "tokens to shared experts", .form = X::Form::kGather, .elements = D});
    table.push_back({.name = "sums of shared experts", .form = X::Form::kScatter, .elements = D});
  }
  return table;
}

Cost moe_cost(const MoeConfig& c, const Env& env, double num_tokens, int64_t router_width, int64_t expert_width) {
  const double N = num_tokens, D = env.hidden_size, R = router_width, W = expert_width, E = c.num_experts, k = c.top_k;
  const double F = c.intermediate_size, S = c.shared_intermediate_size;
  return {.matmul = N * (2 * R * E + 4 * k * W * F + 4 * D * S),
          .elementwise = N * (4 * E + k * (2 * F + 2 * W) + 2 * S),
          .bytes = N * (2 * D + R + 3 * E + 4 * k * (F + W) + 4 * S),
          .activations = N * (D + R + 2 * E + 2 * k * (F + W) + 2 * S)};
}

void moe_after_step(const MoeConfig& c, Buffers& buffers, const Counts& counts) {
  const auto load = counts.find(kLoad);
  if (c.bias_update_rate == 0 || load == counts.end()) return;
  update_router_bias(buffers.find(kBias)->second, load->second, c.bias_update_rate);
}

at::Tensor routed_experts(Context& ctx, const at::Tensor& router_input_nr, const at::Tensor& x_nw, const Weights& w, const MoeConfig& c) {
  const auto logits_ne = router_logits(ctx, router_input_nr, w["gate.weight"]);
  const auto scores = router_scores(logits_ne);
  const auto indices_nk = ctx.once("experts", [&] {
    const auto chosen_nk = choose_experts(scores, w.buffer(kBias), c.top_k, c.num_groups, c.topk_group);  // a measurement times it also where it goes by even ones
    return ctx.balanced_routing().defined() ? even_experts(ctx.balanced_routing(), c.top_k, c.num_experts) : chosen_nk;
  });
  if (ctx.training()) {
    if (c.aux_loss_coeff > 0)
      ctx.add_loss("seq_aux", seq_aux_loss(logits_ne, ctx.spans(), ctx.valid_n(), c.top_k, ctx.sequence_group()) * c.aux_loss_coeff, Per::kDocument);
    if (c.z_loss_coeff > 0) ctx.add_loss("z", router_z_loss(logits_ne, ctx.valid_n()) * c.z_loss_coeff, Per::kToken);
    ctx.count(kLoad, expert_counts(indices_nk, ctx.valid_n(), c.num_experts));
  }
  const auto weights_nk = expert_weights(scores, indices_nk, c.norm_topk_prob, c.scaling);
  const Group* group = ctx.expert_group();
  if (!group) return expert_mlp(ctx, x_nw, weights_nk, w["experts.up_proj.weight"], w["experts.down_proj.weight"], dispatch(indices_nk, c.num_experts));
  // The etp ranks of an expert each give a summand, as experts of their own would that have the same weight.
  const auto etp = ctx.mesh().etp;
  const auto copies_nc = copies_of_experts(indices_nk, c.num_experts, *group, etp);
  const auto d = dispatch(copies_nc, c.num_experts * etp);
  const auto arriving_e = ctx.once("arriving", [&] { return exchange_counts(d.counts_e, *group, x_nw.device()); });
  const auto route = expert_route(d.counts_e, arriving_e, *group, x_nw.device());
  const auto compute = [&](const at::Tensor& x_mw, const at::Tensor& counts_e) {
    const auto h_mf = relu2(grouped_linear(ctx, x_mw, w["experts.up_proj.weight"], counts_e));
    return grouped_linear(ctx, h_mf, w["experts.down_proj.weight"], counts_e);
  };
  const auto y_mw = rows_from_experts(compute(rows_to_experts(permute_tokens(x_nw, d), route, *group), route.arrived.counts_e), route, *group);
  return combine_tokens(y_mw, weights_nk.repeat_interleave(etp, 1), d);
}

at::Tensor add_shared_experts(Context& ctx, const at::Tensor& routed_nd, const at::Tensor& x_nd, const Weights& w, const MoeConfig& c) {
  if (c.shared_intermediate_size == 0) return routed_nd;
  const auto h_ns = relu2(linear(ctx, gather_tokens(ctx, x_nd), w["shared_experts.up_proj.weight"], w.find("shared_experts.up_proj.bias")));
  const auto y_nd = partial_sum_linear(ctx, h_ns, w["shared_experts.down_proj.weight"], w.find("shared_experts.down_proj.bias"));
  return routed_nd + reduce_scatter_tokens(ctx, y_nd);
}

}  // namespace tessera
