// tessera train: runs, stops, crashes and resumptions of the real binary.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/failing.hpp"
#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

class Train : public TinyRunTest {};

// What a resumed run must repeat: schedule, validation, data position, router bias, checkpoints that come and go.
const std::vector<std::string> kLong{"training.steps=40", "checkpoint.interval=3", "checkpoint.keep_latest_k=2", "validation.interval=10"};

TEST_F(Train, WritesItsRunFolder) {
  const Finished done = train("run", {"checkpoint.interval=2", "checkpoint.keep_latest_k=2", "metrics.tensorboard=true"});
  ASSERT_EQ(done.code, 0) << done.err;
  EXPECT_EQ(done.out, "");
  EXPECT_EQ(entries(folder_ / "run/checkpoints"), (std::vector<std::string>{"step-4", "step-6"}));
  const auto lines = metrics("run");
  ASSERT_EQ(lines.size(), 6u);
  for (size_t i = 0; i < 6; ++i) {
    const auto& line = lines[i];
    EXPECT_EQ(line.at("step"), i + 1);
    EXPECT_EQ(line.at("tokens"), 128 * (i + 1));
    for (const char* key : {"loss", "total_loss", "grad_norm", "lr", "tokens_per_s", "flops_per_s", "peak_bytes", "mtp.1"}) EXPECT_TRUE(line.at(key).is_number()) << key;
    EXPECT_EQ(line.contains("val_loss"), i == 2 || i == 5) << i;
    EXPECT_EQ(line.contains("save_s"), i == 2 || i == 4) << i;  // behind the steps that saved
    EXPECT_FALSE(line.contains("save_wait_s")) << i;
  }
  EXPECT_EQ(lines[0].at("lr"), 0.005);
  EXPECT_NEAR(lines[5].at("lr").get<double>(), 0, 1e-12);
  EXPECT_LT(lines[5].at("loss").get<double>(), lines[0].at("loss").get<double>());
  EXPECT_NEAR(lines[0].at("loss").get<double>(), std::log(256), 0.1);
  // The resolved configuration reproduces the run.
  fs::copy(folder_ / "run/config.toml", folder_ / "again.toml");
  const Finished again = tessera({"train", "again.toml"}, {"run.folder=again"});
  ASSERT_EQ(again.code, 0) << again.err;
  expect_same_run("again", "run", 6);
  bool events = false;
  for (const std::string& name : entries(folder_ / "run")) events |= name.starts_with("events.out.tfevents");
  EXPECT_TRUE(events);
}

// Every checkpoint of a run that saves in the background is that of one that waits, and is told of as such.
TEST_F(Train, SavesInTheBackgroundChangeNothing) {
  const std::vector<std::string> sets{"training.steps=9", "checkpoint.interval=2", "checkpoint.keep_latest_k=0"};
  ASSERT_EQ(train("waits", sets).code, 0);
  auto more = sets;
  more.push_back("checkpoint.async_mode=async");
  const Finished done = train("goes_on", more, false, failing({.below = (folder_ / "goes_on/checkpoints").string(), .delay_us = 1000}));
  ASSERT_EQ(done.code, 0) << done.err;
  expect_same_run("goes_on", "waits", 9);
  EXPECT_EQ(entries(folder_ / "goes_on/checkpoints"), (std::vector<std::string>{"step-2", "step-4", "step-6", "step-8", "step-9"}));
  for (const std::string& step : entries(folder_ / "waits/checkpoints")) {
    for (const char* name : {"model.safetensors", "optimizer.safetensors"})
      EXPECT_TRUE(file_text(folder_ / "goes_on/checkpoints" / step / name) == file_text(folder_ / "waits/checkpoints" / step / name)) << step << " " << name;
    auto got = nlohmann::json::parse(file_text(folder_ / "goes_on/checkpoints" / step / "state.json")), want = nlohmann::json::parse(file_text(folder_ / "waits/checkpoints" / step / "state.json"));
    for (nlohmann::json* state : {&got, &want}) state->at("files").erase("config.toml");  // which names the run
    EXPECT_EQ(got, want) << step;
  }
  // A save takes some tenths of a second, two steps much less: the second had to wait for the first.
  const auto lines = metrics("goes_on");
  EXPECT_FALSE(lines[2].contains("save_wait_s"));
  EXPECT_GT(lines[4].at("save_wait_s").get<double>(), 0);
  EXPECT_GE(lines[4].at("save_s").get<double>(), lines[4].at("save_wait_s").get<double>());
}

