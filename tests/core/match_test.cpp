// Fair comparison: targets are met, the nearest value is the nearest of all, and what is refused cannot be met.
#include "sweep/match.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <random>

#include <gtest/gtest.h>

#include "plan/active.hpp"
#include "sweep/patterns.hpp"
#include "tests/support/model.hpp"

namespace tessera {
namespace {

constexpr const char* kBase = R"(
[model]
hybrid_override_pattern = "MEM*MEMO"
vocab_size = 256
hidden_size = 128
[blocks.mamba2]
num_heads = 4
head_dim = 64
state_size = 32
num_groups = 2
[blocks.gqa]
num_heads = 4
num_kv_heads = 2
head_dim = 32
[blocks.mlp]
intermediate_size = 384
[blocks.moe]
num_experts = 8
top_k = 2
intermediate_size = 128
shared_intermediate_size = 128
[blocks.latent_moe]
latent_size = 64
num_experts = 16
top_k = 4
intermediate_size = 128
[training]
seq_len = 256
dtype = "float32"
)";

Config config_of(const std::string& pattern, std::vector<std::string> sets = {}) {
  if (!pattern.empty()) sets.push_back("model.hybrid_override_pattern=" + to_toml(Value(pattern)));
  return parse_config(kBase, "base.toml", sets, plugins());
}

// The metric by the text of the configuration, as a user would set it; none where it is not legal.
std::optional<double> metric_of(const std::string& of, const std::string& pattern, const std::vector<std::string>& sets) {
  try {
    return match_metric(of, config_of(pattern, sets));
  } catch (const Error&) {
    return {};
  }
}

MatchRule rule_of(const std::string& toml) {
  const TomlNode root = parse_toml("match = " + toml, "sweep.toml");
  Issues issues;
  const MatchRule rule = read_match("match", *root.find("match"), issues);
  issues.raise();
  return rule;
}

std::string error_of(const std::string& toml) {
  try {
    rule_of(toml);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    return error.what();
  }
  return "no error";
}

std::vector<std::string> as_sets(const Match& match) {
  std::vector<std::string> sets;
  for (const auto& [key, value] : match.sets) sets.push_back(key + "=" + value);
  return sets;
}

// Mixtures of all blocks, some of few, 6 to 48 layers deep.
std::vector<std::string> patterns(int count) {
  std::mt19937 random(7);
  const auto draw = [&](int low, int high) { return low + static_cast<int64_t>(random() % static_cast<unsigned>(high - low + 1)); };
  std::vector<std::string> out;
  while (static_cast<int>(out.size()) < count) {
    LetterCounts ratio{{'M', draw(1, 8)}};
    if (draw(0, 9) > 0) ratio.emplace_back('*', draw(1, 3));
    if (draw(0, 9) > 0) ratio.emplace_back('E', draw(1, 6));
    if (draw(0, 9) > 3) ratio.emplace_back('O', draw(1, 4));
    if (draw(0, 9) > 6) ratio.emplace_back('L', draw(1, 4));
    std::shuffle(ratio.begin(), ratio.end(), random);
    const std::string text = ratio_pattern(ratio, draw(6, 48));
    if (std::find(out.begin(), out.end(), text) == out.end()) out.push_back(text);
  }
  return out;
}

TEST(Match, MetricsAreThoseOfThePlan) {
  const auto metric = [](const char* of, const std::string& pattern) { return match_metric(of, config_of(pattern)); };
  const double d = 128, v = 256, stem = 2 * v * d + d, mlp = d + 2 * 384 * d, gqa = d + 2 * d * (4 * 32) + 2 * d * (2 * 32);
  EXPECT_EQ(metric("params", "E*"), stem + mlp + gqa);
  EXPECT_EQ(metric("active_params", "E*"), stem + mlp + gqa);
  const double router = 8 * d, expert = 2 * 128 * d, shared = 2 * 128 * d;
  EXPECT_EQ(metric("params", "O"), stem + d + router + 8 * expert + shared);
  EXPECT_EQ(metric("active_params", "O"), stem + d + router + 2 * expert + shared);
  const double latent_expert = 2 * 128 * 64, latent = 16 * 64 + 2 * 64 * d;
  EXPECT_EQ(metric("params", "L") - metric("active_params", "L"), 12 * latent_expert);
  EXPECT_EQ(metric("active_params", "L"), stem + d + latent + 4 * latent_expert);
  EXPECT_DOUBLE_EQ(metric("flops", "E"), 2 * v * d + 4 * 384 * d);
  EXPECT_DOUBLE_EQ(metric("flops", "*"), 2 * v * d + 2 * (gqa - d) + 4.0 * 4 * 32 * (257.0 / 2));
  EXPECT_EQ(metric("state_bytes", "E"), 0);
  EXPECT_EQ(metric("state_bytes", "*"), 4 * 256 * 2 * 2 * 32);
  EXPECT_EQ(metric("state_bytes", "M"), 4 * (4 * 64 * 32 + (4 * 64 + 2 * 2 * 32) * 3));
  EXPECT_EQ(match_metric("state_bytes", config_of("*M", {"training.dtype=bfloat16"})), 2 * 256 * 2 * 2 * 32 + 4 * 4 * 64 * 32 + 2 * (4 * 64 + 2 * 2 * 32) * 3);
}

TEST(Match, ActiveParametersOfSharedLayersCountOnce) {
  const Config config = config_of("OO", {"symbols.O={block=\"moe\",shared=true}"}), single = config_of("O");
  EXPECT_EQ(active_parameters(make_plan(config)), active_parameters(make_plan(single)));
}

TEST(Match, ActiveParametersOfAPublishedModel) {
  const Config config = load_config(std::filesystem::path(TESSERA_SOURCE_DIR) / "configs/models/nano_30b.toml", {}, plugins());
  const ModelPlan plan = make_plan(config);
  EXPECT_NEAR(static_cast<double>(totals(plan).trained) / 1e9, 31.6, 0.1);
  EXPECT_NEAR(active_parameters(plan) / 1e9, 3.6, 0.1) << "3.2 without the two embedding matrices";
}

TEST(Match, StepTimeNeedsACalibration) {
  const MatchRule rule = rule_of(R"({ of = "step_time", target = 2, bend = "blocks.mlp.intermediate_size", tolerance = 0.01 })");
  try {
    match_config(rule, config_of("ME"), 2);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "error: match: step_time needs a calibration of this machine, and there is none\nhelp: match params, active_params, flops or state_bytes");
  }
  const Match match = match_config(rule, config_of("ME"), 2, [](const ModelPlan& plan, const Config&) { return 1e-6 * static_cast<double>(totals(plan).trained); });
  EXPECT_EQ(match.refusal, "");
  EXPECT_NEAR(match.value, 2, 0.01);
}

