// Sweeps as a user runs them: one table whatever interrupts them, and what goes wrong.
#include <gtest/gtest.h>

#include <random>

#include "tests/support/failing.hpp"
#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

class SweepCommand : public TinyRunTest {
 protected:
  static constexpr const char* kAxes = "[[axes]]\nkey = \"model.hybrid_override_pattern\"\nvalues = [\"M*\", \"E/E\"]\n[[axes]]\nkey = \"optimizer.lr\"\nvalues = [1e-3, 1e-2]\n";
  static constexpr const char* kTwo = "[[axes]]\nkey = \"optimizer.lr\"\nvalues = [1e-3, 1e-2]\n";
  void write_sweep(const std::string& folder, const std::string& more = kAxes, const std::string& own = "") const {
    put_file(folder_ / "s.toml", fmt::format("[sweep]\nbase = \"tiny.toml\"\nfolder = \"{}\"\n{}[set]\ntraining.steps = 5\ntraining.num_threads = 1\ncheckpoint.interval = 2\n{}", folder, own, more));
  }
  Finished sweep(std::vector<std::string> more = {}, const std::function<void()>& prepare = {}) const {
    more.insert(more.begin(), {"sweep", "s.toml"});
    return run_tessera(folder_, more, prepare);
  }
  std::string results(const std::string& folder) const { return file_text(folder_ / folder / "results.csv"); }
  std::vector<fs::path> trials(const std::string& folder) const {
    std::vector<fs::path> out;
    for (const auto& entry : fs::directory_iterator(folder_ / folder / "trials")) out.push_back(entry.path());
    std::sort(out.begin(), out.end());
    return out;
  }
  static std::string state(const fs::path& trial) { return nlohmann::json::parse(file_text(trial / "trial.json"))["state"].get<std::string>(); }
};

TEST_F(SweepCommand, RunsWhatIsMissingAndNothingTwice) {
  write_sweep("out");
  const Finished listed = sweep({"--dry-run"});
  EXPECT_EQ(listed.code, 0) << listed.err;
  EXPECT_EQ(std::count(listed.out.begin(), listed.out.end(), '\n'), 4);
  EXPECT_FALSE(fs::exists(folder_ / "out"));
  const Finished first = sweep();
  ASSERT_EQ(first.code, 0) << first.err;
  const std::string table = results("out");
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 5);
  EXPECT_NE(first.out.find("hybrid_override_pattern"), std::string::npos) << first.out;
  for (const fs::path& trial : trials("out")) EXPECT_EQ(state(trial), "done");
  const auto written = fs::last_write_time(trials("out")[0] / "metrics.jsonl");
  const Finished again = sweep();
  EXPECT_EQ(again.code, 0);
  EXPECT_NE(again.err.find("4 trials, 4 of them ended before"), std::string::npos) << again.err;
  EXPECT_EQ(fs::last_write_time(trials("out")[0] / "metrics.jsonl"), written);
  EXPECT_EQ(results("out"), table);
  // An edited sweep adds, and keeps the rest.
  std::string longer = kAxes;
  longer.replace(longer.find("1e-2"), 4, "1e-2, 3e-3");
  write_sweep("out", longer);
  const Finished more = sweep();
  EXPECT_EQ(more.code, 0) << more.err;
  EXPECT_NE(more.err.find("6 trials, 4 of them ended before"), std::string::npos) << more.err;
  EXPECT_EQ(fs::last_write_time(trials("out")[0] / "metrics.jsonl"), written);
  // A trial's folder is a run as any other.
  EXPECT_EQ(tessera({"eval", trials("out")[0].lexically_relative(folder_).string()}).code, 0);
}

