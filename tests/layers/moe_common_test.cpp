#include "layers/moe_common.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "tests/support/compare.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

const Env kEnv{.hidden_size = 24, .vocab_size = 64, .num_layers = 4};
constexpr int64_t kLatent = 8, kTokens = 30;

MoeConfig example() {
  MoeConfig c;
  c.num_experts = 12, c.top_k = 3, c.intermediate_size = 10, c.shared_intermediate_size = 20, c.scaling = 2.5;
  c.num_groups = 4, c.topk_group = 2, c.bias = true, c.aux_loss_coeff = 0.3, c.z_loss_coeff = 0.2;
  return c;
}

// Parameters of random fp64 values, with their handles.
struct Layer {
  ParamTable table;
  std::vector<at::Tensor> tensors;
  Weights weights;

  explicit Layer(const MoeConfig& c) : table(moe_params(c, kEnv, kEnv.hidden_size, kLatent)) {
    for (const Param& row : table) {
      tensors.push_back((at::randn(row.shape, at::kDouble) * 0.5).set_requires_grad(true));
      weights.add(tensors.back(), &row);
    }
    weights.add_buffer("gate.e_score_correction_bias", at::randn({c.num_experts}) * 0.1);
  }
};

// Every expert on every token, and a mask of the chosen ones, by the scores or as given.
at::Tensor dense(const Layer& layer, const MoeConfig& c, const at::Tensor& x_nd, const at::Tensor& z_nl, const at::Tensor& given_ne = {}) {
  const auto W = [&](const char* name) { return layer.weights[name].tensor(); };
  const auto relu2 = [](const at::Tensor& t) { return at::relu(t) * at::relu(t); };
  const auto s_ne = at::sigmoid(at::linear(x_nd, W("gate.weight")));
  const auto biased_ngs = (s_ne + layer.weights.buffer("gate.e_score_correction_bias")).detach().view({x_nd.size(0), c.num_groups, -1});
  const auto rank_ng = std::get<0>(biased_ngs.sort(-1, true)).narrow(2, 0, 2).sum(2);
  const auto keep_ng = rank_ng.ge(std::get<0>(rank_ng.sort(1, true)).select(1, c.topk_group - 1).unsqueeze(1));
  const auto open_ne = biased_ngs.masked_fill(keep_ng.logical_not().unsqueeze(2), -1e9).flatten(1);
  const auto chosen_ne = given_ne.defined() ? given_ne : open_ne.ge(std::get<0>(open_ne.sort(1, true)).select(1, c.top_k - 1).unsqueeze(1));
  const auto kept_ne = s_ne * chosen_ne;
  const auto weight_ne = kept_ne / (kept_ne.sum(1, true) + 1e-20) * c.scaling;
  auto out = at::zeros_like(z_nl);
  for (int64_t e = 0; e < c.num_experts; ++e) {
    const auto h = relu2(at::linear(z_nl, W("experts.up_proj.weight")[e]));
    out = out + weight_ne.select(1, e).unsqueeze(1) * at::linear(h, W("experts.down_proj.weight")[e]);
  }
  return out;
}

TEST(MoeCommon, RoutedExpertsEqualTheDenseForm) {
  const auto c = example();
  const Layer layer(c);
  const auto spans = Spans::documents({7, 1, 22});
  Context ctx(spans);
  const auto x_nd = at::randn({kTokens, kEnv.hidden_size}, at::kDouble).set_requires_grad(true);
  const auto z_nl = at::randn({kTokens, kLatent}, at::kDouble).set_requires_grad(true);
  const auto got = routed_experts(ctx, x_nd, z_nl, layer.weights, c), want = dense(layer, c, x_nd, z_nl);
  EXPECT_TRUE(close(got, want, tolerance(at::kDouble, Op::kModel)));
  std::vector<at::Tensor> inputs{x_nd, z_nl};
  inputs.insert(inputs.end(), layer.tensors.begin(), layer.tensors.begin() + 3);
  const auto dy = at::randn_like(got);
  const auto got_grads = torch::autograd::grad({got}, inputs, {dy}), want_grads = torch::autograd::grad({want}, inputs, {dy});
  for (size_t i = 0; i < inputs.size(); ++i) EXPECT_TRUE(close(got_grads[i], want_grads[i], tolerance(at::kDouble, Op::kModel))) << "input " << i;
  EXPECT_TRUE(ctx.losses().empty());
  EXPECT_TRUE(ctx.counts().empty());
}

