// Training over several processes as a user starts it: the same curve on every layout, resumed on others, and what happens when a rank is lost.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <set>

#include "checkpoint/checkpoint.hpp"
#include "tests/support/failing.hpp"
#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

struct Ranks {
  int count = 1;
  std::vector<std::string> degrees = {};  // "tensor_parallel_degree=2"
};
std::string text(const Ranks& ranks) { return fmt::format("{} ranks {}", ranks.count, fmt::join(ranks.degrees, " ")); }

const Ranks kOne{}, kShard{2, {}}, kReplicate{2, {"data_parallel_replicate_degree=2"}}, kTensor{2, {"tensor_parallel_degree=2"}}, kContext{2, {"context_parallel_degree=2"}},
    kPipeline{2, {"pipeline_parallel_degree=2"}}, kExpert{2, {"expert_parallel_degree=2"}}, kFour{4, {"tensor_parallel_degree=2", "expert_parallel_degree=4"}},
    kStages{4, {"pipeline_parallel_degree=2", "context_parallel_degree=2"}};

class DistributedTrain : public TinyRunTest {
 protected:
  static std::vector<std::string> words(const Ranks& ranks, const std::string& run, std::vector<std::string> sets, bool resume) {
    sets.insert(sets.end(), {"run.folder=" + run, "training.num_threads=1", "lr_scheduler.decay_type=constant"});
    for (const std::string& degree : ranks.degrees) sets.push_back("parallelism." + degree);
    std::vector<std::string> list = ranks.count > 1 ? std::vector<std::string>{"launch", "-n", std::to_string(ranks.count)} : std::vector<std::string>{};
    list.insert(list.end(), {"train", "tiny.toml"});
    if (resume) list.push_back("--resume");
    return with_sets(list, sets);
  }
  Finished go(const Ranks& ranks, const std::string& run, const std::vector<std::string>& sets = {}, bool resume = false) const {
    return run_tessera(folder_, words(ranks, run, sets, resume));
  }
  // The curves agree to what the order of sums leaves open.
  void expect_same_curve(const std::string& run, const std::string& reference, const std::string& what) const {
    const auto got = metrics(run), want = metrics(reference);
    ASSERT_EQ(got.size(), want.size()) << what;
    for (size_t i = 0; i < want.size(); ++i)
      for (const char* key : {"loss", "total_loss", "grad_norm", "val_loss", "tokens", "lr"}) {
        ASSERT_EQ(got[i].contains(key), want[i].contains(key)) << what << " " << key;
        if (!want[i].contains(key)) continue;
        const double a = got[i][key].get<double>(), b = want[i][key].get<double>();
        EXPECT_LT(std::abs(a - b), 2e-4 * std::abs(b)) << what << ": " << key << " of step " << i + 1;
      }
  }
  bool saving() const {
    if (!fs::exists(folder_ / "run/checkpoints")) return false;
    for (const std::string& name : entries(folder_ / "run/checkpoints"))
      if (name.starts_with(".saving-step-")) return true;
    return false;
  }
};

TEST_F(DistributedTrain, EveryLayoutTrainsTheSameCurve) {
  ASSERT_EQ(go(kOne, "one").code, 0);
  std::vector<Ranks> layouts{kShard, kTensor, kPipeline, kFour};
  if (std::getenv("TESSERA_TEST_ALL")) layouts.insert(layouts.end(), {kReplicate, kContext, kExpert, kStages});
  for (const Ranks& ranks : layouts) {
    const std::string run = fmt::format("run{}", &ranks - layouts.data());
    const Finished end = go(ranks, run);
    ASSERT_EQ(end.code, 0) << text(ranks) << "\n" << end.err;
    expect_same_curve(run, "one", text(ranks));
    EXPECT_EQ(entries(folder_ / run / "checkpoints"), entries(folder_ / "one/checkpoints")) << text(ranks);
    // What was written together is what one process reads, and goes on from.
    const Finished eval = tessera({"eval", run, "--json"}), whole = tessera({"eval", "one", "--json"});
    ASSERT_EQ(eval.code, 0) << eval.err;
    EXPECT_NEAR(nlohmann::json::parse(eval.out)["loss"].get<double>(), nlohmann::json::parse(whole.out)["loss"].get<double>(), 1e-3);
  }
}

// Every document of the tiny text is shorter than a row, so halos and gathered keys are at most those planned; the rest is exact but for a step's own sums.
TEST_F(DistributedTrain, AStepTellsWhereItsTimeAndBytesWent) {
  ASSERT_EQ(go({2, {"pipeline_parallel_degree=2"}}, "run", {"training.steps=2", "metrics.detail_interval=1"}).code, 0);
  for (const nlohmann::json& line : metrics("run")) {
    EXPECT_EQ(line["sent_bytes"]["pp"], line["planned_bytes"]["pp"]);
    for (const char* key : {"compute_s", "wait_s", "pipeline_wait_s", "input_s"}) EXPECT_GT(line[key].get<double>(), 0) << key;
    EXPECT_EQ(line["residual_rms"].size(), 4u) << "the embedding and three layers, whichever rank has them";
  }
}