TEST_F(SweepCommand, KilledAndStartedAgainGivesTheSameTable) {
  write_sweep("whole");
  ASSERT_EQ(sweep().code, 0);
  write_sweep("killed", kAxes, "at_once = 2\n");
  std::mt19937 random(7);
  const int times = std::getenv("TESSERA_TEST_ALL") ? 20 : 3;
  int killed = 0;
  for (int i = 0; i < times; ++i) {
    Process process(folder_, {"sweep", "s.toml"});
    const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(200 + random() % 600);
    process.wait_until([&] { return std::chrono::steady_clock::now() > until || !process.running(); });
    if (!process.running()) break;
    const int signal = i % 3 == 2 ? SIGINT : SIGKILL;
    process.signal(signal);
    const Finished end = process.wait();
    ++killed;
    EXPECT_EQ(end.code, signal == SIGINT ? 130 : 137) << end.err;
  }
  EXPECT_GT(killed, 1);
  const Finished end = sweep();
  ASSERT_EQ(end.code, 0) << end.err;
  EXPECT_EQ(results("killed"), results("whole"));
  for (const fs::path& trial : trials("whole"))
    for (const char* name : {"model.safetensors", "optimizer.safetensors"})
      EXPECT_TRUE(file_text(folder_ / "killed/trials" / trial.filename() / "checkpoints/step-5" / name) == file_text(trial / "checkpoints/step-5" / name)) << trial;
}

TEST_F(SweepCommand, FailedTrialsAreKeptWithTheirErrorAndCanBeRetried) {
  // Three heads do not divide into two kv heads' groups, and a plugin is missing for one trial.
  write_sweep("out", "[[axes]]\nkey = \"plugins.paths\"\nvalues = [[], [\"missing.so\"]]\n[[axes]]\nkey = \"blocks.gqa.num_heads\"\nvalues = [2, 3]\n", "");
  const Finished end = sweep({}, [] { setenv("OMP_NUM_THREADS", "1", 1); });
  EXPECT_EQ(end.code, 4) << end.err;
  EXPECT_NE(end.err.find("of 4 trials failed; their errors are in out/results.csv\nhelp: --retry runs them again\n"), std::string::npos) << end.err;
  EXPECT_NE(results("out").find("missing.so"), std::string::npos) << results("out");
  // A run that fails by itself is tried again when asked only.
  write_sweep("bad", "[[axes]]\nkey = \"data.path\"\nvalues = [\"text/*.txt\", \"later/*.txt\"]\n", "");
  EXPECT_EQ(sweep().code, 4);
  EXPECT_NE(results("bad").find("failed"), std::string::npos);
  fs::copy(folder_ / "text", folder_ / "later", fs::copy_options::recursive);
  EXPECT_EQ(sweep().code, 4) << "kept";
  const Finished retried = sweep({"--retry"});
  EXPECT_EQ(retried.code, 0) << retried.err;
  EXPECT_EQ(results("bad").find("failed"), std::string::npos) << results("bad");
}

TEST_F(SweepCommand, MistakesAreToldBeforeAnythingRuns) {
  write_sweep("out", "[[axes]]\nkey = \"optimizer.rate\"\nvalues = [1, 2]\n");
  const Finished unknown = sweep();
  EXPECT_EQ(unknown.code, 2);
  EXPECT_NE(unknown.err.find("optimizer.rate: unknown key"), std::string::npos) << unknown.err;
  EXPECT_FALSE(fs::exists(folder_ / "out"));
  write_sweep("out", "[[axes]]\nkey = \"optimizer.lr\"\nrange = { from = 1, to = 1000, step = 1 }\n[[axes]]\nkey = \"training.max_norm\"\nrange = { from = 1, to = 1000, step = 1 }\n", "");
  const Finished many = sweep({"--yes"});
  EXPECT_EQ(many.code, 2);
  EXPECT_EQ(many.err, "s.toml: error: the axes make 1000000 trials, at most 100000\nhelp: take values out of an axis\n");
  write_sweep("out", "[[axes]]\nkey = \"optimizer.lr\"\nrange = { from = 1, to = 1001, step = 1 }\n", "");
  EXPECT_EQ(sweep().err, "s.toml: error: the axes make 1001 trials\nhelp: --yes if that is meant; --dry-run lists them\n");
  EXPECT_EQ(sweep({"--trial", "none", "--yes"}).code, 2);
  put_file(folder_ / "s.toml", "[sweep]\nbase = \"none.toml\"\n");
  EXPECT_EQ(sweep().err, "none.toml: error: the configuration file cannot be opened\n");
}

