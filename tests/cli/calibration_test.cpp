// A machine is calibrated once; then plan, bench and sweep predict.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <random>

#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

using nlohmann::json;

class CalibrationCommand : public TinyRunTest {
 protected:
  void SetUp() override {
    TinyRunTest::SetUp();
    put_file(folder_ / "sizes.toml", "[sweep]\nbase = \"tiny.toml\"\nseeds = [0, 1]\n[[axes]]\nkey = \"model.hidden_size\"\nvalues = [16, 32, 64, 128]\n");
  }
  Finished with_cache(const std::vector<std::string>& words) const {
    return run_tessera(folder_, words, [this] { setenv("XDG_CACHE_HOME", (folder_ / "cache").c_str(), 1); });
  }
};

TEST_F(CalibrationCommand, PlanBenchAndSweepPredictByIt) {
  const Finished before = with_cache({"plan", "tiny.toml", "--json"});
  EXPECT_FALSE(json::parse(before.out).contains("predicted"));
  const std::string match = "[sweep]\nbase = \"tiny.toml\"\nfolder = \"out\"\n[match]\nof = \"step_time\"\nbend = \"blocks.mlp.intermediate_size\"\ntolerance = 0.9\n[[axes]]\nkey = \"model.hybrid_override_pattern\"\nvalues = [\"MO\", \"O*O\"]\n";
  put_file(folder_ / "match.toml", match);
  const Finished unknown = with_cache({"sweep", "match.toml", "--dry-run"});
  EXPECT_EQ(unknown.code, 2);
  EXPECT_NE(unknown.err.find("step_time needs a calibration of this machine for 2 threads"), std::string::npos) << unknown.err;
  EXPECT_NE(unknown.err.find("bench --calibrate"), std::string::npos) << unknown.err;

  const Finished calibrated = with_cache({"bench", "--calibrate", "sizes.toml", "--steps", "2", "--no-check"});
  ASSERT_EQ(calibrated.code, 0) << calibrated.err;
  EXPECT_NE(calibrated.out.find("cache/tessera/calibration.json"), std::string::npos) << calibrated.out;
  EXPECT_NE(calibrated.out.find("4 configurations are predicted from it"), std::string::npos) << calibrated.out;

  const json planned = json::parse(with_cache({"plan", "tiny.toml", "--json"}).out).at("predicted");
  EXPECT_GT(planned.at("step_s"), 0);
  double sum = 0;
  for (const auto& [part, seconds] : planned.at("parts").items()) sum += seconds.get<double>();
  EXPECT_NEAR(sum, planned.at("step_s").get<double>(), 1e-9);
  EXPECT_NE(with_cache({"plan", "tiny.toml"}).out.find("predicted for this machine: "), std::string::npos);
  EXPECT_FALSE(json::parse(with_cache({"plan", "tiny.toml", "--json", "--set", "training.num_threads=1"}).out).contains("predicted"));
  const json measured = json::parse(with_cache({"bench", "tiny.toml", "--steps", "1", "--decode-tokens", "0", "--no-check", "--no-peaks", "--json"}).out);
  EXPECT_EQ(measured.at("predicted").at("step_s"), planned.at("step_s"));
  const Finished matched = with_cache({"sweep", "match.toml", "--dry-run"});
  EXPECT_EQ(matched.code, 0) << matched.err;
  EXPECT_NE(matched.out.find("step_time"), std::string::npos) << matched.out;
}

TEST_F(CalibrationCommand, RefusesWhatItCannotUse) {
  const auto refused = [&](const std::vector<std::string>& words, const std::string& text) {
    const Finished end = with_cache(words);
    EXPECT_EQ(end.code, 2) << text;
    EXPECT_NE(end.err.find(text), std::string::npos) << end.err;
  };
  refused({"plan", "tiny.toml", "--calibration", "none.json"}, "--calibration: there is no file none.json");
  put_file(folder_ / "wrong.json", "[{}]");
  refused({"plan", "tiny.toml", "--calibration", "wrong.json"}, "wrong.json: is no calibration");
  refused({"bench", "--calibrate", "sizes.toml", "--calibration", "wrong.json"}, "wrong.json: is no calibration");
  refused({"bench", "--calibrate", "tiny.toml"}, "1 configurations are too few");
  EXPECT_FALSE(std::filesystem::exists(folder_ / "cache"));
}

