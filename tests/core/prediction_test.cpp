// Predictions of time and memory: what is fitted is what made the samples, and what is not known is said.
#include "measure/prediction.hpp"

#include <gtest/gtest.h>

#include <random>

#include "measure/calibrate.hpp"
#include "metrics/machine.hpp"
#include "tests/support/folder.hpp"
#include "tests/support/model.hpp"
#include "train/setup.hpp"

namespace tessera {
namespace {

template <class F>
void expect_refused(F run, const std::string& words) {
  try {
    run();
    ADD_FAILURE() << "was not refused: " << words;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
  }
}

TEST(FitRates, FindsTheRatesThatMadeTheSamples) {
  std::mt19937 random(1);
  std::uniform_real_distribution<double> uniform(1, 100);
  std::vector<Sample> samples;
  for (int i = 0; i < 12; ++i) {
    const double a = uniform(random), b = 1e9 * uniform(random), c = uniform(random);
    samples.push_back({.work = {a, b, c, 0}, .value = 2e-3 * a + 5e-12 * b, .weight = 1});
  }
  const auto rates = fit_rates(samples);
  EXPECT_NEAR(rates[0], 2e-3, 1e-9);
  EXPECT_NEAR(rates[1], 5e-12, 1e-18);
  EXPECT_NEAR(rates[2], 0, 1e-9);
  EXPECT_EQ(rates[3], 0);
}

// Without the bound the second rate would be -1.
TEST(FitRates, HasNoNegativeRate) {
  const std::vector<Sample> samples{{.work = {1, 0}, .value = 3}, {.work = {1, 1}, .value = 2}, {.work = {1, 2}, .value = 1}};
  const auto rates = fit_rates(samples);
  EXPECT_EQ(rates[1], 0);
  EXPECT_NEAR(rates[0], 2, 1e-12);
}

// The smaller a sample's weight, the less it counts.
TEST(FitRates, Weighs) {
  const auto rates = fit_rates({{.work = {1}, .value = 1, .weight = 1}, {.work = {1}, .value = 10, .weight = 1e-6}});
  EXPECT_NEAR(rates[0], 1, 1e-9);
}

class PredictionTest : public FolderTest {
 protected:
  static Config config(const std::vector<std::string>& sets = {}) {
    return load_config(std::string(TESSERA_SOURCE_DIR) + "/configs/debug_model.toml", sets, plugins());
  }
  // As if every unit of work took so long, forward and twice that backward.
  static BenchResult measured(const Config& config, const Work& rates) {
    BenchResult out{.config = "made", .dtype = "float32", .device = "cpu", .peak_bytes = 1 << 28};
    for (const PartWork& part : step_work(make_plan(config), config)) {
      double s = 0;
      for (size_t term = 0; term < kNumTerms; ++term) s += rates[term] * part.work[term];
      if (part.part != "rest") out.parts.push_back({.name = part.part, .forward_s = s, .backward_s = part.part == "optimizer" ? 0 : 2 * s});
      out.train_step_s += s * (part.part == "rest" || part.part == "optimizer" ? 1 : 3);
    }
    return out;
  }
  static std::vector<Config> sizes() {
    std::vector<Config> out;
    for (int i = 1; i <= 9; ++i)
      out.push_back(config({fmt::format("model.hidden_size={}", 32 * i), fmt::format("training.seq_len={}", 64 * (1 + i % 4)), fmt::format("training.local_batch_size={}", 1 + i * i % 5), fmt::format("blocks.mlp.intermediate_size={}", 64 * (1 + i * i % 7)),
                            fmt::format("blocks.moe.intermediate_size={}", 32 * (1 + i * i % 5)), fmt::format("blocks.mamba2.state_size={}", 16 * (1 + i % 3)), fmt::format("blocks.gqa.head_dim={}", 16 * (1 + i % 2)), fmt::format("model.vocab_size={}", 256 * (1 + i % 3))}));
    return out;
  }
  static Calibration made() {
    const std::vector<Config> configs = sizes();
    std::vector<BenchResult> results;
    for (const Config& c : configs) results.push_back(measured(c, kRates));
    return calibrate(configs, results);
  }
  static constexpr Work kRates{1e-4, 3e-12, 6e-12, 1e-11, 2e-10, 4e-10};
};

// Sizes and recomputation that were not measured.
TEST_F(PredictionTest, FollowsDeclaredWork) {
  const Calibration calibration = made();
  const Config other = config({"model.hidden_size=200", "training.local_batch_size=3", "training.global_batch_size=12", "model.hybrid_override_pattern=MMM*OOEL"});
  EXPECT_NEAR(predict(calibration, make_plan(other), other).step_s, measured(other, kRates).train_step_s, 1e-3 * measured(other, kRates).train_step_s);
  const Config again = config({"model.hybrid_override_pattern=MM", "activation_checkpoint.mode=full"}), once = config({"model.hybrid_override_pattern=MM"});
  const auto of = [&](const Config& c) { return predict(calibration, make_plan(c), c).parts.at("mamba2"); };
  EXPECT_NEAR(of(again) / of(once), 4.0 / 3, 1e-9);
}

TEST_F(PredictionTest, SaysWhatItDoesNotKnow) {
  Calibration calibration = made();
  const Config far = config({"model.hidden_size=4096", "model.hybrid_override_pattern=OM"});
  const auto beyond = predict(calibration, make_plan(far), far);
  ASSERT_FALSE(beyond.notes.empty());
  EXPECT_NE(beyond.notes[0].find("times as large as the largest that was calibrated"), std::string::npos) << beyond.notes[0];
  const Config near = sizes()[4];
  EXPECT_TRUE(predict(calibration, make_plan(near), near).notes.empty());
  calibration.parts.erase("mamba2");
  const auto without = predict(calibration, make_plan(near), near);
  ASSERT_EQ(without.notes.size(), 1u);
  EXPECT_EQ(without.notes[0], "mamba2 was not calibrated: other blocks' rates stand for it");
  EXPECT_GT(without.parts.at("mamba2"), 0);
}

TEST_F(PredictionTest, RefusesWhatCannotBeCompared) {
  const std::vector<Config> configs = sizes();
  std::vector<BenchResult> results;
  for (const Config& c : configs) results.push_back(measured(c, kRates));
  results[1].dtype = "bfloat16";
  expect_refused([&] { calibrate(configs, results); }, "bfloat16");
  expect_refused([&] { calibrate({configs[0]}, {results[0]}); }, "too few");
}

TEST_F(PredictionTest, IsKeptByMachineDtypeAndThreads) {
  const auto file = folder_ / "deep/calibration.json";
  const Config c = config({"training.num_threads=2"});
  EXPECT_FALSE(find_calibration(file, c));
  Calibration calibration = made();
  calibration.threads = 2;
  keep_calibration(file, calibration);
  calibration.threads = 7;
  keep_calibration(file, calibration);
  const auto found = find_calibration(file, c);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->threads, 2);
  EXPECT_EQ(found->parts.at("mlp").forward, calibration.parts.at("mlp").forward);
  EXPECT_EQ(found->memory, calibration.memory);
  EXPECT_FALSE(find_calibration(file, config({"training.num_threads=3"})));
  EXPECT_FALSE(find_calibration(file, config({"training.num_threads=2", "training.dtype=bfloat16"})));
  for (const char* text : {"", "{}", "[1]", "[{\"machine\": 3}]", "[{}"}) {
    put_file(file, text);
    expect_refused([&] { find_calibration(file, c); }, "is no calibration");
  }
}

}  // namespace
}  // namespace tessera