TEST_F(SweepCommand, IsOneProcessAFolderAndReadsItsFileOnce) {
  write_sweep("out");
  Process process(folder_, {"sweep", "s.toml"});
  ASSERT_TRUE(process.wait_until([&] { return fs::exists(folder_ / "out/trials") && !fs::is_empty(folder_ / "out/trials"); }));
  const Finished second = sweep();
  EXPECT_EQ(second.code, 4);
  EXPECT_EQ(second.err, "error: out: another process runs this sweep\nhelp: wait until it ends, or choose another [sweep] folder\n");
  put_file(folder_ / "s.toml", "[sweep]\nbase = \"tiny.toml\"\nfolder = \"out\"\n[[axes]\n");  // edited, and half written
  const Finished end = process.wait();
  EXPECT_EQ(end.code, 0) << end.err;
  const std::string table = results("out");
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 5);
}

TEST_F(SweepCommand, HalvingStopsTheWorst) {
  write_sweep("out", "[halving]\nrungs = [2, 4]\nkeep = 0.5\n[[axes]]\nkey = \"optimizer.lr\"\nvalues = [1e-5, 1e-4, 1e-3, 1e-2]\n", "");
  const Finished end = sweep();
  ASSERT_EQ(end.code, 0) << end.err;
  std::map<std::string, int> states;
  for (const fs::path& trial : trials("out")) ++states[state(trial)];
  EXPECT_EQ(states, (std::map<std::string, int>{{"done", 1}, {"stopped", 3}}));
  const std::string table = results("out");
  EXPECT_NE(table.find(" of 4 by val_loss at step 2"), std::string::npos) << table;
  EXPECT_NE(table.find("number 2 of 2 by val_loss at step 4"), std::string::npos) << table;
  for (const fs::path& trial : trials("out")) {
    const size_t steps = metrics_of(trial).size();
    EXPECT_TRUE(state(trial) == "done" ? steps == 5 : steps == 2 || steps == 4) << trial << " " << steps;
  }
}

TEST_F(SweepCommand, ATrialThatDivergesEnds) {
  write_sweep("out", "[[axes]]\nkey = \"optimizer.lr\"\nvalues = [1e-3, 1e4]\n", "stop_above = 3.0\n");
  const Finished end = sweep();
  ASSERT_EQ(end.code, 0) << end.err;
  std::map<std::string, int> states;
  for (const fs::path& trial : trials("out")) ++states[state(trial)];
  EXPECT_EQ(states, (std::map<std::string, int>{{"done", 1}, {"diverged", 1}})) << results("out");
}

TEST_F(SweepCommand, ATrialMayBeSeveralProcesses) {
  write_sweep("out", "[[axes]]\nkey = \"parallelism.tensor_parallel_degree\"\nvalues = [1, 2]\n[[axes]]\nkey = \"optimizer.lr\"\nvalues = [1e-3]\n", "ranks = 2\n");
  put_file(folder_ / "tiny.toml", std::string(kTinyRun) + "\n");
  const Finished end = sweep();
  ASSERT_EQ(end.code, 0) << end.err << results("out");
  for (const fs::path& trial : trials("out")) EXPECT_TRUE(metrics("out/trials/" + trial.filename().string())[0].contains("slowest_rank"));
}

TEST_F(SweepCommand, AnotherMachineIsMarked) {
  write_sweep("out", kTwo);
  ASSERT_EQ(sweep().code, 0);
  const fs::path file = trials("out")[0] / "trial.json";
  auto changed = nlohmann::json::parse(file_text(file));
  changed["machine"] = "another, 64 cores, tessera 0.0.1";
  put_file(file, changed.dump());
  const Finished end = sweep();
  EXPECT_NE(end.out.find("trials ran on different machines or versions:\n"), std::string::npos) << end.out;
  EXPECT_NE(end.out.find("  1 trials: another, 64 cores, tessera 0.0.1\n"), std::string::npos) << end.out;
}