TEST_F(DistributedTrain, BenchMeasuresALayout) {
  for (const auto& [mesh, axis] : std::vector<std::pair<std::string, std::string>>{{"dp_shard=2", "dp_shard"}, {"cp=2", "cp"}, {"tp=2", "tp"}, {"pp=2", "pp"}}) {
    if (!std::getenv("TESSERA_TEST_ALL") && (mesh == "tp=2" || mesh == "pp=2")) continue;
    const Finished end = tessera({"launch", "-n", "2", "bench", "tiny.toml", "--json", "--mesh", mesh, "--steps", "2", "--decode-tokens", "3", "--set", "training.num_threads=1"});
    ASSERT_EQ(end.code, 0) << mesh << "\n" << end.err;
    const nlohmann::json bench = nlohmann::json::parse(end.out);
    EXPECT_GT(bench["train"]["tokens_per_s"].get<double>(), 0);
    EXPECT_EQ(bench["decode"]["tokens_per_s"].get<double>() > 0, mesh != "cp=2");
    ASSERT_EQ(bench["ranks"].size(), 2u) << mesh;
    for (const nlohmann::json& rank : bench["ranks"]) {
      EXPECT_GT(rank["compute_s"].get<double>(), 0);
      EXPECT_GT(rank["sent_bytes"][axis].get<int64_t>(), 0) << mesh << rank.dump();
      EXPECT_EQ(rank["sent_bytes"], rank["planned_bytes"]) << mesh << ": every row is one document";
    }
    std::set<std::string> parts;
    for (const nlohmann::json& part : bench["parts"]) parts.insert(part["part"].get<std::string>());
    EXPECT_EQ(parts, (std::set<std::string>{"mamba2", "gqa", "moe", "mlp", "mtp", "embedding", "lm_head", "optimizer", "input"})) << mesh;
  }
  // Rows that go to experts are planned as evenly spread, which they are where routing is balanced.
  const Finished even = tessera({"launch", "-n", "2", "bench", "tiny.toml", "--json", "--mesh", "dp_shard=2,ep=2", "--routing", "balanced", "--steps", "1", "--decode-tokens", "0", "--set", "training.num_threads=1"});
  ASSERT_EQ(even.code, 0) << even.err;
  for (const nlohmann::json& rank : nlohmann::json::parse(even.out)["ranks"]) {
    EXPECT_GT(rank["sent_bytes"]["ep"].get<int64_t>(), 0) << rank.dump();
    EXPECT_EQ(rank["sent_bytes"], rank["planned_bytes"]);
  }
  const Finished missing = tessera({"launch", "-n", "2", "bench", "tiny.toml"});
  EXPECT_EQ(missing.code, 2);
  EXPECT_NE(missing.err.find("--mesh: is missing: it says how the 2 ranks divide the work"), std::string::npos) << missing.err;
}

TEST_F(DistributedTrain, ARunGoesOnOnAnotherLayout) {
  ASSERT_EQ(go(kOne, "one").code, 0);
  std::vector<std::pair<Ranks, Ranks>> pairs{{kShard, kTensor}, {kPipeline, kOne}};
  if (std::getenv("TESSERA_TEST_ALL")) pairs.insert(pairs.end(), {{kTensor, kPipeline}, {kOne, kContext}, {kContext, kExpert}, {kReplicate, kFour}, {kFour, kShard}, {kExpert, kStages}});
  int number = 0;
  for (const auto& [first, second] : pairs) {
    const std::string run = fmt::format("run{}", number++), what = text(first) + ", then " + text(second);
    const Finished begun = go(first, run, {"training.steps=3", "checkpoint.interval=1", "checkpoint.async_mode=async"});
    ASSERT_EQ(begun.code, 0) << what << "\n" << begun.err;
    const Finished end = go(second, run, {}, /*resume=*/true);
    ASSERT_EQ(end.code, 0) << what << "\n" << end.err;
    EXPECT_NE(end.err.find(fmt::format("resuming {} at step 3\n", run)), std::string::npos) << end.err;
    expect_same_curve(run, "one", what);
  }
}