// Ten configurations drawn at random, measured in three rounds of turns.
TEST_F(CalibrationCommand, PredictsWhatWasNotMeasured) {
  if (!std::getenv("TESSERA_TEST_ALL")) GTEST_SKIP() << "minutes";
  const std::string configs = TESSERA_SOURCE_DIR "/configs/";
  ASSERT_EQ(with_cache({"bench", "--calibrate", configs + "sweeps/calibration.toml"}).code, 0);
  std::mt19937 random(2);
  const auto one_of = [&](const std::vector<int64_t>& values) { return values[random() % values.size()]; };
  struct Drawn {
    std::vector<std::string> words;
    std::string text;
    std::vector<double> seconds;
    double planned_s = 0, bytes = 0, planned_bytes = 0;
  };
  std::vector<Drawn> drawn(10);
  for (Drawn& d : drawn) {
    std::string pattern;
    for (int64_t layers = one_of({4, 6, 8, 10, 12, 16}); layers-- > 0;) pattern += "MMMEEOOL*"[random() % 9];
    const int64_t hidden = one_of({64, 96, 128, 160, 192, 256, 320, 384, 448, 512}), rows = one_of({1, 2, 4}), length = one_of({128, 256, 512, 1024}), vocabulary = one_of({256, 1024, 4096}), heads = one_of({2, 4, 8});
    std::vector<std::string> sets{"model.hybrid_override_pattern=" + pattern};
    const auto set = [&](const std::string& key, int64_t value) { sets.push_back(fmt::format("{}={}", key, value)); };
    set("model.hidden_size", hidden), set("model.vocab_size", vocabulary), set("training.local_batch_size", rows), set("training.seq_len", length);
    set("blocks.mamba2.num_heads", heads), set("blocks.mamba2.state_size", one_of({16, 32, 64, 128})), set("blocks.gqa.num_heads", heads), set("blocks.gqa.head_dim", one_of({16, 32, 64}));
    set("blocks.mlp.intermediate_size", hidden * one_of({2, 3, 4})), set("blocks.moe.num_experts", one_of({8, 16, 32})), set("blocks.moe.top_k", one_of({1, 2, 4}));
    set("blocks.moe.intermediate_size", one_of({64, 128, 256})), set("blocks.latent_moe.latent_size", hidden / 4), set("blocks.latent_moe.intermediate_size", one_of({64, 128, 256}));
    d.words = with_sets({"bench", configs + "debug_model.toml", "--json", "--no-check", "--no-peaks", "--decode-tokens", "0", "--steps", "7"}, sets);
    d.text = fmt::format("{:<16} | {} | {} | {} x {}", pattern, hidden, vocabulary, rows, length);
  }
  for (int round = 0; round < 3; ++round)
    for (Drawn& d : drawn) {
      const Finished end = with_cache(d.words);
      ASSERT_EQ(end.code, 0) << end.err;
      const json result = json::parse(end.out);
      d.seconds.push_back(result.at("train").at("step_s"));
      d.planned_s = result.at("predicted").at("step_s"), d.planned_bytes = result.at("predicted").at("peak_bytes");
      d.bytes = std::max(d.bytes, result.at("peak_bytes").get<double>());
    }
  fmt::print("| pattern | hidden | vocabulary | rows x tokens | step, ms | predicted | peak memory, MiB | predicted |\n|---|---|---|---|---|---|---|---|\n");
  for (Drawn& d : drawn) {
    std::sort(d.seconds.begin(), d.seconds.end());
    fmt::print("| {} | {:.1f} ({:.1f} to {:.1f}) | {:+.1f} % | {:.0f} | {:+.1f} % |\n", d.text, 1e3 * d.seconds[1], 1e3 * d.seconds[0], 1e3 * d.seconds[2], 100 * (d.planned_s / d.seconds[1] - 1), d.bytes / (1 << 20), 100 * (d.planned_bytes / d.bytes - 1));
    EXPECT_NEAR(d.planned_bytes / d.bytes, 1, 0.25) << d.text;
  }
}

}  // namespace
}  // namespace tessera
