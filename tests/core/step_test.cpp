// One optimizer step: accumulation, non-finite values, frozen parameters, statistics, shared weights, dtypes.
#include "train/step.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "tests/support/compare.hpp"
#include "tests/support/model.hpp"
#include "tests/support/tolerance.hpp"
#include "train/diagnosis.hpp"

namespace tessera {
namespace {

constexpr int64_t kVocab = 32;
const double kStack = tolerance(at::kFloat, Op::kModel, 24);

// Every kind of layer and a head, small.
std::string text(const std::string& pattern = "M*EOL/*E", const std::string& more = "") {
  return fmt::format(R"(
[model]
hybrid_override_pattern = "{}"
vocab_size = {}
hidden_size = 24
init_std = 0.1
[blocks.mamba2]
num_heads = 2
head_dim = 8
state_size = 8
num_groups = 1
chunk = 16
[blocks.gqa]
num_heads = 2
num_kv_heads = 1
head_dim = 8
[blocks.mlp]
intermediate_size = 24
[blocks.moe]
num_experts = 4
top_k = 2
intermediate_size = 16
aux_loss_coeff = 0.05
z_loss_coeff = 0.01
[blocks.latent_moe]
latent_size = 8
num_experts = 6
top_k = 2
intermediate_size = 8
aux_loss_coeff = 0.05
{})",
                     pattern, kVocab, more);
}

const std::string kHead = "[heads.mtp]\ndepths = 2\n";

struct Trained {
  explicit Trained(const std::string& toml, const BuildOptions& o = {}) : built(toml, o), optimizer(built.store, {.lr = 1e-2}) {}
  StepResult step(const std::vector<Batch>& batches, double lr = 1e-2, double max_norm = 1) { return train_step(built.model, optimizer, batches, lr, max_norm); }
  at::Tensor weight(const std::string& name) { return built.store.parameter(name).clone(); }
  Built built;
  Optimizer optimizer;
};

// Four rows of 24 tokens, cut into documents so that rows have different numbers of targets.
const std::vector<std::vector<int64_t>> kRows{{24}, {1, 1, 1, 1, 20}, {8, 16}, {2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2}};

Batch rows(const std::vector<size_t>& which) {
  std::vector<int64_t> lengths, ids;
  for (const size_t r : which) {
    lengths.insert(lengths.end(), kRows[r].begin(), kRows[r].end());
    const at::Tensor row = random_ids(24, kVocab, r + 1);
    ids.insert(ids.end(), row.const_data_ptr<int64_t>(), row.const_data_ptr<int64_t>() + 24);
  }
  Batch batch = random_batch(lengths, kVocab);
  std::copy(ids.begin(), ids.end(), batch.ids_n.mutable_data_ptr<int64_t>());
  return batch;
}

TEST(Step, MicroBatchesAreOneBatch) {
  Built whole(text("M*EOL/*E", kHead)), cut(text("M*EOL/*E", kHead));
  const StepResult one = accumulate(whole.model, {rows({0, 1, 2, 3})});
  const StepResult four = accumulate(cut.model, {rows({0}), rows({1}), rows({2}), rows({3})});
  const double limit = tolerance(at::kFloat, Op::kReduction);
  EXPECT_NEAR(four.loss, one.loss, one.loss * limit);
  EXPECT_NEAR(four.total_loss, one.total_loss, one.total_loss * limit);
  for (const char* part : {"mtp.1", "mtp.2", "seq_aux", "z"}) EXPECT_NEAR(four.parts.at(part), one.parts.at(part), one.parts.at(part) * kStack) << part;
  for (const std::string& name : parameter_names(whole.plan)) EXPECT_TRUE(close(cut.store.gradient(name), whole.store.gradient(name), kStack)) << name;
  ASSERT_EQ(four.counts.size(), one.counts.size());
  EXPECT_FALSE(one.counts.empty());
  for (const auto& [prefix, counts] : one.counts)
    for (const auto& [name, count] : counts) EXPECT_TRUE(bit_equal(four.counts.at(prefix).at(name), count)) << prefix << name;
  // The rows are ragged enough that a mean of the rows' means is another number.
  double mean_of_means = 0;
  for (size_t r = 0; r < 4; ++r) {
    Built alone(text("M*EOL/*E", kHead));
    mean_of_means += accumulate(alone.model, {rows({r})}).loss / 4;
  }
  EXPECT_GT(std::abs(mean_of_means - one.loss), 100 * limit * one.loss);
}

TEST(Step, TotalIsTheSumOfItsParts) {
  Built built(text("M*EOL/*E", kHead));
  const StepResult r = accumulate(built.model, {rows({0, 1, 2, 3})});
  const double head = 0.1 / 2 * (r.parts.at("mtp.1") + r.parts.at("mtp.2"));
  EXPECT_NEAR(r.total_loss, r.loss + head + r.parts.at("seq_aux") + r.parts.at("z"), 1e-5);
  EXPECT_GT(r.parts.at("seq_aux"), 0);
  EXPECT_GT(r.parts.at("z"), 0);
}

TEST(Step, ClippingChangesTheStepAndTheReportedNormIsTheOneBefore) {
  Trained loose(text("ME")), tight(text("ME"));
  const StepResult a = loose.step({rows({0, 1})}, 1e-2, 0), b = tight.step({rows({0, 1})}, 1e-2, a.grad_norm / 10);
  EXPECT_EQ(a.grad_norm, b.grad_norm);
  const double limit = tolerance(at::kFloat, Op::kReduction);
  EXPECT_TRUE(close(tight.optimizer.moment("exp_avg", "lm_head.weight"), loose.optimizer.moment("exp_avg", "lm_head.weight") * 0.1, limit));
  Trained wide(text("ME"));
  wide.step({rows({0, 1})}, 1e-2, a.grad_norm * 10);
  EXPECT_TRUE(bit_equal(wide.weight("lm_head.weight"), loose.weight("lm_head.weight")));
}

TEST(Step, LossFallsOnARepeatedBatch) {
  Trained run(text("M*EOL/*E", kHead));
  const double first = run.step({rows({0, 1, 2, 3})}).loss;
  double last = first;
  for (int i = 0; i < 20; ++i) last = run.step({rows({0, 1, 2, 3})}).loss;
  EXPECT_LT(last, 0.8 * first);
}

struct Everything {
  explicit Everything(Trained& run) : run(run) {
    for (const TensorRow& row : tensor_rows(run.built.plan)) {
      values[row.name] = (row.param ? run.built.store.parameter(row.name) : run.built.store.buffer(row.name)).clone();
      if (row.param)
        for (const std::string& slot : Optimizer::slots()) moments[slot + row.name] = run.optimizer.moment(slot, row.name).clone();
    }
  }
  void expect_unchanged(const std::string& but_parameter) {
    for (const TensorRow& row : tensor_rows(run.built.plan)) {
      if (row.name != but_parameter) {
        EXPECT_TRUE(bit_equal(row.param ? run.built.store.parameter(row.name) : run.built.store.buffer(row.name), values.at(row.name))) << row.name;
      }
      if (!row.param) continue;
      for (const std::string& slot : Optimizer::slots()) EXPECT_TRUE(bit_equal(run.optimizer.moment(slot, row.name), moments.at(slot + row.name))) << slot << row.name;
    }
  }
  Trained& run;
  std::map<std::string, at::Tensor> values, moments;
};

class Poison : public testing::TestWithParam<bool> {};  // recomputation

TEST_P(Poison, AWeightThatIsNoNumberIsFoundInItsLayerAndNothingMoves) {
  for (const auto& [name, place] : std::vector<std::pair<std::string, std::string>>{{"layers.0.A_log", "layers.0 (mamba2), forward"},
                                                                                     {"layers.1.o_proj.weight", "layers.1 (gqa), forward"},
                                                                                     {"layers.4.fc2_latent_proj.weight", "layers.4 (latent_moe), forward"},
                                                                                     {"final_norm.weight", "final_norm, forward"},
                                                                                     {"heads.mtp.layers.1.up_proj.weight", "heads.mtp.1, forward"}}) {
    Trained run(text("M*EOL/*E", kHead), {.recompute = GetParam() ? std::vector<std::string>{"*"} : std::vector<std::string>{}});
    run.step({rows({0, 1})});
    run.built.store.parameter(name).flatten()[0].fill_(std::numeric_limits<float>::quiet_NaN());
    run.built.store.touch();
    Everything before(run);
    const StepResult result = run.step({rows({2}), rows({3})});
    EXPECT_FALSE(result.finite) << name;
    EXPECT_EQ(diagnose_nonfinite(run.built.model, {rows({2}), rows({3})}), place);
    before.expect_unchanged(name);
    EXPECT_EQ(run.optimizer.steps_taken(), 1) << name;
  }
}

// Huge activations before tiny weights keep the forward pass finite; the gradient of the tiny weights is the huge activations' size.
void make_gradients_huge(Store& store, float lm_head) {
  store.parameter("layers.2.up_proj.weight").mul_(1e18f);     // relu(up x)^2 is around 1e35
  store.parameter("layers.2.down_proj.weight").mul_(1e-36f);  // the layer's output is small
  store.parameter("lm_head.weight").mul_(lm_head);
  store.touch();
}

TEST_P(Poison, AGradientThatOverflowsIsFoundInItsLayer) {
  for (const auto& [lm_head, place] : std::vector<std::pair<float, std::string>>{{1e6f, "layers.2, backward"},
                                                                                 {1.0f, "no single layer: every gradient is finite, but their norm overflows"}}) {
    Trained run(text("M*EE"), {.recompute = GetParam() ? std::vector<std::string>{"*"} : std::vector<std::string>{}});
    make_gradients_huge(run.built.store, lm_head);
    Everything before(run);
    const StepResult result = run.step({rows({0, 1})});
    EXPECT_TRUE(std::isfinite(result.total_loss));
    EXPECT_FALSE(std::isfinite(result.grad_norm));
    EXPECT_FALSE(result.finite);
    EXPECT_EQ(diagnose_nonfinite(run.built.model, {rows({0, 1})}), place);
    before.expect_unchanged("");
    EXPECT_EQ(run.optimizer.steps_taken(), 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Recompute, Poison, testing::Bool(), [](const auto& info) { return info.param ? "recompute" : "plain"; });

TEST(Step, AStepGoesOnAfterOneThatWasNotFinite) {
  Trained run(text("ME")), clean(text("ME"));
  const at::Tensor kept = run.weight("layers.1.up_proj.weight");
  run.built.store.parameter("layers.1.up_proj.weight").flatten()[0].fill_(std::numeric_limits<float>::infinity());
  run.built.store.touch();
  EXPECT_FALSE(run.step({rows({0})}).finite);
  run.built.store.zero_grad();
  run.built.store.parameter("layers.1.up_proj.weight").copy_(kept);
  run.built.store.touch();
  EXPECT_EQ(run.step({rows({1})}).loss, clean.step({rows({1})}).loss);
  for (const std::string& name : parameter_names(run.built.plan)) EXPECT_TRUE(bit_equal(run.weight(name), clean.weight(name))) << name;
}

class Freeze : public testing::TestWithParam<std::tuple<std::vector<std::string>, bool, at::ScalarType>> {};

TEST_P(Freeze, KeepsWhatItNamesAndTrainsTheRest) {
  const auto& [names, recompute, dtype] = GetParam();
  Trained run(text("M*EOL/*E", kHead), {.dtype = dtype, .recompute = recompute ? std::vector<std::string>{"*"} : std::vector<std::string>{}, .freeze = names});
  std::map<std::string, at::Tensor> before;
  for (const std::string& name : parameter_names(run.built.plan)) before[name] = run.weight(name);
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(run.step({rows({0, 1}), rows({2, 3})}).finite);
  for (const auto& [name, old] : before) {
    const bool frozen = std::any_of(names.begin(), names.end(), [&](const std::string& prefix) { return name.starts_with(prefix); });
    EXPECT_EQ(run.built.store.trainable(name), !frozen) << name;
    if (frozen) EXPECT_TRUE(bit_equal(run.weight(name), old)) << name;
    else EXPECT_FALSE(bit_equal(run.weight(name), old)) << name;
  }
}

using Names = std::vector<std::string>;
INSTANTIATE_TEST_SUITE_P(Parts, Freeze,
                         testing::Combine(testing::Values(Names{"embedding"}, Names{"layers.0.", "layers.3."}, Names{"embedding", "lm_head", "layers.0.in_proj"}, Names{"layers."},
                                                          Names{"heads."}),
                                          testing::Bool(), testing::Values(at::kFloat, at::kBFloat16)));

TEST(Freeze, EmbeddingAndRecomputationGiveTheLayersTheirGradients) {
  Built plain(text("M*EOL/*E", kHead)), frozen(text("M*EOL/*E", kHead), {.recompute = {"*"}, .freeze = {"embedding"}});
  accumulate(plain.model, {rows({0, 1, 2, 3})});
  accumulate(frozen.model, {rows({0, 1, 2, 3})});
  for (const std::string& name : parameter_names(plain.plan))
    if (name != "embedding.weight") {
      EXPECT_TRUE(bit_equal(frozen.store.gradient(name), plain.store.gradient(name))) << name;
    }
}

TEST(Freeze, ANameThatFitsNothingIsRefused) {
  try {
    Built built(text("ME"), {.freeze = {"layer.0"}});
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.message(), "training.freeze: no parameter's name begins with 'layer.0'");
    EXPECT_EQ(error.code(), ExitCode::kUsage);
  }
}

TEST(Step, RouterBiasMovesOnceAStep) {
  Trained plain(text("OEL/O", "[heads.mtp]\ndepths = 2\n")), cut(text("OEL/O", "[heads.mtp]\ndepths = 2\n")), again(text("OEL/O", "[heads.mtp]\ndepths = 2\n"), {.recompute = {"*"}});
  plain.step({rows({0, 1, 2, 3})});
  cut.step({rows({0}), rows({1}), rows({2}), rows({3})});
  again.step({rows({0, 1, 2, 3})});
  for (const std::string prefix : {"layers.0.", "layers.2.", "heads.mtp.layers.0."}) {
    const std::string name = prefix + "gate.e_score_correction_bias";
    const at::Tensor bias = plain.built.store.buffer(name);
    EXPECT_TRUE(bit_equal(cut.built.store.buffer(name), bias)) << name;
    EXPECT_TRUE(bit_equal(again.built.store.buffer(name), bias)) << name;
    EXPECT_FLOAT_EQ(bias.abs().max().item<float>(), 1e-3f) << name;  // one step of the rate
  }
}

TEST(Step, EvaluationMovesNoRouterBias) {
  Trained run(text("OE"));
  const Batch batch = rows({0, 1});
  at::NoGradGuard no_grad;
  run.built.model.loss(batch, denominators(run.built.plan, batch), /*training=*/false);
  run.built.model.token_losses(batch);
  run.built.model.after_step(run.built.model.take_counts());
  EXPECT_EQ(run.built.store.buffer("layers.0.gate.e_score_correction_bias").abs().max().item<float>(), 0);
}

TEST(Step, AuxiliaryLossesReachTheRouterWithAndWithoutRecomputation) {
  Built plain(text("MOL")), again(text("MOL"), {.recompute = {"*"}}), some(text("MOL"), {.recompute = {"moe"}}), off(text("MOL"), {.sets = {"blocks.moe.aux_loss_coeff=0", "blocks.moe.z_loss_coeff=0"}});
  std::vector<StepResult> results;
  for (Built* built : {&plain, &again, &some, &off}) results.push_back(accumulate(built->model, {rows({0, 1}), rows({2, 3})}));
  for (size_t i : {1, 2}) {
    EXPECT_EQ(results[i].total_loss, results[0].total_loss);
    EXPECT_EQ(results[i].parts, results[0].parts);
  }
  for (const std::string& name : parameter_names(plain.plan)) {
    EXPECT_TRUE(bit_equal(again.store.gradient(name), plain.store.gradient(name))) << name;
    EXPECT_TRUE(bit_equal(some.store.gradient(name), plain.store.gradient(name))) << name;
  }
  EXPECT_EQ(results[3].loss, results[0].loss);
  EXPECT_FALSE(close(off.store.gradient("layers.1.gate.weight"), plain.store.gradient("layers.1.gate.weight"), 1e-3));
  EXPECT_TRUE(bit_equal(off.store.gradient("lm_head.weight"), plain.store.gradient("lm_head.weight")));
}

TEST(Step, SharedLayersTrainOneSetOfWeights) {
  const std::string shared = text("MEM*ME", "[symbols]\nM = {block = \"mamba2\", shared = true}\n\"*\" = \"gqa\"\nE = \"mlp\"\n");
  for (const bool recompute : {false, true}) {
    Trained run(shared, {.recompute = recompute ? std::vector<std::string>{"*"} : std::vector<std::string>{}});
    const std::vector<std::string> names = parameter_names(run.built.plan);
    EXPECT_EQ(std::count_if(names.begin(), names.end(), [](const std::string& n) { return n.ends_with("A_log"); }), 1);
    // The gradient is the sum of those of three layers with equal, separate weights.
    Built apart(text("MEM*ME"));
    for (const TensorRow& row : tensor_rows(apart.plan)) {
      std::string from = row.name;
      for (const char* layer : {"layers.2.", "layers.4."})
        if (from.starts_with(layer)) from = "layers.0." + from.substr(9);
      apart.store.parameter(row.name).copy_(run.built.store.parameter(from));
    }
    apart.store.touch();
    const StepResult joint = accumulate(run.built.model, {rows({0, 1})}), separate = accumulate(apart.model, {rows({0, 1})});
    EXPECT_EQ(joint.loss, separate.loss);
    for (const std::string& name : names) {
      at::Tensor sum = apart.store.gradient(name).clone();
      if (name.starts_with("layers.0."))
        for (const char* layer : {"layers.2.", "layers.4."}) sum += apart.store.gradient(layer + name.substr(9));
      EXPECT_TRUE(close(run.built.store.gradient(name), sum, tolerance(at::kFloat, Op::kReduction))) << name;
    }
    const double first = run.step({rows({0, 1, 2, 3})}).loss;
    double last = first;
    for (int i = 0; i < 15; ++i) last = run.step({rows({0, 1, 2, 3})}).loss;
    EXPECT_LT(last, first);
  }
}

TEST(Step, SharedExpertsCountAllTheirLayers) {
  const std::string shared = text("OEOE", "[symbols]\nO = {block = \"moe\", shared = true}\nE = \"mlp\"\n");
  Trained run(shared);
  const StepResult result = run.step({rows({0, 1})});
  ASSERT_EQ(result.counts.size(), 1u);
  EXPECT_EQ(result.counts.begin()->second.at("expert_load").sum().item<double>(), 2.0 * 2 * 48);  // layers x top_k x tokens
}

TEST(Step, BalancedRoutingLoadsExpertsAlike) {
  for (const bool recompute : {false, true}) {
    Trained run(text("O*L/OL", kHead), {.recompute = recompute ? std::vector<std::string>{"*"} : std::vector<std::string>{}});
    run.built.model.set_balanced_routing(true);
    Batch batch = rows({0, 1});
    batch.first_token = 960;
    const StepResult result = accumulate(run.built.model, {batch});
    EXPECT_EQ(result.counts.size(), 4u) << "two layers, and two of the head";
    for (const auto& [layer, counts] : result.counts) {
      const at::Tensor& load_e = counts.at("expert_load");
      EXPECT_EQ(load_e.sum().item<double>() > 0, true) << layer;
      if (layer.starts_with("layers.")) EXPECT_LE((load_e.max() - load_e.min()).item<double>(), 1) << layer;
      EXPECT_GT(run.built.store.gradient(layer + "gate.weight").abs().max().item<double>(), 0) << layer;
    }
  }
}

// Tokens are numbered by their positions and sequences, so that a step of decoding chooses as the pass over all does.
TEST(Step, BalancedRoutingIsOneInPrefillAndDecoding) {
  const at::NoGradGuard no_grad;
  Built built(text("O*L"));
  const at::Tensor ids_bt = random_ids(24, kVocab, 5).view({3, 8});
  const auto spans = [](int64_t start, int64_t length) { return Spans({{0, start, length, 8, 0}, {1, start, length, 8, 1}, {2, start, length, 8, 2}}); };
  const auto part = [&](int64_t start, int64_t length, DecodeState* state) {
    return built.model.hidden({.ids_n = ids_bt.narrow(1, start, length).reshape({-1}), .spans = spans(start, length)}, state).view({3, length, 24});
  };
  const at::Tensor natural = part(0, 8, nullptr);
  built.model.set_balanced_routing(true);
  DecodeState state(built.plan, 3, at::kCPU, at::kFloat);
  const at::Tensor all = part(0, 8, nullptr);
  part(0, 7, &state);
  EXPECT_TRUE(close(part(7, 1, &state), all.narrow(1, 7, 1), kStack));
  EXPECT_GT((all - natural).abs().max().item<double>(), 0.01) << "the router chooses otherwise";
  built.model.set_balanced_routing(false);
  EXPECT_TRUE(bit_equal(part(0, 8, nullptr), natural));
}

TEST(Step, TiedEmbeddingsTrainOneMatrix) {
  Trained run(text("ME"), {.sets = {"model.tie_embeddings=true"}});
  const std::vector<std::string> names = parameter_names(run.built.plan);
  EXPECT_EQ(std::count(names.begin(), names.end(), "lm_head.weight"), 0);
  Built apart(text("ME"));
  for (const TensorRow& row : tensor_rows(apart.plan))
    apart.store.parameter(row.name).copy_(run.built.store.parameter(row.name == "lm_head.weight" ? "embedding.weight" : row.name));
  apart.store.touch();
  accumulate(apart.model, {rows({0})});
  accumulate(run.built.model, {rows({0})});
  EXPECT_TRUE(close(run.built.store.gradient("embedding.weight"), apart.store.gradient("embedding.weight") + apart.store.gradient("lm_head.weight"), tolerance(at::kFloat, Op::kReduction)));
}

class Bfloat16 : public testing::TestWithParam<bool> {};  // residual_in_fp32

TEST_P(Bfloat16, TrainsCloseToFp32) {
  const BuildOptions sets{.sets = {GetParam() ? "model.residual_in_fp32=true" : "model.residual_in_fp32=false"}};
  BuildOptions half = sets;
  half.dtype = at::kBFloat16;
  Trained full(text("M*EOL/*E", kHead), sets), low(text("M*EOL/*E", kHead), half);
  StepResult a, b;
  double first = 0;
  for (int i = 0; i < 12; ++i) {
    a = full.step({rows({0, 1}), rows({2, 3})}, 3e-3), b = low.step({rows({0, 1}), rows({2, 3})}, 3e-3);
    ASSERT_TRUE(b.finite);
    if (i == 0) first = b.loss;
    EXPECT_NEAR(b.loss, a.loss, tolerance(at::kBFloat16, Op::kModel) * a.loss) << "step " << i;
  }
  EXPECT_LT(b.loss, first);
  EXPECT_NE(b.loss, a.loss) << "bf16 had no effect";
  EXPECT_EQ(low.built.store.parameter("layers.0.in_proj.weight").scalar_type(), at::kFloat);
  EXPECT_EQ(low.built.store.gather("layers.0.")["in_proj.weight"].tensor().scalar_type(), at::kBFloat16);
  EXPECT_EQ(low.built.store.gather("layers.0.")["A_log"].tensor().scalar_type(), at::kFloat);
}

INSTANTIATE_TEST_SUITE_P(Residual, Bfloat16, testing::Bool(), [](const auto& info) { return info.param ? "fp32" : "compute"; });

}  // namespace
}  // namespace tessera