TEST_F(DistributedTrain, LayoutsThatCannotBeAreRefusedOnce) {
  for (const auto& [ranks, message] : std::vector<std::pair<Ranks, std::string>>{
           {{3, {"tensor_parallel_degree=2"}},
            "error: the degrees of [parallelism] must make the number of ranks, got pp 1 x dp_replicate 1 x dp_shard 1 x cp 1 x tp 2 = 2 for 3 ranks\n"},
           {{4, {"pipeline_parallel_degree=4"}}, "error: parallelism.pipeline_parallel_degree: must be at most the number of layers, got 4 > 3\nhelp: nearest: 3\n"},
           {{8, {"expert_parallel_degree=8", "data_parallel_shard_degree=8"}},
            "tiny.toml:20:15: error: blocks.moe.num_experts: the number of experts must be a multiple of expert_parallel_degree, got 4 % 8 = 4\nhelp: nearest: 8\n"},
           {{4, {"tensor_parallel_degree=4"}},
            "tiny.toml:14:13: error: blocks.gqa.num_heads: must be a multiple of the tensor-parallel degree, got 2 % 4 = 2\nhelp: nearest: 4\n"}}) {
    const Finished end = go(ranks, "run", {"training.global_batch_size=16"});
    EXPECT_EQ(end.code, 2) << text(ranks) << "\n" << end.err;
    EXPECT_NE(end.err.find(message), std::string::npos) << end.err;
    EXPECT_EQ(end.err.find("rank 1"), std::string::npos) << end.err;
    EXPECT_FALSE(fs::exists(folder_ / "run")) << text(ranks);
  }
}

TEST_F(DistributedTrain, AnInterruptSavesOnceForAll) {
  Process process(folder_, words(kShard, "run", {"training.steps=1000000"}, false));
  ASSERT_TRUE(process.wait_until([&] { return metrics("run").size() >= 2; }));
  process.signal(SIGINT);
  const Finished end = process.wait();
  EXPECT_EQ(end.code, 130) << end.err;
  const auto step = metrics("run").back().at("step").get<int64_t>();
  const std::string told = fmt::format("stopped by SIGINT after step {}: checkpoint saved; go on with --resume\n", step);
  const size_t at = end.err.find(told);
  EXPECT_NE(at, std::string::npos) << end.err;
  EXPECT_EQ(end.err.find(told, at + 1), std::string::npos) << end.err;
  EXPECT_EQ(open_checkpoint(folder_ / "run").state.step, step);
  const Finished on = go(kTensor, "run", {fmt::format("training.steps={}", step + 1)}, true);
  EXPECT_EQ(on.code, 0) << on.err;
}

// A rank that is killed, in a step or in a save, ends the run within seconds and loses nothing that was complete.
TEST_F(DistributedTrain, AKilledRankEndsTheRun) {
  const int rounds = std::getenv("TESSERA_TEST_ALL") ? 12 : 3;
  int in_saves = 0;
  for (int round = 0; round < rounds; ++round) {
    Process process(folder_, words(round % 3 == 1 ? kTensor : kShard, "run", {"training.steps=1000000", "checkpoint.interval=2", "checkpoint.keep_latest_k=2", round % 4 == 1 ? "checkpoint.async_mode=async" : "checkpoint.async_mode=disabled"}, round > 0));
    const int64_t before = fs::exists(folder_ / "run/checkpoints") && !list_checkpoints(folder_ / "run/checkpoints").empty() ? open_checkpoint(folder_ / "run").state.step : 0;
    ASSERT_TRUE(process.wait_until([&] {
      const auto complete = fs::exists(folder_ / "run/checkpoints") ? list_checkpoints(folder_ / "run/checkpoints") : std::vector<fs::path>{};
      return !complete.empty() && complete.back().filename().string() != fmt::format("step-{}", before) && (round % 2 == 0 || saving());
    })) << process.err();
    in_saves += saving();
    const auto ranks = ranks_of(process.pid());
    ASSERT_EQ(ranks.size(), 2u);
    kill(ranks[static_cast<size_t>(round / 2 % 2)], SIGKILL);
    const Finished end = process.wait();
    EXPECT_NE(end.code, 0);
    EXPECT_NE(end.err.find("signal 9"), std::string::npos) << end.err;
    for (const pid_t rank : ranks) EXPECT_NE(kill(rank, 0), 0) << "a rank is left";
    const OpenCheckpoint newest = open_checkpoint(folder_ / "run");  // whole, by its checksums
    EXPECT_GT(newest.state.step, before);
  }
  EXPECT_GE(in_saves, 1);
  const int64_t step = open_checkpoint(folder_ / "run").state.step;
  ASSERT_EQ(go(kOne, "run", {fmt::format("training.steps={}", step + 2)}, true).code, 0);
  // The curve is that of a run that nothing befell.
  ASSERT_EQ(go(kOne, "whole", {fmt::format("training.steps={}", step + 2)}).code, 0);
  const auto got = metrics("run"), want = metrics("whole");
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size() && i < 12; ++i) EXPECT_NEAR(got[i]["loss"].get<double>(), want[i]["loss"].get<double>(), 2e-3 * want[i]["loss"].get<double>()) << "step " << i + 1;
}

}  // namespace
}  // namespace tessera