TEST_F(Train, TheSeedMakesTheRun) {
  ASSERT_EQ(train("a").code, 0);
  ASSERT_EQ(train("b").code, 0);
  ASSERT_EQ(train("c", {"training.seed=1"}).code, 0);
  ASSERT_EQ(train("d", {"activation_checkpoint.mode=full"}).code, 0);
  ASSERT_EQ(train("e", {"training.local_batch_size=4"}).code, 0);
  expect_same_run("b", "a", 6);
  expect_same_run("d", "a", 6);
  EXPECT_NE(metrics("c")[0].at("loss"), metrics("a")[0].at("loss"));
  // Rows do not depend on how they are cut into micro-batches.
  EXPECT_NEAR(metrics("e")[5].at("loss").get<double>(), metrics("a")[5].at("loss").get<double>(), 1e-3);
}

// Two real runs, so both signals are sent to each other's resumption.
TEST_F(Train, StoppedRunsGoOnAsIfNothingHadHappened) {
  ASSERT_EQ(train("whole", kLong).code, 0);
  int64_t stopped = 0;
  bool resume = false;
  for (const auto& [signal, name, code] : {std::tuple{SIGINT, "SIGINT", 130}, std::tuple{SIGTERM, "SIGTERM", 143}}) {
    std::vector<std::string> words{"train", "tiny.toml"};
    if (resume) words.push_back("--resume");
    auto sets = kLong;
    sets.push_back("run.folder=cut");
    Process process(folder_, with_sets(words, sets));
    ASSERT_TRUE(process.wait_until([&] { return static_cast<int64_t>(metrics("cut").size()) >= stopped + 4; }));
    process.signal(signal);
    const Finished end = process.wait();
    ASSERT_EQ(end.code, code) << end.err;
    stopped = metrics("cut").back().at("step").get<int64_t>();
    EXPECT_LT(stopped, 40) << "too late to stop it";
    EXPECT_NE(end.err.find(fmt::format("stopped by {} after step {}: checkpoint saved; go on with --resume", name, stopped)), std::string::npos) << end.err;
    EXPECT_TRUE(fs::exists(folder_ / fmt::format("cut/checkpoints/step-{}/state.json", stopped)));
    resume = true;
  }
  const Finished end = train("cut", kLong, /*resume=*/true);
  ASSERT_EQ(end.code, 0) << end.err;
  EXPECT_NE(end.err.find(fmt::format("resuming cut at step {}", stopped)), std::string::npos) << end.err;
  expect_same_run("cut", "whole", 40);
}

TEST_F(Train, SaysWhereItStarts) {
  const Finished first = train("run", {}, /*resume=*/true);
  EXPECT_EQ(first.code, 0);
  EXPECT_NE(first.err.find("no complete checkpoint in run/checkpoints: starting at step 0\n"), std::string::npos) << first.err;
  const Finished finished = train("run", {}, /*resume=*/true);
  EXPECT_EQ(finished.code, 0);
  EXPECT_EQ(finished.err, "run is finished: 6 of 6 steps\n");
  const Finished refused = train("run");
  EXPECT_EQ(refused.code, 2);
  EXPECT_EQ(refused.err, "error: run: holds a run already\nhelp: go on with it by --resume, or choose another [run] folder or name\n");
  const Finished longer = train("run", {"training.steps=8"}, /*resume=*/true);
  EXPECT_EQ(longer.code, 0);
  EXPECT_NE(longer.err.find("resuming run at step 6\n"), std::string::npos) << longer.err;
  EXPECT_EQ(metrics("run").size(), 8u);
}