TEST_F(SweepCommand, AFullDiskEndsItAndItGoesOn) {
  write_sweep("whole", kTwo);
  ASSERT_EQ(sweep().code, 0);
  write_sweep("out", kTwo);
  const int64_t stride = std::getenv("TESSERA_TEST_ALL") ? 3 : 1000;
  int64_t failures = 0;
  for (int64_t at = 4; at < 1000; at += stride) {
    const Finished end = sweep({}, failing({.below = (folder_ / "out").string(), .at = at, .error = ENOSPC, .stays = true}));
    if (end.code == 0) break;
    ++failures;
    // Either the sweep's own file, or those of all its trials.
    const std::string told = fs::exists(folder_ / "out/results.csv") ? results("out") : "";
    EXPECT_EQ(end.code, 4) << end.err;
    EXPECT_TRUE((end.err + told).find("No space left on device") != std::string::npos) << end.err << told;
    fs::remove_all(folder_ / "out");
  }
  EXPECT_GT(failures, 0);
  const Finished end = sweep({"--retry"});
  ASSERT_EQ(end.code, 0) << end.err;
  EXPECT_EQ(results("out"), results("whole"));
}

// Every pattern gets the base's parameters; one that cannot is refused.
TEST_F(SweepCommand, TrialsAreMatched) {
  write_sweep("out", "[match]\nof = \"params\"\nbend = { key = \"blocks.mlp.intermediate_size\" }\n[[axes]]\npatterns = [\"ME/E\", \"EE/E\", \"M/M\"]\n", "lr_rule = \"inverse_width\"\nlr_width = 64\n");
  const Finished end = sweep();
  EXPECT_EQ(end.code, 4) << end.err;
  EXPECT_NE(end.err.find("1 of 3 trials failed"), std::string::npos) << end.err;
  std::vector<double> params;
  const nlohmann::json plan = nlohmann::json::parse(tessera({"plan", "tiny.toml", "--json"}).out);
  const double target = plan["totals"]["trained"].get<double>();
  for (const fs::path& trial : trials("out")) {
    const auto told = nlohmann::json::parse(file_text(trial / "trial.json"));
    if (told["state"] != "done") continue;
    const auto own = nlohmann::json::parse(tessera({"plan", (trial / "config.toml").string(), "--json"}).out);
    params.push_back(own["totals"]["trained"].get<double>());
    EXPECT_NEAR(params.back(), target, 0.01 * target) << trial;
    EXPECT_NEAR(told["match"]["error"].get<double>(), params.back() / target - 1, 1e-9);
    EXPECT_EQ(told["fitted"]["optimizer.lr"], "0.02") << "1e-2 is meant for 64, the model has 32";
  }
  EXPECT_EQ(params.size(), 2u);
}

