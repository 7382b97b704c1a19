// The memory a rank takes against what `plan --mesh` says of it. With --all: each case trains a model of 20 million parameters.
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

struct Case {
  const char* mesh;
  std::vector<std::string> sets;
};

class MemoryPlan : public TinyRunTest {
 protected:
  const std::string config_ = std::string(TESSERA_SOURCE_DIR) + "/configs/bench/cpu_small.toml";
  // The greatest peak of the ranks' processes, in MiB.
  double peak(const Case& c, std::vector<std::string> more) {
    const std::filesystem::path run = folder_ / "run";
    std::filesystem::remove_all(run);
    more.insert(more.end(), c.sets.begin(), c.sets.end());
    more.insert(more.end(), {"run.folder=" + run.string(), "training.steps=3", "training.global_batch_size=4", "metrics.tensorboard=false"});
    const Finished end = run_tessera(folder_, with_sets({"launch", "-n", "2", "train", config_}, more));
    EXPECT_EQ(end.code, 0) << end.err;
    double most = 0;
    for (const auto& line : metrics_of(run)) most = std::max(most, line["peak_bytes"].get<double>());
    return most / (1 << 20);
  }
};

// What a process takes that trains almost nothing is no part of the plan. The plan counts a quarter of the activations as blocks that may be kept beside
// them (see core/memory), of which a steady run needs only some: so it may say more than is measured, and not much less.
TEST_F(MemoryPlan, IsWhatARankTakes) {
  if (!std::getenv("TESSERA_TEST_ALL")) GTEST_SKIP() << "minutes";
  const std::vector<std::string> tiny{"model.hidden_size=32", "blocks.mamba2.num_heads=2", "blocks.mamba2.head_dim=16", "blocks.mamba2.state_size=16", "blocks.gqa.num_heads=2", "blocks.gqa.head_dim=16",
                                      "blocks.moe.intermediate_size=16", "blocks.moe.shared_intermediate_size=16", "training.seq_len=16", "data.document_len=16"};
  const Case cases[] = {{"dp_shard=2", {"training.local_batch_size=2"}},
                        {"dp_replicate=2", {"parallelism.data_parallel_replicate_degree=2", "training.local_batch_size=2"}},
                        {"tp=2", {"parallelism.tensor_parallel_degree=2"}},
                        {"cp=2", {"parallelism.context_parallel_degree=2"}},
                        {"pp=2", {"parallelism.pipeline_parallel_degree=2", "training.local_batch_size=1"}}};
  for (const Case& c : cases) {
    std::vector<std::string> sets = c.sets;
    sets.push_back("training.global_batch_size=4");
    const Finished planned = run_tessera(folder_, with_sets({"plan", config_, "--json", "--mesh", c.mesh}, sets));
    ASSERT_EQ(planned.code, 0) << planned.err;
    const double plan = nlohmann::json::parse(planned.out)["memory_per_rank"]["total"].get<double>() / (1 << 20), measured = peak(c, {}) - peak(c, tiny);
    fmt::print("{:<14} planned {:.0f} MiB a rank, measured {:.0f}: {:.2f}\n", c.mesh, plan, measured, measured / plan);
    EXPECT_LT(measured, 1.1 * plan) << c.mesh;
    EXPECT_GT(measured, 0.8 * plan) << c.mesh;
  }
}

}  // namespace
}  // namespace tessera
