// What training over several processes says and leaves behind when one of them is killed, stops, hangs or is not like the others.
#include <gtest/gtest.h>

#include <map>
#include <regex>

#include "checkpoint/checkpoint.hpp"
#include "tests/distributed/ranks.hpp"
#include "tests/support/failing.hpp"
#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

const std::string kTensor = "parallelism.tensor_parallel_degree=2";

const std::string kStopping = TESSERA_BINARY_DIR "/stopping_block/stopping_block.so";

std::string checksum(const fs::path& file) { return fmt::format("{:08x}", file_crc32(file)); }

bool all_tests() { return std::getenv("TESSERA_TEST_ALL") != nullptr; }

class Faults : public TinyRunTest {
 protected:
  static void prepare() {
    clear_launchers();
    setenv("OMP_NUM_THREADS", "1", 1);
    setenv("TESSERA_PLUGIN_PATH", TESSERA_BINARY_DIR "/stopping_block", 1);
    alarm(300);  // against a hang
  }
  static std::vector<std::string> launch(int ranks, const std::vector<std::string>& sets, bool resume = false) {
    std::vector<std::string> words{"launch", "-n", std::to_string(ranks), "train", "tiny.toml"};
    if (resume) words.push_back("--resume");
    words.insert(words.end(), {"--set", "training.num_threads=1"});
    return with_sets(words, sets);
  }
  // A stack with a layer in which a rank stops, at its third micro-batch.
  static std::vector<std::string> stopping(const std::string& pattern, const std::string& act, const std::string& pass, int rank) {
    return {"model.hybrid_override_pattern=" + pattern, "symbols.S=stopping", "blocks.stopping.act=" + act, "blocks.stopping.pass=" + pass, fmt::format("blocks.stopping.rank={}", rank),
            "blocks.stopping.after=2"};
  }
  Finished run(int ranks, std::vector<std::string> sets, const std::vector<std::string>& more) const {
    sets.insert(sets.end(), more.begin(), more.end());
    return run_tessera(folder_, launch(ranks, sets), prepare);
  }
  // Ranks started by hand, each in a folder and with variables of its own.
  struct Own {
    fs::path folder;
    std::map<std::string, std::string> variables = {};
    std::vector<std::string> sets = {};
  };
  std::vector<Finished> by_hand(const std::vector<Own>& ranks) const {
    const std::string port = std::to_string(free_port());
    std::vector<std::unique_ptr<Process>> list;
    for (size_t rank = 0; rank < ranks.size(); ++rank)
      list.push_back(std::make_unique<Process>(ranks[rank].folder, with_sets({"train", "tiny.toml"}, ranks[rank].sets), [&, rank] {
        prepare();
        for (const auto& [name, value] : std::map<std::string, std::string>{{"RANK", std::to_string(rank)}, {"WORLD_SIZE", std::to_string(ranks.size())}, {"MASTER_ADDR", "127.0.0.1"}, {"MASTER_PORT", port}})
          setenv(name.c_str(), value.c_str(), 1);
        for (const auto& [name, value] : ranks[rank].variables) setenv(name.c_str(), value.c_str(), 1);
      }));
    std::vector<Finished> ends;
    for (const auto& process : list) ends.push_back(process->wait());
    return ends;
  }
  // Rank 0 names the first difference, as regular expressions say; nobody trains.
  void expect_difference(const std::vector<Own>& ranks, const std::string& there, const std::string& first) const {
    const auto ends = by_hand(ranks);
    for (const Finished& end : ends) EXPECT_EQ(end.code, 2) << end.err;
    const std::string host = host_name(), told = fmt::format("error: rank 1 \\(on host {0}\\) has {1}, rank 0 \\(on host {0}\\) has {2}\nhelp: all ranks need the same build, plugins, configuration and data\n", host, there, first);
    EXPECT_TRUE(std::regex_match(ends[0].err, std::regex(told))) << ends[0].err;
    EXPECT_EQ(ends[1].err, "");
    EXPECT_FALSE(fs::exists(folder_ / "run"));
  }
  // Its main thread has slept for long: it waits in a collective.
  static bool waits(pid_t pid) {
    for (int i = 0; i < 60; ++i) {
      const std::string stat = file_text(fmt::format("/proc/{}/stat", pid));
      const size_t after = stat.rfind(") ");
      if (after == std::string::npos || stat[after + 2] != 'S') return false;
      usleep(5000);
    }
    return true;
  }
};