// Groups of which a token may use two do not hold it, and weights come from the scores, with their gradient.
TEST(MoeCommon, BalancedRoutingReplacesTheChoiceAlone) {
  auto c = example();
  c.aux_loss_coeff = 0, c.z_loss_coeff = 0;
  const Layer layer(c);
  const auto spans = Spans::documents({7, 1, 22});
  Context ctx(spans);
  ctx.set_training(true);
  ctx.set_balanced_routing(at::arange(5, 5 + kTokens, at::kLong));
  auto given_ne = at::zeros({kTokens, c.num_experts}, at::kBool);
  for (int64_t i = 0; i < kTokens; ++i)
    for (int64_t j = 0; j < c.top_k; ++j) given_ne[i][((i + 5) * c.top_k + j) % c.num_experts].fill_(true);
  const auto x_nd = at::randn({kTokens, kEnv.hidden_size}, at::kDouble).set_requires_grad(true);
  const auto z_nl = at::randn({kTokens, kLatent}, at::kDouble).set_requires_grad(true);
  const auto got = routed_experts(ctx, x_nd, z_nl, layer.weights, c), want = dense(layer, c, x_nd, z_nl, given_ne);
  EXPECT_TRUE(close(got, want, tolerance(at::kDouble, Op::kModel)));
  std::vector<at::Tensor> inputs{x_nd, z_nl};
  inputs.insert(inputs.end(), layer.tensors.begin(), layer.tensors.begin() + 3);
  const auto dy = at::randn_like(got);
  const auto got_grads = torch::autograd::grad({got}, inputs, {dy}), want_grads = torch::autograd::grad({want}, inputs, {dy});
  for (size_t i = 0; i < inputs.size(); ++i) EXPECT_TRUE(close(got_grads[i], want_grads[i], tolerance(at::kDouble, Op::kModel))) << "input " << i;
  const auto load_e = ctx.counts().at("expert_load");
  EXPECT_LE((load_e.max() - load_e.min()).item<float>(), 1);
  EXPECT_EQ(load_e.sum().item<float>(), static_cast<float>(kTokens * c.top_k));
}

TEST(MoeCommon, SharedExpertsAreAdded) {
  auto c = example();
  const Layer layer(c);
  const auto spans = Spans::uniform(1, kTokens);
  Context ctx(spans);
  const auto W = [&](const char* name) { return layer.weights[name].tensor(); };
  const auto x_nd = at::randn({kTokens, kEnv.hidden_size}, at::kDouble), routed_nd = at::randn_like(x_nd);
  const auto h = at::relu(at::linear(x_nd, W("shared_experts.up_proj.weight"), W("shared_experts.up_proj.bias")));
  const auto want = routed_nd + at::linear(h * h, W("shared_experts.down_proj.weight"), W("shared_experts.down_proj.bias"));
  EXPECT_TRUE(close(add_shared_experts(ctx, routed_nd, x_nd, layer.weights, c), want, tolerance(at::kDouble, Op::kMatmul)));
  c.shared_intermediate_size = 0;
  EXPECT_TRUE(bit_equal(add_shared_experts(ctx, routed_nd, x_nd, layer.weights, c), routed_nd));
  EXPECT_EQ(moe_params(c, kEnv, 24, 24).size(), 3u);
}

