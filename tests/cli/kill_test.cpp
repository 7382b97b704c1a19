// Runs that are killed at random moments of their steps and saves: the newest complete checkpoint loads, and the resumed run is the uninterrupted one.
#include <gtest/gtest.h>

#include <random>
#include <set>

#include "checkpoint/checkpoint.hpp"
#include "tests/support/failing.hpp"
#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

// Saving is most of what it does; checkpoints come and go.
const std::vector<std::string> kOften{"training.steps=40", "checkpoint.interval=1", "checkpoint.keep_latest_k=2", "validation.interval=10"};

class Kill : public TinyRunTest {
 protected:
  void SetUp() override {
    TinyRunTest::SetUp();
    ASSERT_EQ(train("whole", kOften).code, 0);
    want_ = metrics("whole");
  }

  // What saves and removals that never ended left.
  std::set<std::string> leftovers() const {
    std::set<std::string> names;
    if (fs::exists(folder_ / "killed/checkpoints"))
      for (const std::string& name : entries(folder_ / "killed/checkpoints"))
        if (name.starts_with(".")) names.insert(name);
    return names;
  }

  // Kills runs until there were `kills`, at least `saves` of them inside a save.
  void kill_and_resume(int kills, int saves, const std::string& async_mode) {
    sets_ = kOften;
    sets_.push_back("checkpoint.async_mode=" + async_mode);
    // While one save is in flight the next step's line is written.
    most_lines_ahead_ = async_mode == "async" ? 2 : 1;
    std::mt19937 random(1);
    const auto any = [&](int below) { return std::uniform_int_distribution<int>(0, below - 1)(random); };
    auto sets = sets_;
    sets.push_back("run.folder=killed");
    int killed = 0, in_save = 0, in_removal = 0, before_the_first_step = 0, finished = 0;
    while (killed < kills) {
      SCOPED_TRACE(fmt::format("kill {}", killed));
      const size_t steps = metrics("killed").size();
      if (steps > 36) {  // too near its end to be killed in it
        finish();
        fs::remove_all(folder_ / "killed");
        ++finished;
        continue;
      }
      const std::set<std::string> before = leftovers();
      // Every other run's saves are slowed, to some tenths of a second.
      const bool slow = killed % 2 == 1;
      Process process(folder_, with_sets({"train", "tiny.toml", "--resume"}, sets), slow ? failing({.below = (folder_ / "killed/checkpoints").string(), .delay_us = 1500}) : nullptr);
      const size_t until = any(20) == 0 ? 0 : steps + 1 + static_cast<size_t>(any(3));  // 0: in its set-up
      if (until > 0) {
        ASSERT_TRUE(process.wait_until([&] { return metrics("killed").size() >= until; }));
      }
      usleep(static_cast<useconds_t>(any(until == 0 ? 900'000 : slow ? 400'000 : 40'000)));
      const bool ended = !process.running();
      process.signal(SIGKILL);
      const Finished end = process.wait();
      if (ended) {
        ASSERT_EQ(end.code, 0) << end.err;
        expect_same_run("killed", "whole", 40);
        fs::remove_all(folder_ / "killed");
        ++finished;
        continue;
      }
      ASSERT_EQ(end.code, 128 + SIGKILL) << end.err;
      ++killed;
      bool save = false, removal = false;
      for (const std::string& name : leftovers())
        if (!before.contains(name)) (name.starts_with(".saving-removed-") ? removal : save) = true;
      in_save += save, in_removal += removal, before_the_first_step += metrics("killed").size() <= steps;
      check_what_stands();
      if (HasFailure()) return;
    }
    finish();
    fmt::print("{} kills: {} inside a save, {} inside a removal, {} before the first new step; {} runs reached their end between them\n", killed, in_save, in_removal, before_the_first_step, finished);
    EXPECT_GE(in_save, saves);
  }

 private:
  // The last resumption is the uninterrupted run, and nothing is left of those before.
  void finish() {
    const Finished end = train("killed", sets_, /*resume=*/true);
    ASSERT_EQ(end.code, 0) << end.err;
    expect_same_run("killed", "whole", 40);
    EXPECT_EQ(entries(folder_ / "killed"), (std::vector<std::string>{"checkpoints", "config.toml", "metrics.jsonl", "starts.jsonl"}));
    EXPECT_EQ(entries(folder_ / "killed/checkpoints"), (std::vector<std::string>{"step-39", "step-40"}));
  }

  // Every checkpoint under its name is whole, none that was there is gone, and the metrics up to it are those of the uninterrupted run.
  void check_what_stands() {
    if (!fs::exists(folder_ / "killed/checkpoints")) return;
    for (const std::string& name : entries(folder_ / "killed/checkpoints"))
      if (!name.starts_with(".")) {
        EXPECT_NO_THROW(open_checkpoint(folder_ / "killed/checkpoints" / name)) << name;
      }
    const auto complete = list_checkpoints(folder_ / "killed/checkpoints");
    const int64_t step = complete.empty() ? 0 : open_checkpoint(complete.back()).state.step;
    const auto lines = metrics("killed");
    ASSERT_GE(static_cast<int64_t>(lines.size()), step);
    EXPECT_LE(static_cast<int64_t>(lines.size()), step + most_lines_ahead_) << "a save was lost";
    for (size_t i = 0; i < lines.size(); ++i) EXPECT_EQ(numbers(lines[i]).dump(), numbers(want_[i]).dump());
  }

  std::vector<nlohmann::json> want_;
  std::vector<std::string> sets_;
  int64_t most_lines_ahead_ = 1;
};

TEST_F(Kill, RunsGoOnAsIfNothingHadHappened) { kill_and_resume(5, 2, "disabled"); }
TEST_F(Kill, RunsThatSaveInTheBackgroundGoOnToo) { kill_and_resume(5, 2, "async"); }

TEST_F(Kill, AHundredTimes) {
  if (!std::getenv("TESSERA_TEST_ALL")) GTEST_SKIP() << "a long test: ./tessera test --all";
  kill_and_resume(100, 20, "disabled");
}

TEST_F(Kill, AHundredTimesInTheBackground) {
  if (!std::getenv("TESSERA_TEST_ALL")) GTEST_SKIP() << "a long test: ./tessera test --all";
  kill_and_resume(100, 20, "async");
}

}  // namespace
}  // namespace tessera