constexpr const char* kKilled = "error: rank 1 was ended by signal 9 (Killed)\nhelp: the machine may have run out of memory";

TEST_F(Faults, ARankIsKilledInAForwardPass) {
  const Finished end = run(2, stopping("MS*", "kill", "forward", 1), {kTensor});
  EXPECT_EQ(end.code, 137) << end.err;
  EXPECT_TRUE(has(end.err, "[rank 1] rank 1 reached the forward pass\n")) << end.err;
  EXPECT_TRUE(has(end.err, kKilled)) << end.err;
  EXPECT_TRUE(has(end.err, "error: all_gather over tp (ranks 0, 1) in layers.2 (gqa), forward, number ")) << end.err;
  EXPECT_TRUE(has(end.err, ": rank 1 (tp 1) was ended by signal 9 (Killed)")) << end.err;
  EXPECT_EQ(metrics("run").size(), 1u);  // two micro-batches a step
}

TEST_F(Faults, ARankIsKilledInABackwardPass) {
  if (!all_tests()) GTEST_SKIP() << "long: runs with --all";
  const Finished end = run(2, stopping("*SM", "kill", "backward", 1), {kTensor});
  EXPECT_EQ(end.code, 137) << end.err;
  EXPECT_TRUE(has(end.err, "[rank 1] rank 1 reached the backward pass\n")) << end.err;
  EXPECT_TRUE(has(end.err, kKilled)) << end.err;
  EXPECT_TRUE(has(end.err, "error: all_gather over tp (ranks 0, 1) in layers.0 (gqa), backward, number ")) << end.err;
  EXPECT_TRUE(has(end.err, ": rank 1 (tp 1) was ended by signal 9 (Killed)")) << end.err;
  EXPECT_EQ(metrics("run").size(), 1u);
}

// Rank 1 is in the exchange, which rank 0 comes to when it is gone.
TEST_F(Faults, ARankIsKilledInAnAllToAllOfExperts) {
  if (!all_tests()) GTEST_SKIP() << "long: runs with --all";
  auto sets = stopping("MSO", "kill_other", "forward", 0);
  sets.push_back("parallelism.expert_parallel_degree=2");
  Process process(folder_, launch(2, sets), prepare);
  ASSERT_TRUE(process.wait_until([&] { return has(process.err(), "rank 0 reached the forward pass\n"); })) << process.err();
  const auto ranks = ranks_of(process.pid());
  ASSERT_EQ(ranks.size(), 2u);
  ASSERT_TRUE(process.wait_until([&] { return waits(ranks[1]); }));
  put_file(folder_ / "aside", std::to_string(ranks[1]) + "\n");
  fs::rename(folder_ / "aside", folder_ / "victim");
  const Finished end = process.wait();
  EXPECT_EQ(end.code, 137) << end.err;
  EXPECT_TRUE(has(end.err, kKilled)) << end.err;
  EXPECT_TRUE(has(end.err, "error: all_to_all over ep (ranks 0, 1) in layers.2 (moe), forward, number ")) << end.err;
  EXPECT_TRUE(has(end.err, ": rank 1 (dp_shard 1) was ended by signal 9 (Killed)")) << end.err;
  for (const pid_t rank : ranks) EXPECT_NE(kill(rank, 0), 0) << "a rank is left";
}

