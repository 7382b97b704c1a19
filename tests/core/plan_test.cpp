// The plan: names, weights shared among layers, totals, costs.
#include "plan/plan.hpp"

#include <gtest/gtest.h>

#include "plan/memory.hpp"
#include "tests/support/model.hpp"

namespace tessera {
namespace {

std::string text(const std::string& pattern, const std::string& more = "") {
  return fmt::format(R"(
[model]
hybrid_override_pattern = "{}"
vocab_size = 40
hidden_size = 16
[blocks.mlp]
intermediate_size = 12
[blocks.gqa]
num_heads = 4
num_kv_heads = 2
head_dim = 4
[blocks.moe]
num_experts = 8
top_k = 2
intermediate_size = 6
{})",
                     pattern, more);
}

ModelPlan plan_of(const std::string& toml) { return make_plan(parse_config(toml, "test.toml", {}, plugins())); }

std::vector<std::string> row_names(const ModelPlan& plan) {
  std::vector<std::string> names;
  for (const TensorRow& row : tensor_rows(plan)) names.push_back(row.name);
  return names;
}

TEST(Plan, NamesEveryTensorOnceInOrder) {
  EXPECT_EQ(row_names(plan_of(text("EO/E"))),
            (std::vector<std::string>{"embedding.weight", "final_norm.weight", "lm_head.weight", "layers.0.pre_norm.weight", "layers.0.up_proj.weight", "layers.0.down_proj.weight",
                                      "layers.1.pre_norm.weight", "layers.1.gate.weight", "layers.1.experts.up_proj.weight", "layers.1.experts.down_proj.weight",
                                      "layers.1.gate.e_score_correction_bias", "heads.mtp.enorm.weight", "heads.mtp.hnorm.weight", "heads.mtp.eh_proj.weight",
                                      "heads.mtp.final_layernorm.weight", "heads.mtp.layers.0.pre_norm.weight", "heads.mtp.layers.0.up_proj.weight",
                                      "heads.mtp.layers.0.down_proj.weight"}));
}

TEST(Plan, SeparateSetsOfAHeadAreNumbered) {
  const std::vector<std::string> names = row_names(plan_of(text("E/E", "[heads.mtp]\ndepths = 2\nrepeated = false\n")));
  for (const char* name : {"heads.mtp.0.eh_proj.weight", "heads.mtp.1.eh_proj.weight", "heads.mtp.1.layers.0.up_proj.weight"}) EXPECT_EQ(std::count(names.begin(), names.end(), name), 1) << name;
}

TEST(Plan, TotalsAreOfTheHubLayout) {
  const Totals sum = totals(plan_of(text("EO")));
  const int64_t stem = 2 * 40 * 16 + 16, mlp = 16 + 2 * 12 * 16, moe = 16 + 8 * 16 + 2 * 8 * 6 * 16;
  EXPECT_EQ(sum.trained, stem + mlp + moe);
  EXPECT_EQ(sum.elements, stem + mlp + moe + 8);
  EXPECT_EQ(sum.tensors, 3 + 3 + (1 + 1 + 2 * 8 + 1));
}

TEST(Plan, TiedEmbeddingsAreOneTensor) {
  const Config config = parse_config(text("E"), "test.toml", {"model.tie_embeddings=true"}, plugins());
  EXPECT_EQ(totals(make_plan(config)).trained, 40 * 16 + 16 + 16 + 2 * 12 * 16);
}

TEST(Plan, SharedLayersUseTheFirstOnesWeights) {
  const ModelPlan plan = plan_of(text("E*EE*", "[symbols]\nE = {block = \"mlp\", shared = true}\n\"*\" = \"gqa\"\n"));
  std::vector<int64_t> owners;
  for (const LayerPlan& layer : plan.layers) owners.push_back(layer.weights_of);
  EXPECT_EQ(owners, (std::vector<int64_t>{0, 1, 0, 0, 4}));
  EXPECT_EQ(totals(plan).tensors, 3 + 3 + 5 + 5);
}

TEST(Plan, StagesFollowTheBars) {
  const ModelPlan plan = plan_of(text("E|*E|O"));
  std::vector<int64_t> stages;
  for (const LayerPlan& layer : plan.layers) stages.push_back(layer.stage);
  EXPECT_EQ(stages, (std::vector<int64_t>{0, 1, 1, 2}));
}

TEST(Plan, ResidualProjectionsStartSmallerInDeeperStacks) {
  const ModelPlan one = plan_of(text("E")), four = plan_of(text("EEEE/E"));
  EXPECT_DOUBLE_EQ(one.layers[0].params[2].init.std, 0.02);
  EXPECT_DOUBLE_EQ(four.layers[0].params[2].init.std, 0.01);
  EXPECT_DOUBLE_EQ(four.layers[0].params[1].init.std, 0.02);
}

TEST(Plan, CostCountsEveryLayerAndPass) {
  const Documents documents{{.length = 10, .count = 3}};
  const auto find = [&](const ModelPlan& plan, const std::string& name) {
    for (const CostRow& row : cost_rows(plan, documents))
      if (row.name == name) return row;
    return CostRow{};
  };
  const ModelPlan plain = plan_of(text("EE*")), headed = plan_of(text("EE*/E", "[heads.mtp]\ndepths = 2\n"));
  EXPECT_EQ(find(plain, "mlp").num_layers, 2);
  EXPECT_DOUBLE_EQ(find(plain, "mlp").cost.matmul, 2 * 4.0 * 30 * 16 * 12);
  EXPECT_DOUBLE_EQ(find(plain, "lm_head").cost.matmul, 2.0 * 30 * 16 * 40);
  EXPECT_EQ(find(headed, "mlp").num_layers, 4);
  EXPECT_EQ(find(headed, "lm_head").num_layers, 3);
  EXPECT_EQ(find(headed, "mtp").num_layers, 2);
  EXPECT_DOUBLE_EQ(find(plain, "gqa").cost.mixing, 4.0 * 16 * 3 * (10 * 11 / 2));
}

TEST(Plan, MemoryIsWhatTheStoreAllocates) {
  for (const char* dtype : {"float32", "bfloat16"}) {
    const Config config = parse_config(text("EO*/E"), "test.toml", {fmt::format("training.dtype={}", dtype)}, plugins());
    const ModelPlan plan = make_plan(config);
    const MemoryPlan memory = plan_memory(plan, config, {});
    const double trained = static_cast<double>(totals(plan).trained);
    EXPECT_DOUBLE_EQ(memory.parameters, 4 * (trained + 8));
    EXPECT_DOUBLE_EQ(memory.gradients, 4 * trained);
    EXPECT_DOUBLE_EQ(memory.optimizer, 8 * trained);
    // The embedding and the router stay in fp32 and have no copy.
    EXPECT_DOUBLE_EQ(memory.compute, std::string(dtype) == "float32" ? 0 : 2 * (trained - 40 * 16 - 8 * 16));
    EXPECT_GT(memory.activations, 0);
  }
}

TEST(Plan, MemoryOfAStageCountsItsMicroBatchesInFlight) {
  const Mesh mesh{.pp = 2};
  const Config config = parse_config(text("E|E", "[training]\nseq_len = 10\nglobal_batch_size = 8\ndtype = \"float32\"\n"), "test.toml", {}, plugins());
  const auto stages = plan_stage_memory(make_plan(config, mesh), config, mesh);
  const double residual = 10 * 16, layer = 10 * (16 + 2 * 12) + 2 * residual;
  ASSERT_EQ(stages.size(), 2);
  EXPECT_DOUBLE_EQ(stages[0].activations, 1.25 * 4 * 2 * (residual + layer));
  EXPECT_DOUBLE_EQ(stages[1].activations, 1.25 * 4 * (layer + 2 * residual));
  EXPECT_EQ(stages[0].gathered, 0);
}

TEST(Plan, MemoryIsDividedByWhatDividesIt) {
  const auto of = [](const Mesh& mesh, const std::vector<std::string>& sets = {}) {
    const Config config = parse_config(text("EE"), "test.toml", sets, plugins());
    return plan_memory(make_plan(config, mesh), config, mesh);
  };
  const double n = 512, d = 16, f = 12, share = 1.25 * 4;
  // The block has all tokens of its input on both tensor ranks, half of what is inside it, and half of the residual stream; the output has all tokens.
  EXPECT_DOUBLE_EQ(of({.tp = 2}).activations, share * (n * d / 2 + 2 * (n * d + n * f + n * d) + 2 * n * d));
  EXPECT_DOUBLE_EQ(of({.dp_shard = 4}).activations, of({}).activations);
  EXPECT_EQ(of({.dp_replicate = 4}).gathered, 0);
  const MemoryPlan sharded = of({.dp_shard = 4}), kept = of({.dp_shard = 4}, {"parallelism.reshard_after_forward=false"});
  EXPECT_DOUBLE_EQ(sharded.optimizer, 2 * sharded.gradients);
  EXPECT_GT(sharded.gathered, 0);
  EXPECT_EQ(kept.gathered, sharded.gathered) << "two layers are all there are";
}

}  // namespace
}  // namespace tessera