// The values that brute force over the text of the configuration finds nearest.
struct Brute {
  double distance = std::numeric_limits<double>::infinity();
  int64_t legal = 0;
};
Brute brute_force(const MatchRule& rule, const std::string& pattern, double target) {
  Brute best;
  const auto look = [&](const std::vector<std::string>& sets) {
    if (const auto value = metric_of(rule.of, pattern, sets)) ++best.legal, best.distance = std::min(best.distance, std::abs(*value - target));
  };
  const auto each = [](const BendKey& key, auto visit) {
    for (int64_t value = (key.min + key.multiple_of - 1) / key.multiple_of * key.multiple_of; value <= key.max; value += key.multiple_of) visit(fmt::format("{}={}", key.key, value));
  };
  each(rule.bend[0], [&](const std::string& first) {
    if (rule.bend.size() == 1) return look({first});
    each(rule.bend[1], [&](const std::string& second) { look({first, second}); });
  });
  return best;
}

// What is compared over many patterns: the target is what the base configuration has.
struct Case {
  const char *name, *rule;
  bool always;
};
// The keys that a match changed, in a range about the values that it has.
MatchRule around(const MatchRule& rule, const Match& match) {
  constexpr int64_t kSteps = 10;
  MatchRule small = rule;
  small.bend.clear();
  for (const auto& [key, value] : match.sets)
    for (BendKey bend : rule.bend) {
      if (bend.key != key) continue;
      bend.min = std::max<int64_t>(1, std::stoll(value) - kSteps * bend.multiple_of), bend.max = std::stoll(value) + kSteps * bend.multiple_of;
      small.bend.push_back(bend);
    }
  return small;
}

