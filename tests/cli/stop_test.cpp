// Signals at every stage of a run, and standard streams that are closed, full or read by nobody.
#include <gtest/gtest.h>

#include "checkpoint/checkpoint.hpp"
#include "tests/support/failing.hpp"
#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

class Stop : public TinyRunTest {
 protected:
  std::string checkpoints() const { return (folder_ / "run/checkpoints").string(); }
  bool saving() const {
    if (!fs::exists(checkpoints())) return false;
    for (const std::string& name : entries(checkpoints()))
      if (name.starts_with(".saving-step-")) return true;
    return false;
  }
  std::vector<std::string> words(std::vector<std::string> sets) const {
    sets.push_back("run.folder=run");
    return with_sets({"train", "tiny.toml"}, sets);
  }
  void expect_saved(const Finished& end, const char* name, int code) const {
    EXPECT_EQ(end.code, code) << end.err;
    EXPECT_EQ(end.out, "");
    const int64_t step = metrics("run").back().at("step").get<int64_t>();
    EXPECT_TRUE(end.err.ends_with(fmt::format("stopped by {} after step {}: checkpoint saved; go on with --resume\n", name, step))) << end.err;
    EXPECT_EQ(open_checkpoint(folder_ / "run").state.step, step);
    EXPECT_FALSE(saving());
  }
  void expect_goes_on(const std::vector<std::string>& sets) const {
    const int64_t step = metrics("run").empty() ? 0 : metrics("run").back().at("step").get<int64_t>();
    auto more = sets;
    more.push_back(fmt::format("training.steps={}", step + 2));
    const Finished on = train("run", more, /*resume=*/true);
    EXPECT_EQ(on.code, 0) << on.err;
    EXPECT_EQ(metrics("run").size(), static_cast<size_t>(step) + 2);
  }
};

const std::vector<std::string> kEndless{"training.steps=1000000", "lr_scheduler.decay_type=constant"};

TEST_F(Stop, DuringSetUpLeavesNothingInTheWay) {
  for (const int signal : {SIGINT, SIGTERM}) {
    Process process(folder_, words(kEndless));
    ASSERT_TRUE(process.wait_until([&] { return fs::exists(checkpoints()); }));
    process.signal(signal);
    const Finished end = process.wait();
    EXPECT_EQ(end.code, 128 + signal) << end.err;
    EXPECT_EQ(end.err.find("error"), std::string::npos) << end.err;
    EXPECT_EQ(end.err.find("terminate"), std::string::npos) << end.err;
    if (fs::exists(folder_ / "run/metrics.jsonl")) fs::remove_all(folder_ / "run");  // it had begun
  }
  EXPECT_EQ(train("run").code, 0);
}

// A save that takes some tenths of a second is ended, and ends the run: no step is begun after it.
TEST_F(Stop, DuringASaveEndsWithIt) {
  auto sets = kEndless;
  sets.push_back("checkpoint.interval=3");
  Process process(folder_, words(sets), failing({.below = checkpoints(), .delay_us = 2000}));
  ASSERT_TRUE(process.wait_until([&] { return saving(); }));
  process.signal(SIGTERM);
  expect_saved(process.wait(), "SIGTERM", 143);
  EXPECT_EQ(metrics("run").size(), 3u);
  expect_goes_on({"lr_scheduler.decay_type=constant"});
}

// Where steps go on during a save, the run ends after the running one, with that save and one of its own.
TEST_F(Stop, DuringASaveInTheBackgroundEndsWithBoth) {
  auto sets = kEndless;
  sets.insert(sets.end(), {"checkpoint.interval=3", "checkpoint.keep_latest_k=0", "checkpoint.async_mode=async"});
  Process process(folder_, words(sets), failing({.below = checkpoints(), .delay_us = 4000}));
  ASSERT_TRUE(process.wait_until([&] { return saving() && metrics("run").size() > 3; }));
  process.signal(SIGTERM);
  expect_saved(process.wait(), "SIGTERM", 143);
  EXPECT_GT(metrics("run").size(), 3u);
  for (const auto& folder : list_checkpoints(checkpoints())) EXPECT_NO_THROW(open_checkpoint(folder)) << folder;
  EXPECT_TRUE(fs::exists(checkpoints() + "/step-3"));
  expect_goes_on({"lr_scheduler.decay_type=constant"});
}