// Trials that are done, were stopped, diverged, and failed before they had a configuration of their own.
TEST_F(SweepCommand, AReportTellsOfEveryTrial) {
  write_sweep("out",
              "[match]\nof = \"params\"\nbend = { key = \"blocks.mlp.intermediate_size\" }\n[halving]\nrungs = [2]\nkeep = 0.5\n"
              "[[axes]]\npatterns = [\"ME/E\", \"M/M\"]\n[[axes]]\nkey = \"optimizer.lr\"\nvalues = [1e-2, 1e4]\n",
              "seeds = [0, 1]\nlr_rule = \"inverse_width\"\nlr_width = 64\nstop_above = 3.0\n");
  EXPECT_EQ(sweep().code, 4);
  ASSERT_EQ(tessera({"report", "out"}).code, 0);
  const std::string page = file_text(folder_ / "out/report.html"), table = file_text(folder_ / "out/report.csv"), text = file_text(folder_ / "out/report.md");

  EXPECT_NE(text.find("\n| model.hybrid\\_override\\_pattern | optimizer.lr | runs | validation loss |"), std::string::npos) << text;
  for (const char* row : {"| ME/E | 0.02 | 1 done, 1 stopped |", "| ME/E | 20000.0 | 2 diverged |", "| M/M | 0.01 | 2 failed |", "| M/M | 10000.0 | 2 failed |"}) EXPECT_NE(text.find(row), std::string::npos) << row << text;
  EXPECT_EQ(table.find("batch_size"), std::string::npos) << "keys in which no two runs differ: " << table;
  EXPECT_EQ(table.substr(0, 47), "group,run,folder,state,seed,model.hybrid_overri");
  EXPECT_NE(table.find(",match,match_error,fitted,version,"), std::string::npos) << table;

  std::map<std::string, int> states;
  for (const fs::path& trial : trials("out")) {
    const auto told = nlohmann::json::parse(file_text(trial / "trial.json"));
    const std::string name = told["name"], state = told["state"], match = told["match"]["text"];
    ++states[state];
    const size_t begin = table.find("," + name + ",out/trials/" + name + "," + state + "," + told["seed"].dump() + ",");
    ASSERT_NE(begin, std::string::npos) << name << table;
    EXPECT_NE(table.find(match, begin), std::string::npos) << match << table;
    EXPECT_NE(page.find("\"match\":" + nlohmann::json(match).dump()), std::string::npos) << match;
    EXPECT_NE(page.find("\"state\":\"" + state + "\""), std::string::npos);
    if (state == "failed") continue;
    const std::string fitted = fmt::format("blocks.mlp.intermediate_size = {}, optimizer.lr = {}", told["fitted"]["blocks.mlp.intermediate_size"].get<std::string>(), told["fitted"]["optimizer.lr"].get<std::string>());
    for (const std::string* file : {&page, &table}) EXPECT_NE(file->find(fitted), std::string::npos) << fitted;
  }
  EXPECT_EQ(states, (std::map<std::string, int>{{"diverged", 2}, {"done", 1}, {"failed", 4}, {"stopped", 1}}));
  for (const char* why : {"number 2 of 2 by val_loss at step 2", "the loss is ", "comes no nearer than params "}) {
    for (const std::string* file : {&page, &table}) EXPECT_NE(file->find(why), std::string::npos) << why;
    std::string escaped;
    for (const char* c = why; *c; ++c) escaped += *c == '_' ? std::string("\\_") : std::string(1, *c);
    EXPECT_NE(text.find(escaped, text.find("## Runs that are not done")), std::string::npos) << why << text;
  }
  const size_t fitted = text.find("\n## What was fitted\n");
  ASSERT_NE(fitted, std::string::npos);
  EXPECT_NE(text.find("optimizer.lr = 20000.0 |", fitted), std::string::npos) << text;
}

TEST_F(SweepCommand, WritesAJobArray) {
  write_sweep("out", kTwo);
  const Finished shown = sweep({"--launcher", "slurm", "--dry-run"});
  EXPECT_EQ(shown.code, 0) << shown.err;
  for (const char* line : {"#SBATCH --array=0-1%1\n", "#SBATCH --ntasks=1\n", "--launcher slurm --trial "}) EXPECT_NE(shown.out.find(line), std::string::npos) << shown.out;
  // An sbatch that runs the array's tasks one after the other.
  put_file(folder_ / "bin/sbatch", "#!/bin/sh\nfor i in 0 1; do SLURM_ARRAY_TASK_ID=$i sh \"$1\" || exit 1; done\n");
  fs::permissions(folder_ / "bin/sbatch", fs::perms::owner_all);
  const std::string path = (folder_ / "bin").string() + ":" + std::getenv("PATH");
  const Finished run = sweep({"--launcher", "slurm"}, [&] { setenv("PATH", path.c_str(), 1); });
  ASSERT_EQ(run.code, 0) << run.err;
  for (const fs::path& trial : trials("out")) EXPECT_EQ(state(trial), "done");
  EXPECT_EQ(sweep().code, 0);
  const Finished none = sweep({"--launcher", "slurm"}, [] { setenv("PATH", "/nowhere", 1); });
  EXPECT_EQ(none.code, 4);
  EXPECT_NE(none.err.find("there is no sbatch here"), std::string::npos) << none.err;
}

}  // namespace
}  // namespace tessera