class MatchPatterns : public testing::TestWithParam<Case> {};
TEST_P(MatchPatterns, MeetTheTargetOrCannot) {
  if (!GetParam().always && !std::getenv("TESSERA_TEST_ALL")) GTEST_SKIP() << "long: set TESSERA_TEST_ALL=1";
  const MatchRule rule = rule_of(GetParam().rule);
  const double target = match_metric(rule.of, config_of("MEM*MLMOMEM*MLMOMEM*MLMO"));
  int met = 0;
  int64_t most = 0;
  double slowest = 0, sum = 0, worst = 0;
  std::vector<std::string> refused;
  const auto all = patterns(50);
  for (const std::string& pattern : all) {
    const Config config = config_of(pattern);
    const auto start = std::chrono::steady_clock::now();
    const Match match = match_config(rule, config, target);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    slowest = std::max(slowest, seconds), sum += seconds, most = std::max(most, match.tried);
    EXPECT_EQ(match.value, metric_of(rule.of, pattern, as_sets(match))) << match.text;
    EXPECT_EQ(match.refusal.empty(), std::abs(match.error()) <= rule.tolerance);
    if (match.refusal.empty()) {
      ++met, worst = std::max(worst, std::abs(match.error()));
      continue;
    }
    refused.push_back(match.refusal);
    EXPECT_GT(brute_force(around(rule, match), pattern, target).distance, rule.tolerance * target) << match.refusal;
  }
  fmt::print("{}: {} of {} within {:g} %, the farthest of them {:.3f} %; {:.1f} ms a pattern, at most {:.1f} ms and {} configurations\n", GetParam().name, met, all.size(),
             100 * rule.tolerance, 100 * worst, 1e3 * sum / static_cast<double>(all.size()), 1e3 * slowest, most);
  for (const std::string& text : refused) fmt::print("  {}\n", text);
  EXPECT_GE(met, 45);
}
INSTANTIATE_TEST_SUITE_P(
    All, MatchPatterns,
    testing::Values(Case{"params, hidden_size", R"({ of = "params", bend = "model.hidden_size" })", true},
                    Case{"params, hidden_size and ffn", R"({ of = "params", bend = [{ key = "model.hidden_size", multiple_of = 8 }, { key = "blocks.mlp.intermediate_size", multiple_of = 8 }] })", true},
                    Case{"active_params, hidden_size and heads",
                         R"({ of = "active_params", bend = [{ key = "model.hidden_size", multiple_of = 4 }, { key = "blocks.mamba2.num_heads" }] })", false},
                    Case{"flops, hidden_size and ffn", R"({ of = "flops", bend = [{ key = "model.hidden_size", multiple_of = 8 }, { key = "blocks.mlp.intermediate_size", multiple_of = 8 }] })", false},
                    Case{"state_bytes, state_size and head_dim",
                         R"({ of = "state_bytes", bend = [{ key = "blocks.mamba2.state_size" }, { key = "blocks.gqa.head_dim" }] })", false}),
    [](const auto& info) {
      std::string name = info.param.name;
      std::erase_if(name, [](char c) { return !std::isalnum(static_cast<unsigned char>(c)); });
      return name;
    });

TEST(Match, OneKeyIsTheNearestOfAll) {
  const char* rules[] = {
      R"({ of = "params", bend = { key = "model.hidden_size", min = 40, max = 400 } })",
      R"({ of = "flops", bend = { key = "blocks.mlp.intermediate_size", min = 1, max = 3000, multiple_of = 3 } })",
      R"({ of = "active_params", bend = { key = "blocks.mamba2.num_heads", min = 1, max = 600 } })",       // multiples of num_groups are legal
      R"({ of = "params", bend = { key = "blocks.mamba2.num_groups", min = 1, max = 600 } })",             // divisors of num_heads are legal
      R"({ of = "params", bend = { key = "blocks.moe.num_experts", min = 1, max = 500 } })",               // from top_k on
      R"({ of = "state_bytes", bend = { key = "blocks.gqa.head_dim", min = 1, max = 500 } })",
  };
  int refused = 0;
  for (const char* text : rules) {
    const MatchRule rule = rule_of(text);
    for (const char* pattern : {"MEM*MEMO", "M*EEOMM*"})
      for (const double times : {0.3, 1.02, 2.7}) {
        const double target = times * match_metric(rule.of, config_of(""));
        const Match match = match_config(rule, config_of(pattern), target);
        const Brute brute = brute_force(rule, pattern, target);
        EXPECT_NEAR(std::abs(match.value - target), brute.distance, 1e-9 * target) << text << " " << pattern << " " << times << ": " << match.text;
        EXPECT_EQ(match.refusal.empty(), brute.distance <= rule.tolerance * target) << match.refusal;
        refused += !match.refusal.empty();
      }
  }
  EXPECT_GT(refused, 5) << "both outcomes are tested";
}

