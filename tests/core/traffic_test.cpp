// What the plan says that ranks send, keep and allocate is what they send and allocate, to the byte.
#include "plan/traffic.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <chrono>
#include <mutex>

#include "plan/memory.hpp"
#include "tests/support/model.hpp"
#include "tests/support/ranks.hpp"
#include "train/setup.hpp"
#include "train/step.hpp"

namespace tessera {
namespace {

// Every token goes to every expert: routing is even whatever the tokens are.
constexpr const char* kSizes = R"(
hidden_size = 32
vocab_size = 64
[blocks.mamba2]
num_heads = 8
head_dim = 4
state_size = 8
num_groups = 2
chunk = 8
[blocks.gqa]
num_heads = 8
num_kv_heads = 2
head_dim = 4
[blocks.windowed]
type = "gqa"
num_heads = 8
num_kv_heads = 4
head_dim = 4
sliding_window = 5
[blocks.mlp]
intermediate_size = 48
bias = true
[blocks.masked]
width = 16
[blocks.moe]
num_experts = 8
top_k = 8
intermediate_size = 16
shared_intermediate_size = 16
bias = true
aux_loss_coeff = 1e-2
z_loss_coeff = 1e-3
[blocks.latent_moe]
latent_size = 16
num_experts = 8
top_k = 8
intermediate_size = 16
shared_intermediate_size = 8
aux_loss_coeff = 1e-2
[symbols]
D = "masked"
[training]
seq_len = 24
global_batch_size = 8
dtype = "float32"
)";

// The tree's blocks, and with the letter D one that takes whole documents only.
const Registry& blocks() {
  static const Registry loaded = Registry::load(Registry::search_paths({TESSERA_BINARY_DIR "/broken_blocks"}));
  return loaded;
}

struct Case {
  Mesh mesh;
  std::vector<std::string> sets = {};
  std::string pattern = "M*EOL/*O";
};

std::string name_of(const Case& c) {
  std::string name = mesh_text(c.mesh) + " of " + c.pattern;
  for (const std::string& set : c.sets) name += " " + set;
  return name;
}

Config config_of(const Case& c) {
  const Config config = parse_config(fmt::format("[model]\nhybrid_override_pattern = \"{}\"{}", c.pattern, kSizes), "test.toml", c.sets, blocks());
  Issues issues;
  check_config(config, c.mesh, issues);
  issues.raise();
  return config;
}

std::vector<Row> whole_rows() {
  const at::Tensor ids = random_ids(8 * 24, 64, 5);
  std::vector<Row> out;
  for (size_t r = 0; r < 8; ++r) {
    const int64_t* from = ids.const_data_ptr<int64_t>() + r * 24;
    out.push_back({.ids = std::vector<int64_t>(from, from + 24), .lengths = {24}});
  }
  return out;
}

std::map<std::string, int64_t> sent(const MeshGroups& groups) {
  std::map<std::string, int64_t> bytes;
  for (const Group* group : groups.list()) bytes[group->name()] += group->sent_bytes();
  return bytes;
}

// One step on every rank, against the plan.
void check(const Case& c) {
  const Config config = config_of(c);
  const Mesh& mesh = c.mesh;
  std::mutex mutex;
  run_ranks(mesh, [&](MeshGroups& groups) {
    const ModelPlan plan = make_plan(config, mesh);
    const auto dtype = config.training.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
    Store store(plan, at::kCPU, dtype, config.training.freeze, &groups,
                {.reshard_after_forward = config.parallelism.reshard_after_forward, .reduce_in_fp32 = config.parallelism.reduce_dtype == "float32"});
    store.initialise(3);
    Model model(plan, store, recomputed_bindings(config.activation_checkpoint));
    Optimizer optimizer(store, config.optimizer);
    const std::vector<Row> all = whole_rows();
    const Range mine = rows_of(8, data_rank(&groups), mesh.dp_replicate * mesh.dp_shard);
    const std::vector<Batch> batches = micro_batches(std::span(all).subspan(mine.begin, mine.end - mine.begin), config.training.local_batch_size, 0);
    const auto before = sent(groups);
    train_step(model, optimizer, batches, 1e-3, 1.0);
    auto got = sent(groups);
    for (const auto& [name, bytes] : before) got[name] -= bytes;
    const auto planned = plan_traffic(plan, config, mesh, groups.place().rank).by_group();

    double data = 0, grad = 0, moments = 0, compute = 0;
    for (const FlatGroup& group : store.groups()) {
      data += static_cast<double>(group.data.nbytes());
      if (group.grad.defined()) grad += static_cast<double>(group.grad.nbytes());
      if (group.exp_avg.defined()) moments += static_cast<double>(group.exp_avg.nbytes() + group.exp_avg_sq.nbytes());
      if (group.compute.defined()) compute += static_cast<double>(group.compute.nbytes());
    }
    const double buffers = static_cast<double>(store.bytes()) - data - grad - moments - compute;
    const MemoryPlan memory = plan_stage_memory(plan, config, mesh)[static_cast<size_t>(groups.place().pp)];

    const std::lock_guard lock(mutex);
    SCOPED_TRACE(fmt::format("{}, {}", name_of(c), place_text(mesh, groups.place().rank)));
    int64_t sum = 0;
    for (const auto& [name, bytes] : got) {
      const auto found = planned.find(name);
      EXPECT_EQ(found == planned.end() ? 0 : found->second, bytes) << "over " << name;
      sum += bytes;
    }
    for (const auto& [name, bytes] : planned) EXPECT_TRUE(got.contains(name)) << bytes << " bytes over " << name;
    EXPECT_GT(sum, 0);
    EXPECT_EQ(memory.parameters, data + buffers);
    EXPECT_EQ(memory.gradients, grad);
    EXPECT_EQ(memory.optimizer, moments);
    EXPECT_EQ(memory.compute, compute);
  });
}

TEST(Traffic, OfEveryAxisIsWhatRanksSend) {
  for (const Mesh& mesh : {Mesh{.dp_shard = 2}, Mesh{.dp_replicate = 2}, Mesh{.tp = 2}, Mesh{.pp = 2}, Mesh{.cp = 2}, Mesh{.dp_shard = 2, .ep = 2}, Mesh{.tp = 2, .etp = 2}}) check({.mesh = mesh});
}

TEST(Traffic, OfProductsIsWhatRanksSend) {
  check({.mesh = {.tp = 4}});
  check({.mesh = {.dp_shard = 2, .tp = 2}, .sets = {"training.local_batch_size=2"}});
  check({.mesh = {.dp_replicate = 2, .dp_shard = 2}});
  check({.mesh = {.pp = 2, .dp_shard = 2}});
  check({.mesh = {.cp = 2, .tp = 2, .ep = 2}, .sets = {"training.local_batch_size=2"}});
}

TEST(Traffic, FollowsTheSettings) {
  check({.mesh = {.dp_shard = 2}, .sets = {"activation_checkpoint.mode=full"}});
  check({.mesh = {.dp_shard = 2}, .sets = {"activation_checkpoint.mode=selective", "activation_checkpoint.block_types=[\"mlp\", \"moe\"]"}});
  check({.mesh = {.dp_shard = 2}, .sets = {"parallelism.reshard_after_forward=false", "training.local_batch_size=4"}});
  check({.mesh = {.dp_shard = 2, .tp = 2}, .sets = {"training.dtype=bfloat16"}});
  check({.mesh = {.dp_shard = 2}, .sets = {"training.dtype=bfloat16", "parallelism.reduce_dtype=compute"}});
  check({.mesh = {.pp = 2, .tp = 2}, .sets = {"model.tie_embeddings=true", "model.residual_in_fp32=true", "training.dtype=bfloat16"}});
  check({.mesh = {.pp = 2, .dp_shard = 2}, .sets = {"activation_checkpoint.mode=full"}, .pattern = "M|*E|O|L/*O"});  // two stages a rank
  check({.mesh = {.dp_shard = 2}, .sets = {"training.freeze=[\"embedding\", \"layers.2.\"]"}, .pattern = "M*EO"});
  check({.mesh = {.cp = 2}, .sets = {"symbols.W=windowed"}, .pattern = "WMW"});
  for (const Mesh& mesh : {Mesh{.cp = 2}, Mesh{.cp = 2, .tp = 2}, Mesh{.pp = 2, .cp = 2}}) check({.mesh = mesh, .sets = {"activation_checkpoint.mode=full"}, .pattern = "DMD/D"});
}

TEST(Traffic, OfManyMicroBatchesGoesOnAsItBegan) {
  for (const Mesh& mesh : {Mesh{.dp_shard = 2}, Mesh{.pp = 2}}) {
    std::vector<int64_t> bytes;
    for (const int64_t rows : {16, 32, 48}) {
      const Config config = config_of({.mesh = mesh, .sets = {fmt::format("training.global_batch_size={}", rows)}});
      bytes.push_back(plan_traffic(make_plan(config, mesh), config, mesh, 0).bytes());
    }
    EXPECT_EQ(bytes[2] - bytes[1], bytes[1] - bytes[0]);
  }
}

TEST(Traffic, OfThousandsOfRanksIsPlannedAtOnce) {
  const Mesh mesh{.pp = 4, .dp_replicate = 4, .dp_shard = 64, .cp = 2, .tp = 2, .ep = 8};
  const Config config = config_of({.mesh = mesh, .sets = {"training.global_batch_size=25600"}});
  const auto began = std::chrono::steady_clock::now();
  const ModelPlan plan = make_plan(config, mesh);
  const auto stages = plan_traffic(plan, config, mesh);
  ASSERT_EQ(stages.size(), 4);
  for (const Traffic& traffic : stages) EXPECT_GT(traffic.by_group().at("pp"), 0);
  EXPECT_EQ(plan_stage_memory(plan, config, mesh).size(), 4);
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(), 5.0);
}

TEST(Traffic, GroupsCountForAnAxis) {
  const Mesh both{.dp_replicate = 2, .dp_shard = 2, .cp = 2, .tp = 2};
  const std::map<std::string, int64_t> sums = by_axis({{"tp", 1}, {"tp/2", 2}, {"cp x tp", 4}, {"dp_shard x cp", 8}, {"expert copies", 16}, {"ends", 32}, {"ep/1", 64}, {"world", 128}}, both);
  EXPECT_EQ(sums, (std::map<std::string, int64_t>{{"all", 128}, {"cp", 4}, {"dp_shard", 24}, {"ep", 64}, {"pp", 32}, {"tp", 3}}));
  EXPECT_EQ(axis_of("cp x tp", {.tp = 2}), "tp");
  EXPECT_EQ(axis_of("dp_replicate x dp_shard", {.dp_shard = 2}), "dp_shard");
}

}  // namespace
}  // namespace tessera
