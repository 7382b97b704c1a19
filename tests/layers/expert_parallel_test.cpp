// Blocks with routed experts over ranks, against one process: every rank has tokens of its own, and its part of the experts.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <map>
#include <optional>

#include "config/config.hpp"
#include "plugin/registry.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/ranks.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

constexpr int64_t kHidden = 24, kExperts = 8, kTopK = 3, kLatent = 12;
constexpr auto kBias = "gate.e_score_correction_bias";

const Registry& registry() {
  static const Registry loaded = Registry::load(Registry::search_paths({}));
  return loaded;
}

// A micro-batch of one data-parallel rank.
struct Micro {
  Spans spans;
  at::Tensor x_nd, dy_nd, valid_n;
};

// A block with weights, and what it is fed.
struct Problem {
  std::shared_ptr<const Config> config;
  std::vector<Param> params;
  std::vector<at::Tensor> weights;
  at::Tensor bias_e;
  std::vector<Micro> micros;

  const Binding& binding() const { return config->binding('X'); }
  Env env(const Mesh& mesh) const { return {.hidden_size = kHidden, .vocab_size = 40, .num_layers = 2, .mesh = mesh}; }
};

// One micro-batch a list of documents.
Problem problem(const std::string& type, at::ScalarType dtype, const std::vector<std::vector<int64_t>>& documents) {
  at::manual_seed(11);
  const std::string text = fmt::format(
      "[model]\nhybrid_override_pattern = \"X\"\nvocab_size = 40\nhidden_size = {}\n[symbols]\nX = \"{}\"\n[blocks.{}]\n{}num_experts = {}\ntop_k = {}\n"
      "intermediate_size = 12\nshared_intermediate_size = 20\nscaling = 2.5\nbias = true\naux_loss_coeff = 0.3\nz_loss_coeff = 0.2\n",
      kHidden, type, type, type == "moe" ? "" : fmt::format("latent_size = {}\n", kLatent), kExperts, kTopK);
  Problem p{.config = std::make_shared<const Config>(parse_config(text, "test.toml", {}, registry()))};
  p.params = p.binding().type->params(p.binding().config, p.env({}));
  for (const Param& param : p.params) p.weights.push_back(at::randn(param.shape, at::kDouble).mul(0.3).to(param.fp32 && dtype != at::kDouble ? at::kFloat : dtype));
  p.bias_e = at::randn({kExperts}).mul(0.1);
  for (const auto& lengths : documents) {
    const Spans spans = Spans::documents(lengths);
    const int64_t n = spans.num_tokens();
    p.micros.push_back({spans, at::randn({n, kHidden}, at::kDouble).to(dtype), at::randn({n, kHidden}, at::kDouble).to(dtype), at::rand({n}).lt(0.8)});
  }
  return p;
}

// All ranks' results together, or one process's.
struct Outcome {
  std::vector<at::Tensor> y, dx;              // of every micro-batch
  std::vector<at::Tensor> gradients;          // of every whole parameter
  std::map<std::string, at::Tensor> losses;
  at::Tensor load_e;
};

struct Pass {
  at::Tensor y_nd, dx_nd;
  std::vector<at::Tensor> gradients;
  std::map<std::string, at::Tensor> losses;
  at::Tensor load_e;
};

// What a rank holds of a parameter.
at::Tensor local_part(const Param& param, const at::Tensor& whole, const Mesh& mesh, const Place& place) {
  at::Tensor part = whole;
  for (const Shard& shard : param.shards) {
    const int64_t rank = shard.axis == Axis::kTensor ? place.tp : shard.axis == Axis::kExpert ? place.ep : place.etp;
    std::vector<at::Tensor> list;
    const auto ranges = shard_ranges(param, shard, degree(mesh, shard.axis), rank, nullptr);
    for (const Range& range : ranges.value()) list.push_back(part.narrow(shard.dim, range.begin, range.end - range.begin));
    part = at::cat(list, shard.dim);
  }
  return part.contiguous();
}