TEST(Match, WhatTwoKeysAreRefusedForCannotBeMet) {
  const char* rules[] = {
      R"({ of = "params", tolerance = 0.001, bend = [{ key = "model.hidden_size", min = 64, max = 256, multiple_of = 16 }, { key = "blocks.mamba2.num_heads", min = 1, max = 24 }] })",
      R"({ of = "flops", tolerance = 0.002, bend = [{ key = "blocks.latent_moe.latent_size", min = 16, max = 96, multiple_of = 8 }, { key = "blocks.gqa.num_heads", min = 1, max = 24 }] })",
      R"({ of = "params", tolerance = 0.002, bend = [{ key = "model.hybrid_override_pattern", max = 12 }, { key = "blocks.moe.num_experts", min = 1, max = 40 }] })",
  };
  int met = 0, refused = 0;
  for (const char* text : rules) {
    const MatchRule rule = rule_of(text);
    for (const char* pattern : {"ML*O", "MMLO*L"})
      for (const double times : {0.4, 1.0, 1.7}) {
        const double target = times * match_metric(rule.of, config_of(""));
        const Match match = match_config(rule, config_of(pattern), target);
        double nearest = std::numeric_limits<double>::infinity();
        if (rule.bend[0].key == "model.hybrid_override_pattern") {
          for (int64_t repeat = 1; repeat <= rule.bend[0].max; ++repeat) {
            MatchRule one = rule;
            one.bend.erase(one.bend.begin());
            nearest = std::min(nearest, brute_force(one, repeat_pattern(pattern, repeat), target).distance);
          }
        } else {
          nearest = brute_force(rule, pattern, target).distance;
        }
        (match.refusal.empty() ? met : refused) += 1;
        EXPECT_EQ(match.refusal.empty(), nearest <= rule.tolerance * target) << text << " " << pattern << " " << times << ": " << match.text << "; brute force " << nearest / target;
        if (!match.refusal.empty()) {
          EXPECT_NEAR(std::abs(match.value - target), nearest, 1e-9 * target) << match.refusal;
        }
      }
  }
  EXPECT_GT(met, 2);
  EXPECT_GT(refused, 2);
}

TEST(Match, DepthIsRepeatsOfThePattern) {
  const MatchRule rule = rule_of(R"({ of = "params", bend = "model.hybrid_override_pattern", tolerance = 0.05 })");
  const double target = match_metric("params", config_of("ME|ME|ME|ME/*"));
  const Match match = match_config(rule, config_of("ME/*"), match_metric("params", config_of("MEMEMEME/*")));
  EXPECT_EQ(match.sets, (std::vector<std::pair<std::string, std::string>>{{"model.hybrid_override_pattern", "\"MEMEMEME/*\""}}));
  EXPECT_EQ(match.error(), 0);
  EXPECT_EQ(match.value, target);
}

TEST(Match, KeysWithoutEffectStay) {
  const MatchRule rule = rule_of(R"({ of = "state_bytes", bend = ["blocks.mlp.intermediate_size", "blocks.gqa.head_dim"] })");
  const Match match = match_config(rule, config_of("ME*"), 1.5 * match_metric("state_bytes", config_of("ME*")));
  EXPECT_EQ(match.notes, (std::vector<std::string>{"blocks.mlp.intermediate_size stays as it is: state_bytes do not change with it"}));
  ASSERT_EQ(match.sets.size(), 1);
  const Match without = match_config(rule, config_of("MM"), match_metric("state_bytes", config_of("ME*")));
  EXPECT_TRUE(without.sets.empty());
  EXPECT_EQ(without.notes, (std::vector<std::string>{"blocks.mlp.intermediate_size stays as it is: \"MM\" has no such layer", "blocks.gqa.head_dim stays as it is: \"MM\" has no such layer"}));
  EXPECT_EQ(without.refusal, "match: \"MM\" comes no nearer than state_bytes 74752, -55.62 % of 168448, tolerance 1 %: no key that may bend changes it");
}