TEST_F(Train, DataThatChangedAreNoticedByAResumption) {
  ASSERT_EQ(train("run").code, 0);
  put_file(folder_ / "text/9.txt", "one more document");
  const Finished end = train("run", {"training.steps=8"}, /*resume=*/true);
  EXPECT_EQ(end.code, 4);
  EXPECT_NE(end.err.find("error: data position: source 0 changed: it was bytes 'text/*.txt' with 6 documents"), std::string::npos) << end.err;
}

TEST_F(Train, ANonFiniteLossEndsItAndNamesStepLayerAndCheckpoint) {
  ASSERT_EQ(train("run", {"training.steps=4", "lr_scheduler.decay_type=constant"}).code, 0);
  const Finished end = train("run", {"training.steps=9", "lr_scheduler.decay_type=constant", "optimizer.lr=1e30"}, /*resume=*/true);
  EXPECT_EQ(end.code, 4);
  const std::string error = end.err.substr(std::min(end.err.find("error:"), end.err.size()));
  EXPECT_EQ(error,
            "error: step 6: the loss is nan, first at layers.0 (mamba2), forward\n"
            "help: the last good checkpoint is run/checkpoints/step-4; go on from it with --resume and a lower --set optimizer.lr=...\n");
  EXPECT_EQ(entries(folder_ / "run/checkpoints"), std::vector<std::string>{"step-4"});
  // And that is what it says.
  const Finished on = train("run", {"training.steps=9", "lr_scheduler.decay_type=constant"}, /*resume=*/true);
  EXPECT_EQ(on.code, 0) << on.err;
  const auto lines = metrics("run");
  ASSERT_EQ(lines.size(), 9u);
  EXPECT_TRUE(lines[5].at("loss").is_number());
}

TEST_F(Train, ANonFiniteStepMayBeSkipped) {
  const Finished end = train("run", {"optimizer.lr=1e30", "training.on_nonfinite=skip"});
  EXPECT_EQ(end.code, 0) << end.err;
  EXPECT_NE(end.err.find("step 2: the loss is nan, first at layers.0 (mamba2), forward: step skipped\n"), std::string::npos) << end.err;
  const auto lines = metrics("run");
  ASSERT_EQ(lines.size(), 6u);
  EXPECT_FALSE(lines[0].contains("skipped"));
  EXPECT_EQ(lines[1].at("skipped"), true);
  EXPECT_TRUE(lines[1].at("loss").is_null());
}

TEST_F(Train, AFullDiskEndsItAndLeavesTheLastCheckpoint) {
  ASSERT_EQ(train("run", {"training.steps=2"}).code, 0);
  const Finished end = train("run", {}, /*resume=*/true, [] {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit small{50000, 50000};
    setrlimit(RLIMIT_FSIZE, &small);
  });
  EXPECT_EQ(end.code, 4);
  const std::string error = end.err.substr(std::min(end.err.find("error:"), end.err.size()));
  EXPECT_NE(error.find("model.safetensors"), std::string::npos) << end.err;
  EXPECT_NE(error.find("File too large"), std::string::npos) << end.err;
  EXPECT_EQ(entries(folder_ / "run/checkpoints"), std::vector<std::string>{"step-2"});
  EXPECT_EQ(train("run", {}, /*resume=*/true).code, 0);
  EXPECT_EQ(metrics("run").size(), 6u);
}

TEST_F(Train, AnUnwritableFolderIsNamed) {
  put_file(folder_ / "run", "a file in the way");
  const Finished end = train("run");
  EXPECT_EQ(end.code, 4);
  EXPECT_EQ(end.err.substr(0, 10), "error: run") << end.err;
  EXPECT_EQ(file_text(folder_ / "run"), "a file in the way");
}

TEST_F(Train, ADamagedCheckpointIsNamedAndNotLoaded) {
  ASSERT_EQ(train("run").code, 0);
  const fs::path file = folder_ / "run/checkpoints/step-6/model.safetensors";
  std::string bytes = file_text(file);
  bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
  put_file(file, bytes);
  const Finished end = train("run", {"training.steps=8"}, /*resume=*/true);
  EXPECT_EQ(end.code, 4);
  EXPECT_EQ(end.err, "error: run/checkpoints/step-6/model.safetensors: damaged: its CRC-32 is not that of when it was written\nhelp: take an older checkpoint\n");
}

