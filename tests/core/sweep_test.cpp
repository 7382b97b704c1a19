// What a sweep's file makes: trials, their names, and errors.
#include "sweep/sweep.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "sweep/trial_state.hpp"
#include "tests/support/folder.hpp"

namespace tessera {
namespace {

class SweepFile : public FolderTest {
 protected:
  void SetUp() override {
    FolderTest::SetUp();
    put_file(folder_ / "base.toml", "[model]\nhybrid_override_pattern = \"M\"\nhidden_size = 32 # wide\n[training]\nsteps = 3\nseed = 4\n");
  }
  Sweep sweep(const std::string& text) const {
    put_file(folder_ / "s.toml", "[sweep]\nbase = \"base.toml\"\n" + text);
    return read_sweep(folder_ / "s.toml");
  }
  std::vector<Trial> trials(const std::string& text) const { return make_trials(sweep(text)); }
  // "a=1 b=2" by trial.
  std::vector<std::string> points(const std::string& text) const {
    std::vector<std::string> out;
    for (const Trial& trial : trials(text)) {
      std::vector<std::string> sets;
      for (const Setting& set : trial.settings) sets.push_back(set.text());
      if (trial.seeded) sets.push_back(fmt::format("seed={}", trial.seed));
      out.push_back(fmt::format("{}", fmt::join(sets, " ")));
    }
    return out;
  }
  std::string error(const std::string& text) const {
    try {
      trials(text);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
      std::string what = error.what();
      for (size_t at; (at = what.find(folder_.string() + "/")) != std::string::npos;) what.erase(at, folder_.string().size() + 1);
      return what;
    }
    return "none";
  }
};

using Texts = std::vector<std::string>;

TEST_F(SweepFile, AxesMultiplyInOrderSeedsInnermost) {
  EXPECT_EQ(points("seeds = [7, 8]\n[[axes]]\nkey = \"a.x\"\nvalues = [1, 2]\n[[axes]]\nkey = \"b.y\"\nvalues = [\"p\", \"q r\"]\n"),
            (Texts{"a.x=1 b.y=\"p\" seed=7", "a.x=1 b.y=\"p\" seed=8", "a.x=1 b.y=\"q r\" seed=7", "a.x=1 b.y=\"q r\" seed=8", "a.x=2 b.y=\"p\" seed=7", "a.x=2 b.y=\"p\" seed=8", "a.x=2 b.y=\"q r\" seed=7",
                   "a.x=2 b.y=\"q r\" seed=8"}));
  EXPECT_EQ(points(""), Texts{""}) << "the base alone";
}

TEST_F(SweepFile, ValuesAreOfEveryKind) {
  EXPECT_EQ(points("[[axes]]\nkey = \"a.x\"\nvalues = [true, false]\n"), (Texts{"a.x=true", "a.x=false"}));
  EXPECT_EQ(points("[[axes]]\nkey = \"a.x\"\nvalues = [1, 2.5, \"auto\", [1, 2], []]\n"), (Texts{"a.x=1", "a.x=2.5", "a.x=\"auto\"", "a.x=[1, 2]", "a.x=[]"}));
}

TEST_F(SweepFile, RangesAreExact) {
  EXPECT_EQ(points("[[axes]]\nkey = \"a.x\"\nrange = { from = 64, to = 200, step = 64 }\n"), (Texts{"a.x=64", "a.x=128", "a.x=192"}));
  EXPECT_EQ(points("[[axes]]\nkey = \"a.x\"\nrange = { from = 0.1, to = 0.3, step = 0.1 }\n"), (Texts{"a.x=0.1", "a.x=0.2", "a.x=0.3"}));
  EXPECT_EQ(points("[[axes]]\nkey = \"a.x\"\nrange = { from = 3, to = 1, step = -1 }\n"), (Texts{"a.x=3", "a.x=2", "a.x=1"}));
  EXPECT_EQ(points("[[axes]]\nkey = \"a.x\"\nlog_range = { from = 1e-4, to = 1e-2, count = 3 }\n"), (Texts{"a.x=0.0001", "a.x=0.001", "a.x=0.01"}));
}

TEST_F(SweepFile, ZippedKeysGoTogether) {
  EXPECT_EQ(points("[[axes]]\nzip = { \"a.x\" = [1, 2], \"b.y\" = [0.5, 0.25] }\n"), (Texts{"a.x=1 b.y=0.5", "a.x=2 b.y=0.25"}));
}

TEST_F(SweepFile, PatternsAreAnAxis) {
  EXPECT_EQ(points("[[axes]]\npatterns = [\"M*\", { ratio = { M = 3, \"*\" = 1 }, layers = 4 }]\n[[axes]]\nkey = \"a.x\"\nvalues = [1, 2]\nwhen = { \"model.hybrid_override_pattern\" = \"M*\" }\n"),
            (Texts{"model.hybrid_override_pattern=\"M*\" a.x=1", "model.hybrid_override_pattern=\"M*\" a.x=2", "model.hybrid_override_pattern=\"MM*M\""}));
  EXPECT_EQ(points("[[axes]]\npatterns = [{ list = [\"M-\"], dialect = \"nemotron\" }, \"ME\"]\n"),
            (Texts{"model.hybrid_override_pattern=\"M-\" model.dialect=\"nemotron\"", "model.hybrid_override_pattern=\"ME\""}));
  EXPECT_NE(error("[[axes]]\npatterns = [\"M||\"]\n").find("s.toml:4:13: error: axes[0].patterns"), std::string::npos) << error("[[axes]]\npatterns = [\"M||\"]\n");
}

TEST_F(SweepFile, AnAxisMayHangOnAnEarlierOne) {
  EXPECT_EQ(points("[[axes]]\nkey = \"a.x\"\nvalues = [1, 2, 3]\n[[axes]]\nkey = \"b.y\"\nvalues = [\"p\", \"q\"]\nwhen = { \"a.x\" = [1, 3] }\n"),
            (Texts{"a.x=1 b.y=\"p\"", "a.x=1 b.y=\"q\"", "a.x=2", "a.x=3 b.y=\"p\"", "a.x=3 b.y=\"q\""}));
}

TEST_F(SweepFile, NamesFollowContentAlone) {
  const std::string axis = "[[axes]]\nkey = \"model.hidden_size\"\nvalues = [32, 64]\n";
  const auto names = [&](const std::string& text) {
    Texts out;
    for (const Trial& trial : trials(text)) out.push_back(trial.name);
    return out;
  };
  const Texts first = names("seeds = [0, 1]\n" + axis);
  EXPECT_EQ(first.size(), 4u);
  EXPECT_TRUE(first[0].starts_with("hidden_size32-s0-")) << first[0];
  // More seeds, more values, other folders and more at once: the same trials keep their names.
  const Texts more = names("folder = \"else\"\nat_once = 3\nseeds = [2, 0, 1]\n[[axes]]\nkey = \"model.hidden_size\"\nvalues = [16, 32, 64]\n");
  for (const std::string& name : first) EXPECT_NE(std::find(more.begin(), more.end(), name), more.end()) << name;
  put_file(folder_ / "base.toml", "# said otherwise\n[training]\nseed = 4\nsteps = 3\n[model]\nhidden_size = 32\nhybrid_override_pattern = 'M'\n[run]\nname = \"x\"\n");
  EXPECT_EQ(names("seeds = [0, 1]\n" + axis), first);
  // What changes the configuration changes the trial.
  EXPECT_NE(names("seeds = [0, 1]\n[set]\n\"training.steps\" = 4\n" + axis), first);
  EXPECT_NE(names("seeds = [0, 1]\nranks = 2\n" + axis), first);
  put_file(folder_ / "base.toml", "[model]\nhybrid_override_pattern = \"MM\"\nhidden_size = 32\n[training]\nsteps = 3\nseed = 4\n");
  for (const std::string& name : names("seeds = [0, 1]\n" + axis)) EXPECT_EQ(std::find(first.begin(), first.end(), name), first.end());
}

TEST_F(SweepFile, ATrialSetsAllThatItSays) {
  const Sweep s = sweep("folder = \"out\"\nseeds = [5]\n[set]\ntraining.steps = 7\n\"optimizer.lr\" = 0.1\n[[axes]]\nkey = \"a.x\"\nvalues = [1]\n");
  const Trial trial = make_trials(s)[0];
  EXPECT_EQ(trial.sets(s), (Texts{"optimizer.lr=0.1", "training.steps=7", "a.x=1", "training.seed=5", "run.name=\"" + trial.name + "\"", "run.folder=\"out/trials/" + trial.name + "\""}));
}

TEST_F(SweepFile, EveryMistakeIsTold) {
  EXPECT_EQ(error("[[axes]]\nkey = \"a.x\"\nvalues = []\n"), "s.toml:5:10: error: axes[0].values: is empty: the sweep would have no trials\nhelp: remove the axis, or name a value");
  EXPECT_EQ(error("[[axes]]\nkey = \"a.x\"\n"), "s.toml:3:1: error: axes[0]: says no values\nhelp: values = [...], range = { from, to, step }, log_range = { from, to, count }, zip = { key = [...], ... }, or patterns = [...]");
  EXPECT_EQ(error("[[axes]]\nkey = \"a.x\"\nvalues = [1]\nrange = { from = 1, to = 2, step = 1 }\n"), "s.toml:5:1: error: axes[0]: has both range and values\nhelp: one axis, one form");
  EXPECT_EQ(error("[[axes]]\nkey = \"a.x\"\nrange = { from = 1, to = 9, step = -1 }\n"), "s.toml:5:9: error: axes[0].range: never gets from 1 to 9 in steps of -1");
  EXPECT_EQ(error("[[axes]]\nkey = \"a.x\"\nrange = { from = 0, to = 1, step = 1e-9 }\n"), "s.toml:5:9: error: axes[0].range: has 1000000001 values, at most 100000");
  EXPECT_EQ(error("[[axes]]\nkey = \"a.x\"\nlog_range = { from = 0, to = 1, count = 3 }\n"), "s.toml:5:13: error: axes[0].log_range: from and to must be above 0, got 0 and 1");
  EXPECT_EQ(error("[[axes]]\nzip = { \"a.x\" = [1, 2], \"b.y\" = [1] }\n"), "s.toml:4:33: error: axes[0].zip.\"b.y\": has 1 values, 'a.x' has 2\nhelp: keys that go together have as many values each");
  EXPECT_EQ(error("[[axes]]\nkey = \"a.x\"\nvalues = [1]\nwhen = { \"b.y\" = 1 }\n"), "s.toml:6:10: error: axes[0].when.\"b.y\": is no key of an earlier axis\nhelp: a condition looks at what an axis before this one sets");
  EXPECT_EQ(error("[[axes]]\nkey = \"a.x\"\nvalues = [1, 1]\n").substr(0, 64), "s.toml: error: two points of the sweep are the same trial, x1-" + error("[[axes]]\nkey = \"a.x\"\nvalues = [1, 1]\n").substr(62, 2));
  EXPECT_EQ(error("[[axes]]\nkey = \"a.x\"\nvalues = [1]\n[[axes]]\nkey = \"a.x\"\nvalues = [2]\n"), "s.toml:6:1: error: a.x: is set by an axis and by an axis\nhelp: a key is set once");
  EXPECT_EQ(error("seeds = [1]\n[[axes]]\nkey = \"training.seed\"\nvalues = [1]\n"), "s.toml:4:1: error: training.seed: is set by [sweep] seeds\nhelp: remove one of the two");
  EXPECT_EQ(error("[[axes]]\nkey = \"run.folder\"\nvalues = [\"a\"]\n"), "s.toml:3:1: error: run.folder: is the sweep's own\nhelp: remove it: each trial has a folder below [sweep] folder");
  EXPECT_EQ(error("[axis]\n"), "s.toml:3:2: error: axis: unknown table\nhelp: did you mean 'axes'? tables: sweep, set, axes, match, halving");
  EXPECT_EQ(error("seed = 3\n"), "s.toml:3:1: error: sweep.seed: unknown key\nhelp: did you mean 'seeds'? keys: base, folder, seeds, at_once, ranks, lr_rule, lr_width, stop_above");
  EXPECT_EQ(error("[halving]\nrungs = [4, 4]\n"), "s.toml:3:1: error: halving.rungs: must rise");
}

TEST_F(SweepFile, AStateIsReadAsWritten) {
  const Trial trial{.name = "x", .settings = {{"a.b", "\"c\""}}, .seed = 3, .seeded = true};
  EXPECT_EQ(read_trial_state(folder_ / "x").state, "new");
  write_trial_state(folder_ / "x", trial, {.state = "failed", .error = "error: \"\xff\"\nhelp: no", .machine = "m"});
  const TrialState read = read_trial_state(folder_ / "x");
  EXPECT_EQ(read.state, "failed");
  EXPECT_TRUE(read.error.starts_with("error: ")) << read.error;
  put_file(folder_ / "y/trial.json", "{\"error\": 3}");
  EXPECT_THROW(read_trial_state(folder_ / "y"), Error);
}

TEST_F(SweepFile, MetricsAreReadLineByLine) {
  put_file(folder_ / "metrics.jsonl", "{\"step\": 1, \"loss\": 2.0, \"val_loss\": 3.0}\n{\"step\": 2, \"loss\": 4.5}\n{\"step\": 3, \"loss\": null}\n{\"step\": 4, \"lo");
  EXPECT_EQ(last_metrics(folder_)["step"], 3);
  EXPECT_EQ(last_metrics(folder_)["val_loss"], 3.0);
  EXPECT_TRUE(last_metrics(folder_)["loss"].is_null());
  EXPECT_EQ(diverged_at(folder_, 2), 2);
  EXPECT_EQ(diverged_at(folder_, 3), 3) << "no number at all";
  EXPECT_EQ(diverged_at(folder_ / "none", 3), 0);
}

}  // namespace
}  // namespace tessera
