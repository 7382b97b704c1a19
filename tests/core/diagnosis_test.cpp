// Over several ranks: where a value that is not finite began, found alike by all, and the residual stream's norms.
#include "train/diagnosis.hpp"

#include <ATen/TensorOperators.h>
#include <gtest/gtest.h>

#include <limits>
#include <mutex>

#include "tests/support/model.hpp"
#include "tests/support/ranks.hpp"
#include "train/step.hpp"

namespace tessera {
namespace {

constexpr const char* kModel = R"(
[model]
hybrid_override_pattern = "M*EM/*E"
hidden_size = 24
vocab_size = 32
[blocks.mamba2]
num_heads = 4
head_dim = 4
state_size = 8
num_groups = 2
[blocks.gqa]
num_heads = 4
num_kv_heads = 2
head_dim = 4
[blocks.mlp]
intermediate_size = 32
)";

const std::vector<Mesh> kMeshes{{}, {.dp_shard = 2}, {.dp_replicate = 2}, {.tp = 2}, {.cp = 2}, {.pp = 2}, {.pp = 2, .dp_shard = 2, .tp = 2}};

// Two batches in all, of which data ranks take one each; the id 31 is in the second only.
std::vector<Batch> batches(const MeshGroups* groups) {
  std::vector<Batch> own;
  const int64_t data_ranks = groups ? groups->mesh().dp_replicate * groups->mesh().dp_shard : 1;
  for (int64_t b = 0; b < 2; ++b) {
    Batch batch = random_batch({9, 3}, 30, 1 + static_cast<uint64_t>(b));
    if (b == 1) batch.ids_n[4] = 31;
    if (data_ranks == 1 || data_rank(groups) == b) own.push_back(batch);
  }
  return own;
}

void on_every_mesh(const std::function<void(Model&, Store&, const MeshGroups*)>& work) {
  const Config config = parse_config(kModel, "test.toml", {}, plugins());
  for (const Mesh& mesh : kMeshes) {
    SCOPED_TRACE(mesh_text(mesh));
    const auto run = [&](const MeshGroups* groups) {
      at::set_num_threads(1);
      const ModelPlan plan = make_plan(config, mesh);
      Store store(plan, at::kCPU, at::kFloat, {}, groups);
      store.initialise(3);
      Model model(plan, store);
      work(model, store, groups);
    };
    if (mesh.size() == 1) run(nullptr);
    else run_ranks(mesh, [&](MeshGroups& groups) { run(&groups); });
  }
}

void poison(Store& store, const std::string& name, int64_t element, float value) {
  if (!store.has(name)) return;
  store.assign(name, masters, at::full({1}, value), element);
  store.touch();
}

TEST(Diagnosis, FindsTheSamePlaceOnEveryRank) {
  for (const auto& [name, element, place] : std::vector<std::tuple<std::string, int64_t, std::string>>{{"embedding.weight", 31 * 24, "embedding, forward"},
                                                                                                    {"layers.1.o_proj.weight", 7, "layers.1 (gqa), forward"},
                                                                                                    {"layers.3.A_log", 3, "layers.3 (mamba2), forward"},
                                                                                                    {"final_norm.weight", 2, "final_norm, forward"},
                                                                                                    {"heads.mtp.layers.1.up_proj.weight", 5, "heads.mtp.1, forward"}}) {
    SCOPED_TRACE(name);
    std::mutex mutex;
    on_every_mesh([&](Model& model, Store& store, const MeshGroups* groups) {
      poison(store, name, element, std::numeric_limits<float>::quiet_NaN());
      const std::string found = diagnose_nonfinite(model, batches(groups));
      const std::lock_guard lock(mutex);
      EXPECT_EQ(found, place);
    });
  }
}

TEST(Diagnosis, FindsTheGradientThatOverflows) {
  std::mutex mutex;
  on_every_mesh([&](Model& model, Store& store, const MeshGroups* groups) {
    for (int64_t i = 0; i < 24 * 32; ++i) poison(store, "layers.2.up_proj.weight", i, 1e18f), poison(store, "layers.2.down_proj.weight", i, 1e-36f);
    for (int64_t i = 0; i < 32 * 24; ++i) poison(store, "lm_head.weight", i, i % 3 ? 1e6f : -1e6f);
    const std::vector<Batch> own = batches(groups);
    accumulate(model, own);
    const std::string found = diagnose_nonfinite(model, own);
    const std::lock_guard lock(mutex);
    EXPECT_EQ(found, "layers.2, backward");
  });
}

TEST(Diagnosis, NormsOfTheResidualStreamAreThoseOfOneProcess) {
  std::map<int64_t, double> one, several;
  std::mutex mutex;
  on_every_mesh([&](Model& model, Store&, const MeshGroups* groups) {
    if (groups && data_rank(groups) > 0) {
      residual_norms(model, batches(groups).front());
      return;
    }
    const auto norms = residual_norms(model, batches(groups).front());
    const std::lock_guard lock(mutex);
    if (!groups) one = norms;
    for (const auto& [layer, norm] : norms) {
      ASSERT_TRUE(one.contains(layer)) << layer;
      EXPECT_NEAR(norm, one[layer], 1e-5 * one[layer]) << layer;
      ++several[layer];
    }
  });
  EXPECT_EQ(one.size(), 5u);
  EXPECT_EQ(several.size(), 5u) << "every layer is seen by some rank";
}

}  // namespace
}  // namespace tessera