TEST(MoeCommon, TrainingReportsOnceAndReplaysItsChoice) {
  const auto c = example();
  Layer layer(c);
  const auto spans = Spans::documents({7, 1, 22});
  auto valid_n = at::zeros({kTokens}, at::kBool).fill_(true);
  valid_n.narrow(0, 25, 5).fill_(false);
  Decisions decisions;
  const auto pass = [&](Context& ctx, bool replaying) {
    ctx.set_training(true);
    ctx.set_valid(valid_n);
    ctx.set_decisions(&decisions, replaying);
    const auto x_nd = at::randn({kTokens, kEnv.hidden_size}, at::kDouble);
    routed_experts(ctx, x_nd, x_nd.narrow(1, 0, kLatent), layer.weights, c);
    return decisions.at("experts").clone();
  };
  Context first(spans), second(spans);
  const auto chosen = pass(first, false), repeated = pass(second, true);
  EXPECT_TRUE(bit_equal(repeated, chosen)) << "another input, the same choice";
  ASSERT_EQ(first.losses().size(), 2u);
  EXPECT_EQ(first.losses()[0].name, "seq_aux");
  EXPECT_EQ(first.losses()[0].per, Per::kDocument);
  EXPECT_EQ(first.losses()[1].name, "z");
  EXPECT_EQ(first.losses()[1].per, Per::kToken);
  EXPECT_EQ(first.counts().at("expert_load").sum().item<double>(), 25 * 3);
  EXPECT_TRUE(second.counts().empty());
}

TEST(MoeCommon, BiasFollowsTheLoad) {
  auto c = example();
  c.num_experts = 4;
  Buffers buffers{{"gate.e_score_correction_bias", at::zeros({4})}};
  const Counts counts{{"expert_load", at::tensor({1., 3., 2., 2.}).to(at::kFloat)}};
  moe_after_step(c, buffers, {});
  EXPECT_EQ(buffers.begin()->second.abs().max().item<float>(), 0) << "nothing was counted";
  moe_after_step(c, buffers, counts);
  const auto want = at::tensor({1e-3, -1e-3, 0., 0.}).to(at::kFloat);
  EXPECT_TRUE(bit_equal(buffers.begin()->second, want));
  c.bias_update_rate = 0;
  moe_after_step(c, buffers, counts);
  EXPECT_TRUE(bit_equal(buffers.begin()->second, want));
}

std::string broken_rules(const MoeConfig& c, const Mesh& mesh = {}) {
  Env env = kEnv;
  env.mesh = mesh;
  Issues issues;
  check_moe(c, env, issues);
  std::string text;
  for (const Issue& issue : issues.list()) text += issue.key + ": " + issue.rule + " / " + issue.help + "\n";
  return text;
}

TEST(MoeCommon, RulesNameTheirNumbers) {
  auto c = example();
  EXPECT_EQ(broken_rules(c), "");
  c.top_k = 13;
  EXPECT_EQ(broken_rules(c), "top_k: must be at most the number of experts, got 13 > 12 / nearest: 12\n");
  c = example(), c.num_groups = 5;
  EXPECT_EQ(broken_rules(c), "num_groups: must divide the number of experts, got 12 % 5 = 2 / nearest: 4, 6\n");
  c = example(), c.num_groups = 12;
  EXPECT_EQ(broken_rules(c), "num_groups: must leave at least 2 experts a group, got 12 / 12 = 1 / nearest: 6\n");
  c = example(), c.topk_group = 5;
  EXPECT_EQ(broken_rules(c), "topk_group: must be at most num_groups, got 5 > 4 / nearest: 4\n");
  c = example(), c.topk_group = 1, c.top_k = 4;
  EXPECT_EQ(broken_rules(c), "topk_group: must keep groups of at least top_k = 4 experts in all, got 1 * 3 = 3 / nearest: 2\n");
  EXPECT_EQ(broken_rules(example(), {.dp_shard = 8, .tp = 2, .ep = 8, .etp = 2}), "num_experts: the number of experts must be a multiple of expert_parallel_degree, got 12 % 8 = 4 / nearest: 8, 16\n");
  EXPECT_EQ(broken_rules(example(), {.dp_shard = 24, .ep = 24}), "num_experts: the number of experts must be a multiple of expert_parallel_degree, got 12 % 24 = 12 / nearest: 24\n");
  EXPECT_EQ(broken_rules(example(), {.dp_shard = 4, .etp = 4}), "intermediate_size: must be a multiple of expert_tensor_parallel_degree, got 10 % 4 = 2 / nearest: 8, 12\n");
  EXPECT_EQ(broken_rules(example(), {.tp = 3}), "shared_intermediate_size: must be a multiple of tensor_parallel_degree, got 20 % 3 = 2 / nearest: 18, 21\n");
}

}  // namespace
}  // namespace tessera