// Forward and backward of one rank's tokens. With `recompute`, the forward runs twice as recomputation has it.
Pass pass(const Problem& p, const Micro& micro, const Mesh& mesh, const MeshGroups* groups, const ContextCut* cut, int64_t sequence_tokens, bool recompute) {
  const at::AutoGradMode grad_mode(true);
  std::vector<at::Tensor> leaves{micro.x_nd.detach().clone().requires_grad_()};
  Weights weights;
  for (size_t i = 0; i < p.params.size(); ++i) {
    leaves.push_back(p.weights[i].detach().clone().requires_grad_());
    weights.add(groups ? local_part(p.params[i], leaves.back(), mesh, groups->place()) : leaves.back(), &p.params[i]);
  }
  weights.add_buffer(kBias, p.bias_e);
  const auto block = p.binding().type->make(p.binding().config, p.env(mesh));
  Decisions decisions;
  Pass out;
  std::optional<Context> ctx;
  for (const bool replaying : {false, true}) {
    if (!recompute && replaying) break;
    const at::AutoGradMode with_gradients(replaying || !recompute);
    ctx.emplace(micro.spans);
    ctx->set_training(true);
    ctx->set_mesh(mesh);
    ctx->set_groups(groups);
    ctx->set_cut(cut);
    ctx->set_sequence_tokens(sequence_tokens);
    ctx->set_valid(micro.valid_n);
    ctx->set_decisions(&decisions, replaying);
    out.y_nd = block->forward(leaves[0], weights, *ctx);
    if (!replaying) out.load_e = ctx->counts().at("expert_load");
  }
  at::Tensor loss = (out.y_nd.to(at::kDouble) * micro.dy_nd).sum();
  for (const LossTerm& term : ctx->losses()) {
    out.losses[term.name] = term.sum.detach();
    loss = loss + term.sum * (term.per == Per::kToken ? 0.3 : 0.7);
  }
  out.gradients = torch::autograd::grad({loss}, leaves);
  out.dx_nd = out.gradients.front();
  out.gradients.erase(out.gradients.begin());
  return out;
}

Outcome one_process(const Problem& p) {
  Outcome whole;
  for (const Micro& micro : p.micros) {
    const Pass one = pass(p, micro, {}, nullptr, nullptr, -1, false);
    whole.y.push_back(one.y_nd.detach()), whole.dx.push_back(one.dx_nd);
    const bool first = whole.gradients.empty();
    for (size_t i = 0; i < one.gradients.size(); ++i) {
      if (first) whole.gradients.push_back(one.gradients[i].to(at::kDouble));
      else whole.gradients[i].add_(one.gradients[i]);
    }
    for (const auto& [name, value] : one.losses) whole.losses[name] = first ? value : whole.losses[name] + value;
    whole.load_e = first ? one.load_e : whole.load_e + one.load_e;
  }
  return whole;
}

at::Tensor summed(const at::Tensor& x, const Group* group) {
  at::Tensor sum = x.detach().to(at::kDouble).contiguous().clone();
  group->all_reduce(sum);
  return sum;
}

// Every rank's outputs and gradients, losses and counts added up, against one process.
void expect_equal(const Problem& p, const Mesh& mesh, at::ScalarType dtype, bool recompute = false) {
  ASSERT_EQ(static_cast<int64_t>(p.micros.size()), mesh.dp_shard);
  const Outcome want = one_process(p);
  const double limit = tolerance(dtype, Op::kModel);
  run_ranks(mesh, [&](MeshGroups& groups) {
    SCOPED_TRACE(fmt::format("{}, {}, rank {} of {}", p.binding().type->type(), c10::toString(dtype), groups.place().rank, mesh.size()));
    const auto data = static_cast<size_t>(groups.place().dp_shard);
    const Micro& whole = p.micros[data];
    const ContextCut cut(whole.spans, mesh.cp, groups.place().cp);
    const Range range = sequence_range(cut.spans().num_tokens(), mesh.tp, groups.place().tp);
    const at::Tensor rows = cut.take(at::arange(whole.spans.num_tokens())).narrow(0, range.begin, range.end - range.begin);
    const auto mine = [&](const at::Tensor& whole_n) { return whole_n.index_select(0, rows); };
    const Micro own{spans_between(cut.spans(), range.begin, range.end), mine(whole.x_nd), mine(whole.dy_nd), mine(whole.valid_n)};
    const Pass got = pass(p, own, mesh, &groups, mesh.cp > 1 ? &cut : nullptr, cut.spans().num_tokens(), recompute);
    EXPECT_TRUE(close(got.y_nd, mine(want.y[data]), limit)) << "output";
    EXPECT_TRUE(close(got.dx_nd, mine(want.dx[data]), limit)) << "gradient of the input";
    for (size_t i = 0; i < p.params.size(); ++i) EXPECT_TRUE(close(summed(got.gradients[i], groups.all()), want.gradients[i], limit)) << "gradient of " << p.params[i].name;
    ASSERT_EQ(got.losses.size(), want.losses.size());
    for (const auto& [name, value] : want.losses) EXPECT_TRUE(close(summed(got.losses.at(name), groups.all()), value, limit)) << "loss " << name;
    EXPECT_TRUE(bit_equal(summed(got.load_e, groups.all()), want.load_e.to(at::kDouble))) << "load";
  });
}

// Documents for every data-parallel rank; some of one token, and of other lengths on every rank.
std::vector<std::vector<int64_t>> documents_for(const Mesh& mesh) {
  std::vector<std::vector<int64_t>> list;
  for (int64_t r = 0; r < mesh.dp_shard; ++r) list.push_back({5 + r, 1, 13 - 2 * r});
  return list;
}