TEST_F(Stop, DuringAnEvaluationEndsAfterTheStep) {
  auto sets = kEndless;
  sets.insert(sets.end(), {"validation.interval=1", "validation.tokens=100000", "data.validation_fraction=0.5"});
  Process process(folder_, words(sets));
  ASSERT_TRUE(process.wait_until([&] { return metrics("run").size() >= 2; }));
  process.signal(SIGINT);
  expect_saved(process.wait(), "SIGINT", 130);
  expect_goes_on({"lr_scheduler.decay_type=constant", "data.validation_fraction=0.5"});
}

// The second one does not wait, and what stood before stands.
TEST_F(Stop, TwiceEndsAtOnce) {
  for (const auto& [first, second] : {std::pair{SIGINT, SIGINT}, std::pair{SIGINT, SIGTERM}}) {
    fs::remove_all(folder_ / "run");
    auto sets = kEndless;
    sets.push_back("checkpoint.interval=2");
    Process process(folder_, words(sets), failing({.below = checkpoints(), .delay_us = 3000}));
    ASSERT_TRUE(process.wait_until([&] { return fs::exists(checkpoints() + "/step-2") && saving(); }));
    process.signal(first);
    usleep(20000);
    process.signal(second);
    const Finished end = process.wait();
    EXPECT_EQ(end.code, 128 + second) << end.err;
    EXPECT_EQ(end.err.find("stopped by"), std::string::npos) << end.err;
    EXPECT_TRUE(saving()) << "it was not in a save";
    EXPECT_NO_THROW(open_checkpoint(folder_ / "run"));
  }
  const Finished on = train("run", {"training.steps=8", "lr_scheduler.decay_type=constant"}, /*resume=*/true);
  EXPECT_EQ(on.code, 0) << on.err;
  EXPECT_FALSE(saving()) << "a leftover";
}

void without_reader(int fd) {
  int ends[2];
  if (pipe(ends) != 0) _exit(126);
  close(ends[0]);
  dup2(ends[1], fd);
}
void on_a_full_disk(int fd) { dup2(open("/dev/full", O_WRONLY), fd); }

class Streams : public TinyRunTest {
 protected:
  const std::vector<std::vector<std::string>> printing_{{"plan", "tiny.toml"}, {"plan", "tiny.toml", "--json"}, {"plugins"}, {"describe", "mlp"}, {"--help"}, {"--version"}};
};

TEST_F(Streams, OutputThatNobodyReadsEndsQuietly) {
  for (const auto& words : printing_) {
    const Finished end = tessera(words, {}, [] { without_reader(1); });
    EXPECT_EQ(end.code, 128 + SIGPIPE) << words[0];
    EXPECT_EQ(end.err, "") << words[0];
  }
}

TEST_F(Streams, OutputThatCannotBeWrittenIsAnError) {
  for (const auto& words : printing_) {
    const Finished full = tessera(words, {}, [] { on_a_full_disk(1); });
    EXPECT_EQ(full.code, 4) << words[0];
    EXPECT_EQ(full.err, "error: standard output: cannot be written: No space left on device\n") << words[0];
    const Finished closed = tessera(words, {}, [] { close(1); });
    EXPECT_EQ(closed.code, 4) << words[0];
    EXPECT_EQ(closed.err, "error: standard output: cannot be written: Bad file descriptor\n") << words[0];
  }
}

// No file of the run gets what was to be printed, and a run does not end with the terminal that showed it.
TEST_F(Streams, ARunNeedsNone) {
  ASSERT_EQ(train("whole").code, 0);
  const std::function<void()> ways[] = {[] { close(0), close(1), close(2); }, [] { close(2); }, [] { without_reader(1), without_reader(2); }, [] { on_a_full_disk(1), on_a_full_disk(2); }};
  int number = 0;
  for (const auto& way : ways) {
    const std::string run = fmt::format("run{}", number++);
    EXPECT_EQ(train(run, {"checkpoint.interval=2"}, false, way).code, 0) << number;
    expect_same_run(run, "whole", 6);
    EXPECT_EQ(entries(folder_ / run), (std::vector<std::string>{"checkpoints", "config.toml", "metrics.jsonl", "starts.jsonl"}));
  }
}

TEST_F(Streams, AnErrorThatNobodyReadsKeepsItsCode) {
  EXPECT_EQ(tessera({"plan", "none.toml"}, {}, [] { close(0), close(1), close(2); }).code, tessera({"plan", "none.toml"}).code);
  EXPECT_EQ(tessera({"eval", "nowhere"}, {}, [] { close(2); }).code, 4);
}

}  // namespace
}  // namespace tessera