TEST_F(Train, AWarmStartSaysWhatItLoaded) {
  ASSERT_EQ(train("run").code, 0);
  const std::vector<std::string> other{"model.hybrid_override_pattern=MM*", "checkpoint.initial_load_path=run"};
  const Finished refused = train("warm", other);
  EXPECT_EQ(refused.code, 4);
  EXPECT_NE(refused.err.find("the checkpoint is of another architecture\n  missing ("), std::string::npos) << refused.err;
  auto sets = other;
  sets.insert(sets.end(), {"checkpoint.initial_load_partial=true", "checkpoint.initial_load_map=[\"layers.1.=layers.2.\", \"layers.2.=old.\"]"});
  const Finished warm = train("warmer", sets);
  ASSERT_EQ(warm.code, 0) << warm.err;
  // The stem (3), mamba2 (9) and gqa (5) are loaded; the second mamba2 is not in the file; moe (5) and the head are left over.
  EXPECT_NE(warm.err.find("warm start from run: 17 tensors loaded, 9 left at their initial values, "), std::string::npos) << warm.err;
  EXPECT_NE(warm.err.find("\n  not in the file: layers.1.A_log\n"), std::string::npos) << warm.err;
  EXPECT_NE(warm.err.find("\n  not used: layers.2.gate.weight\n"), std::string::npos) << warm.err;
  EXPECT_EQ(warm.err.find("not in the file: layers.2."), std::string::npos) << warm.err;
  // A whole warm start begins where the other run ended.
  const Finished whole = train("whole", {"checkpoint.initial_load_path=run", "optimizer.lr=0", "blocks.moe.bias_update_rate=0"});
  ASSERT_EQ(whole.code, 0) << whole.err;
  EXPECT_EQ(metrics("whole").back().at("val_loss"), metrics("run").back().at("val_loss"));
}

TEST_F(Train, ARefusedStartLeavesNoRun) {
  const Finished end = train("run", {"data.path=nowhere/*.txt"});
  EXPECT_EQ(end.code, 4);
  EXPECT_EQ(end.err.find("error: "), 0u) << end.err;
  EXPECT_NE(end.err.find("nowhere/*.txt"), std::string::npos) << end.err;
  const Finished again = train("run");
  EXPECT_EQ(again.code, 0) << "the failed start is in the way: " << again.err;
}

TEST_F(TinyRunTest, ATraceHasTheLayersAsScopesForwardAndBackward) {
  const Finished end = tessera({"train", "tiny.toml", "--profile", "steps=2..3"}, {"training.steps=4", "activation_checkpoint.mode=selective", "activation_checkpoint.block_types=[\"moe\"]"});
  ASSERT_EQ(end.code, 0) << end.err;
  const auto trace = nlohmann::json::parse(file_text(folder_ / "run/trace-2-3.json"));
  std::map<std::string, int> scopes;
  for (const auto& event : trace["traceEvents"])
    if (event.value("cat", "") == "user_annotation") ++scopes[event["name"].get<std::string>()];
  for (const char* name : {"embedding, forward", "layers.0 (mamba2), forward", "layers.1 (gqa), backward", "layers.2 (moe), recomputation", "heads.mtp.layers.0 (mlp), backward", "lm_head, forward", "optimizer, forward"})
    EXPECT_GE(scopes[name], 2) << name;
  EXPECT_EQ(metrics("run").size(), 4u);
  for (const char* wrong : {"5", "steps=0", "steps=5..4", "steps=a", "steps=5.", "steps=5..x"}) {
    const Finished refused = tessera({"train", "tiny.toml", "--profile", wrong});
    EXPECT_EQ(refused.code, 2) << wrong;
    EXPECT_NE(refused.err.find("--profile: must be steps=FIRST..LAST, got "), std::string::npos) << refused.err;
  }
}

}  // namespace
}  // namespace tessera