const Mesh kMeshes[] = {
    {.dp_shard = 2, .ep = 2},
    {.dp_shard = 4, .ep = 4},
    {.dp_shard = 4, .ep = 2},
    {.dp_shard = 2, .etp = 2},
    {.dp_shard = 4, .ep = 2, .etp = 2},
    {.tp = 2, .ep = 2},
    {.tp = 2, .etp = 2},
    {.tp = 4},
    {.cp = 2, .ep = 2},
    {.dp_shard = 2, .cp = 2, .ep = 4},
    {.cp = 2, .tp = 2, .ep = 2, .etp = 2},
};

class ExpertParallel : public testing::TestWithParam<std::string> {};

TEST_P(ExpertParallel, RanksTogetherComputeWhatOneProcessDoes) {
  for (const Mesh& mesh : kMeshes) {
    SCOPED_TRACE(fmt::format("dp_shard {}, cp {}, tp {}, ep {}, etp {}", mesh.dp_shard, mesh.cp, mesh.tp, mesh.ep, mesh.etp));
    expect_equal(problem(GetParam(), at::kDouble, documents_for(mesh)), mesh, at::kDouble);
  }
}

TEST_P(ExpertParallel, InEveryDtype) {
  const Mesh mesh{.dp_shard = 2, .tp = 2, .ep = 2, .etp = 2};
  for (const auto dtype : {at::kFloat, at::kBFloat16}) expect_equal(problem(GetParam(), dtype, documents_for(mesh)), mesh, dtype);
}

TEST_P(ExpertParallel, ExpertsAndRanksMayStarve) {
  for (const Mesh& mesh : {Mesh{.dp_shard = 4, .ep = 4}, Mesh{.dp_shard = 4, .ep = 2, .etp = 2}, Mesh{.tp = 2, .ep = 2}}) {
    Problem p = problem(GetParam(), at::kDouble, documents_for(mesh));
    for (const int64_t first : {int64_t{0}, kExperts - kTopK}) {  // all tokens go to the first experts, then to the last
      p.bias_e = at::zeros({kExperts});
      p.bias_e.narrow(0, first, kTopK).fill_(1000);
      expect_equal(p, mesh, at::kDouble);
    }
  }
}

TEST_P(ExpertParallel, RanksWithoutTokensTakePart) {
  expect_equal(problem(GetParam(), at::kDouble, {{2}}), {.tp = 4, .ep = 4}, at::kDouble);
  expect_equal(problem(GetParam(), at::kDouble, {{1}}), {.cp = 2, .tp = 2, .ep = 2, .etp = 2}, at::kDouble);
}

TEST_P(ExpertParallel, RecomputationMeetsTheOthersAgain) {
  const Mesh mesh{.cp = 2, .tp = 2, .ep = 4};
  expect_equal(problem(GetParam(), at::kDouble, documents_for(mesh)), mesh, at::kDouble, /*recompute=*/true);
}

// Rows travel in the width that the experts work in, once for each rank that holds a part of their expert.
TEST_P(ExpertParallel, RowsTravelInTheExpertsWidth) {
  for (const int64_t etp : {1, 2}) {
    const Mesh mesh{.dp_shard = 2 * etp, .ep = 2, .etp = etp};
    std::vector<std::vector<int64_t>> documents(static_cast<size_t>(mesh.dp_shard), {10});
    Problem p = problem(GetParam(), at::kDouble, documents);
    p.bias_e = at::zeros({kExperts});
    p.bias_e.narrow(0, 0, kTopK).fill_(1000);  // all of them to part 0
    run_ranks(mesh, [&](MeshGroups& groups) {
      const at::NoGradGuard no_grad;
      Weights weights;
      for (size_t i = 0; i < p.params.size(); ++i) weights.add(local_part(p.params[i], p.weights[i], mesh, groups.place()), &p.params[i]);
      weights.add_buffer(kBias, p.bias_e);
      Context ctx(p.micros[0].spans);
      ctx.set_mesh(mesh), ctx.set_groups(&groups);
      p.binding().type->make(p.binding().config, p.env(mesh))->forward(p.micros[0].x_nd, weights, ctx);
      const int64_t ranks = mesh.size(), width = (GetParam() == "moe" ? kHidden : kLatent) * 8, rows = 10 * kTopK;
      const int64_t counts = (ranks - 1) * kExperts / 2 * 8;
      // A rank of part 0 sends to the other ranks of its part and answers all others; the rest only send.
      const bool holds = groups.place().ep == 0;
      const int64_t there = holds ? etp - 1 : etp, back = holds ? ranks - 1 : 0;
      EXPECT_EQ(groups.experts()->sent_bytes(), counts + (there + back) * rows * width) << "etp " << etp << ", rank " << groups.place().rank;
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Blocks, ExpertParallel, testing::Values("moe", "latent_moe"), [](const auto& info) { return info.param; });

}  // namespace
}  // namespace tessera