TEST(Match, KeysMustBeThoseOfTheBlock) {
  const auto error = [](const char* rule) {
    try {
      match_config(rule_of(rule), config_of("ME"), 1e6);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_EQ(error(R"({ of = "params", bend = "blocks.mlp.intermediat_size" })"),
            "error: match.bend: blocks.mlp.intermediat_size: unknown key\nhelp: did you mean 'intermediate_size'? keys: intermediate_size, bias");
  EXPECT_EQ(error(R"({ of = "params", bend = "blocks.mlp.bias" })"), "error: match.bend: blocks.mlp.bias must be a key of integers, it is a boolean");
  EXPECT_EQ(error(R"({ of = "params", bend = { key = "model.hidden_size", multiple_of = 100000 } })"),
            "error: match.bend: model.hidden_size has no multiple of 100000 in [2, 8192]\nhelp: widen min and max, or lower multiple_of");
}

TEST(Match, RefusalsSayWhatIsNearest) {
  const auto refusal = [](const char* rule) { return match_config(rule_of(rule), config_of("MM"), 300'000).refusal; };
  const std::string nearest = "match: \"MM\" comes no nearer than params 300696, +0.23 % of 300000, with blocks.mamba2.num_heads = 4, tolerance 0.1 %: ";
  EXPECT_EQ(refusal(R"({ of = "params", tolerance = 0.001, bend = { key = "blocks.mamba2.num_heads", min = 2, max = 20 } })"),
            nearest + "all 19 values of blocks.mamba2.num_heads were tried, 10 are legal");
  const std::string wide = refusal(R"({ of = "params", tolerance = 0.001, bend = { key = "blocks.mamba2.num_heads", min = 2, max = 2000 } })");
  EXPECT_TRUE(wide.starts_with(nearest + "the next legal value, blocks.mamba2.num_heads = 2, gives 200332, and the metric rises with the key at all ")) << wide;
  const std::string last = refusal(R"({ of = "params", tolerance = 0.001, bend = { key = "blocks.mamba2.num_heads", min = 4, max = 2000 } })");
  EXPECT_TRUE(last.starts_with(nearest + "blocks.mamba2.num_heads = 4 is the last legal value of its range, and the metric rises with the key at all ")) << last;
}

TEST(Match, NothingIsLegal) {
  const Match match = match_config(rule_of(R"({ of = "params", bend = { key = "blocks.mamba2.num_heads", min = 3, max = 3 } })"), config_of("MM"), 1e6);
  EXPECT_EQ(match.refusal,
            "match: \"MM\" has no legal value of blocks.mamba2.num_heads: none of the values is legal, the last one because of blocks.mamba2.num_heads: must be a multiple of num_groups, got 3 % 2 = 1");
}

struct Mistake {
  const char *rule, *text;
};
class MatchMistake : public testing::TestWithParam<Mistake> {};
TEST_P(MatchMistake, SaysExactlyThis) { EXPECT_EQ(error_of(GetParam().rule), GetParam().text); }
#define BEND_HELP "\nhelp: bend = [\"blocks.mlp.intermediate_size\"], or { key = \"...\", multiple_of = 8 }; a key of a block or a head, model.hidden_size, or model.hybrid_override_pattern"
const Mistake kMistakes[] = {
    {R"("params")", "sweep.toml:1:9: error: match: must be a table, got the string \"params\"\nhelp: [match]"},
    {R"({ of = "speed", bend = "model.hidden_size" })", "sweep.toml:1:16: error: match.of: must be one of \"params\", \"active_params\", \"flops\", \"step_time\", \"state_bytes\", got \"speed\""},
    {R"({ of = "params" })", "sweep.toml:1:9: error: match.bend: required key is missing" BEND_HELP},
    {R"({ of = "params", bend = [] })", "sweep.toml:1:33: error: match.bend: must name one or two keys, got the list of integers []" BEND_HELP},
    {R"({ of = "params", bend = ["model.hidden_size", "blocks.mlp.intermediate_size", "blocks.moe.num_experts"] })", "sweep.toml:1:33: error: match.bend: must name one or two keys, got 3" BEND_HELP},
    {R"({ of = "params", bend = ["training.steps"] })", "sweep.toml:1:34: error: match.bend[0]: \"training.steps\" cannot bend" BEND_HELP},
    {R"({ of = "params", bend = ["model.hidden_size", "model.hidden_size"] })", "sweep.toml:1:55: error: match.bend[1]: model.hidden_size bends already\nhelp: name two keys"},
    {R"({ of = "params", bend = ["model.hidden_size", 3] })", "sweep.toml:1:55: error: match.bend[1]: must be a key or a table with one, got the integer 3" BEND_HELP},
    {R"({ of = "params", bend = { key = "model.hidden_size", min = 8, max = 4 } })", "sweep.toml:1:68: error: match.bend.min: must be at most max, got 8 > 4"},
    {R"({ of = "params", bend = { key = "model.hidden_size", multiple_of = 0 } })", "sweep.toml:1:76: error: match.bend.multiple_of: must be in [1, 1000000000], got 0"},
    {R"({ of = "params", bend = "model.hidden_size", target = "half" })", "sweep.toml:1:63: error: match.target: must be \"base\" or a number above 0, got the string \"half\""},
    {R"({ of = "params", bend = "model.hidden_size", target = 0 })", "sweep.toml:1:63: error: match.target: must be \"base\" or a number above 0, got the integer 0"},
    {R"({ of = "params", bend = "model.hidden_size", tolerance = 2 })", "sweep.toml:1:66: error: match.tolerance: must be in [0, 1], got 2.0"},
};
INSTANTIATE_TEST_SUITE_P(All, MatchMistake, testing::ValuesIn(kMistakes));

}  // namespace
}  // namespace tessera