// Whole checkpoints stay, and the run goes on from the last one as if nothing had happened, bit for bit.
TEST_F(Faults, ARankIsKilledInASave) {
  if (!all_tests()) GTEST_SKIP() << "long: runs with --all";
  const std::vector<std::string> sets{kTensor, "checkpoint.interval=2"};
  ASSERT_EQ(run(2, sets, {"run.folder=whole"}).code, 0);
  for (int victim = 0; victim < 2; ++victim) {
    const std::string name = fmt::format("killed{}", victim);
    auto own = sets;
    own.push_back("run.folder=" + name);
    Process process(folder_, launch(2, own), [&] {
      prepare();
      failing({.below = (folder_ / name / "checkpoints").string(), .delay_us = 20'000})();
    });
    const auto saving = [&] {
      if (!fs::exists(folder_ / name / "checkpoints/step-2")) return false;
      for (const std::string& entry : entries(folder_ / name / "checkpoints"))
        if (entry.starts_with(".saving-step-4-") && fs::exists(folder_ / name / "checkpoints" / entry / "model.safetensors")) return true;
      return false;
    };
    ASSERT_TRUE(process.wait_until(saving)) << process.err();
    const auto ranks = ranks_of(process.pid());
    ASSERT_EQ(ranks.size(), 2u);
    kill(ranks[static_cast<size_t>(victim)], SIGKILL);
    const Finished end = process.wait();
    EXPECT_EQ(end.code, 137) << end.err;
    EXPECT_TRUE(has(end.err, fmt::format("error: rank {} was ended by signal 9 (Killed)", victim))) << end.err;
    EXPECT_FALSE(fs::exists(folder_ / name / "checkpoints/step-4"));
    EXPECT_EQ(open_checkpoint(folder_ / name).state.step, 2);  // whole, by its checksums
    const Finished on = run_tessera(folder_, launch(2, own, /*resume=*/true), prepare);
    ASSERT_EQ(on.code, 0) << on.err;
    EXPECT_TRUE(has(on.err, fmt::format("resuming {} at step 2\n", name))) << on.err;
    const auto got = metrics(name), want = metrics("whole");
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < want.size(); ++i)
      for (const char* key : {"step", "loss", "grad_norm", "val_loss"}) EXPECT_EQ(got[i].value(key, nlohmann::json()), want[i].value(key, nlohmann::json())) << key << " of step " << i + 1;
    for (const char* file : {"model.safetensors", "optimizer.safetensors"})
      EXPECT_TRUE(file_text(folder_ / name / "checkpoints/step-6" / file) == file_text(folder_ / "whole/checkpoints/step-6" / file)) << file;
    EXPECT_EQ(entries(folder_ / name / "checkpoints"), entries(folder_ / "whole/checkpoints"));
  }
}

// A stopped process can neither work nor say that it lives.
TEST_F(Faults, ARankIsStopped) {
  if (!all_tests()) GTEST_SKIP() << "waits for every grace: runs with --all";
  const Finished end = run(2, stopping("MS*", "stop", "forward", 1), {kTensor, "parallelism.timeout_seconds=5"});
  EXPECT_EQ(end.code, 5) << end.err;
  EXPECT_TRUE(has(end.err, "error: all_gather over tp (ranks 0, 1) in layers.2 (gqa), forward, number ")) << end.err;
  EXPECT_TRUE(has(end.err, ": rank 1 (tp 1) gave no sign of life for ")) << end.err;
}

// This one says that it lives, and where it is.
TEST_F(Faults, ARankHangs) {
  if (!all_tests()) GTEST_SKIP() << "waits for a timeout: runs with --all";
  const Finished end = run(2, stopping("MS*", "hang", "forward", 1), {kTensor, "parallelism.timeout_seconds=5"});
  EXPECT_EQ(end.code, 5) << end.err;
  EXPECT_TRUE(has(end.err, "error: all_gather over tp (ranks 0, 1) in layers.2 (gqa), forward, number ")) << end.err;
  EXPECT_TRUE(has(end.err, ": rank 1 (tp 1) has not arrived, it is at reduce_scatter number ")) << end.err;
  EXPECT_TRUE(has(end.err, " over tp in layers.0 (mamba2), forward")) << end.err;
}

TEST_F(Faults, RanksOfDifferentConfigurations) {
  expect_difference({{folder_}, {folder_, {}, {"optimizer.lr=2e-2", "training.steps=7"}}}, "training\\.steps = 7", "6");
}

TEST_F(Faults, RanksOfDifferentPlugins) {
  expect_difference({{folder_}, {folder_, {{"TESSERA_PLUGIN_PATH", ""}}}}, "nothing there", "plugins = stopping_block\\.so " + checksum(kStopping));
}

TEST_F(Faults, RanksOfDifferentBuildsOfAPlugin) {
  const fs::path other = folder_ / "other/stopping_block.so";
  put_file(other, file_text(kStopping) + "more");
  expect_difference({{folder_}, {folder_, {{"TESSERA_PLUGIN_PATH", other.parent_path()}}}}, "plugins = stopping_block\\.so " + checksum(other), "stopping_block\\.so " + checksum(kStopping));
}

// The same configuration, which names a path that another machine has other files at.
TEST_F(Faults, RanksOfDifferentData) {
  const fs::path other = folder_ / "other";
  put_file(other / "tiny.toml", kTinyRun);
  for (int document = 0; document < 6; ++document) put_file(other / fmt::format("text/{}.txt", document), file_text(folder_ / fmt::format("text/{}.txt", document)) + (document == 3 ? "!" : ""));
  expect_difference({{folder_}, {other}}, "data = [0-9a-f]{16}", "[0-9a-f]{16}");
}

TEST_F(Faults, ThePortIsTaken) {
  uint16_t port = 0;
  const auto server = serve_store(port, false, std::chrono::seconds(10));
  const Finished end = tessera({"train", "tiny.toml"}, {}, [&] {
    prepare();
    for (const auto& [name, value] : std::map<std::string, std::string>{{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "127.0.0.1"}, {"MASTER_PORT", std::to_string(port)}}) setenv(name.c_str(), value.c_str(), 1);
  });
  EXPECT_EQ(end.code, 2);
  EXPECT_EQ(end.err, fmt::format("error: MASTER_ADDR=127.0.0.1 MASTER_PORT={0}: rank 0 cannot serve on port {0}: Address already in use\nhelp: choose another MASTER_PORT, the same for every rank\n", port));
  EXPECT_FALSE(fs::exists(folder_ / "run"));
}

// More ranks than there are layers, experts or heads to cut: said by plan before anything is started, and by train in the same words.
TEST_F(Faults, LayoutsThatCannotBeAreToldAlike) {
  const std::string batch = "training.global_batch_size=16";
  for (const auto& [ranks, mesh, sets, message] : std::vector<std::tuple<int, std::string, std::vector<std::string>, std::string>>{
           {4, "pp=4", {batch, "parallelism.pipeline_parallel_degree=4"}, "must be at most the number of layers, got 4 > 3"},
           {8, "dp_shard=8,ep=8", {batch, "parallelism.expert_parallel_degree=8", "parallelism.data_parallel_shard_degree=8"}, "must be a multiple of expert_parallel_degree, got 4 % 8 = 4"},
           {4, "tp=4", {batch, "parallelism.tensor_parallel_degree=4"}, "must be a multiple of the tensor-parallel degree, got 2 % 4 = 2"}}) {
    const Finished planned = tessera({"plan", "tiny.toml", "--mesh", mesh}, {batch}, prepare), launched = run(ranks, sets, {});
    EXPECT_EQ(planned.code, 2) << mesh << "\n" << planned.err;
    EXPECT_EQ(launched.code, 2) << mesh << "\n" << launched.err;
    EXPECT_TRUE(has(planned.err, message)) << planned.err;
    // Train also says where the value stands.
    EXPECT_EQ(planned.err, std::regex_replace(launched.err, std::regex("(^|\n)(tiny.toml:[0-9]+:[0-9]+|--set [^ ]+): "), "$1")) << mesh;
    EXPECT_FALSE(fs::exists(folder_ / "run"));
  }
}

}  // namespace
}  // namespace tessera
