// Patterns as an axis: what each generator makes, and what is refused.
#include "sweep/patterns.hpp"

#include <algorithm>
#include <cmath>
#include <map>

#include <gtest/gtest.h>

#include "pattern/pattern.hpp"
#include "tests/support/model.hpp"

namespace tessera {
namespace {

// The value of `patterns` as TOML.
SweptPatterns read(const std::string& value, Issues& issues) {
  const TomlNode root = parse_toml("patterns = " + value, "sweep.toml");
  return read_patterns("patterns", *root.find("patterns"), issues);
}

std::vector<std::string> made(const std::string& value) {
  Issues issues;
  const SweptPatterns patterns = read(value, issues);
  issues.raise();
  std::vector<std::string> out;
  for (const SweptPattern& p : patterns.list) out.push_back(p.text);
  return out;
}

std::vector<std::string> notes(const std::string& value) {
  Issues issues;
  const SweptPatterns patterns = read(value, issues);
  issues.raise();
  return patterns.notes;
}

std::string error_of(const std::string& value) {
  try {
    made(value);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    return error.what();
  }
  return "no error";
}

using Texts = std::vector<std::string>;

TEST(SweepPatterns, AreWhatTheListSays) {
  EXPECT_EQ(made(R"("MEM*")"), (Texts{"MEM*"}));
  EXPECT_EQ(made(R"(["MEM*", "ME|M*/E"])"), (Texts{"MEM*", "ME|M*/E"}));
  EXPECT_EQ(made(R"(["MM", { cell = "ME", repeat = 2 }, "M"])"), (Texts{"MM", "MEME", "M"}));
  EXPECT_EQ(made(R"([{ list = ["A", "B"] }, { list = ["C"] }])"), (Texts{"A", "B", "C"}));
}

TEST(SweepPatterns, KeepTheirDialect) {
  Issues issues;
  const SweptPatterns patterns = read(R"(["ME", { list = ["ME", "M-"], dialect = "nemotron" }])", issues);
  issues.raise();
  EXPECT_EQ(patterns.list, (std::vector<SweptPattern>{{"ME", ""}, {"ME", "nemotron"}, {"M-", "nemotron"}}));
  EXPECT_TRUE(patterns.notes.empty());
}

TEST(SweepPatterns, RatioCountsAreTheNearestThatSum) {
  const auto counts = [](const LetterCounts& ratio, int64_t layers) { return ratio_counts(ratio, layers); };
  EXPECT_EQ(counts({{'M', 6}, {'*', 1}, {'O', 6}}, 13), (LetterCounts{{'M', 6}, {'*', 1}, {'O', 6}}));
  // Shares 12.92, 2.15, 12.92: two layers are left behind the whole parts.
  EXPECT_EQ(counts({{'M', 6}, {'*', 1}, {'O', 6}}, 28), (LetterCounts{{'M', 13}, {'*', 2}, {'O', 13}}));
  EXPECT_EQ(counts({{'M', 1}, {'E', 1}}, 3), (LetterCounts{{'M', 2}, {'E', 1}})) << "the earlier letter gets it";
  EXPECT_EQ(counts({{'E', 1}, {'M', 1}}, 3), (LetterCounts{{'E', 2}, {'M', 1}}));
  for (int64_t layers = 0; layers < 60; ++layers) {
    const LetterCounts ratio{{'M', 7}, {'*', 2}, {'O', 5}, {'E', 3}};
    int64_t sum = 0;
    for (size_t i = 0; const auto& [symbol, count] : ratio_counts(ratio, layers)) {
      sum += count;
      EXPECT_LT(std::abs(static_cast<double>(count) - static_cast<double>(layers * ratio[i].second) / 17), 1) << symbol << " of " << layers;
      ++i;
    }
    EXPECT_EQ(sum, layers);
  }
}

TEST(SweepPatterns, RatioSpreadsEvenly) {
  EXPECT_EQ(made(R"({ ratio = { M = 6, "*" = 1, O = 6 }, layers = 13 })"), (Texts{"MOMOMO*MOMOMO"}));
  EXPECT_EQ(made(R"({ ratio = { M = 6, "*" = 1, O = 6 }, layers = 28 })"), (Texts{"MOMOMO*MOMOMOMOMOMOMO*MOMOMO"})) << "as the definition says";
  EXPECT_EQ(made(R"({ ratio = { M = 1, E = 1 }, layers = 4 })"), (Texts{"MEME"}));
  EXPECT_EQ(made(R"({ ratio = { E = 1, M = 1 }, layers = 4 })"), (Texts{"EMEM"})) << "equal places go in the order of the file";
  EXPECT_EQ(made(R"({ ratio = { M = 3, "*" = 1 }, layers = 8 })"), (Texts{"MM*MMM*M"}));
  // No layer is more than two places from where an even spread of its letter has it.
  for (int64_t layers = 2; layers < 80; ++layers) {
    const std::string text = ratio_pattern({{'M', 5}, {'*', 1}, {'O', 3}}, layers);
    ASSERT_EQ(text.size(), layers);
    for (const char letter : {'M', '*', 'O'}) {
      const auto count = std::count(text.begin(), text.end(), letter);
      for (int64_t at = 0, seen = 0; at < layers; ++at) {
        if (text[static_cast<size_t>(at)] != letter) continue;
        const double wanted = (static_cast<double>(seen++) + 0.5) / static_cast<double>(count) * static_cast<double>(layers);
        EXPECT_LE(std::abs(static_cast<double>(at) + 0.5 - wanted), 2) << letter << " in " << text;
      }
    }
  }
}

TEST(SweepPatterns, EveryChangesTheBase) {
  EXPECT_EQ(made(R"({ base = "MEMEMEMEMEMEME", every = { "*" = 6 } })"), (Texts{"MEMEM*MEMEM*ME"}));
  EXPECT_EQ(made(R"({ base = "MEME|MEME/*E", every = { O = 3 } })"), (Texts{"MEOE|MOME/*E"})) << "counted over stages; the head's part stays";
  EXPECT_EQ(made(R"({ base = "MMMMMM", every = { E = 2, "*" = 3 } })"), (Texts{"ME*EM*"})) << "the later letter goes over the earlier";
  EXPECT_EQ(made(R"({ base = "MMMMMM", every = { "*" = 3, E = 2 } })"), (Texts{"ME*EME"}));
}

TEST(SweepPatterns, AnInsertedLayerStandsAtEachPlace) {
  EXPECT_EQ(made(R"({ base = "MEO", insert = "*", at = "each" })"), (Texts{"*MEO", "M*EO", "ME*O", "MEO*"}));
  EXPECT_EQ(made(R"({ base = "MEO", insert = "*" })"), made(R"({ base = "MEO", insert = "*", at = "each" })"));
  EXPECT_EQ(made(R"({ base = "ME|O/E", insert = "*", at = [0, 2, 3] })"), (Texts{"*ME|O/E", "ME|*O/E", "ME|O*/E"}));
  EXPECT_EQ(made(R"({ base = "ME", insert = "*", at = 1 })"), (Texts{"M*E"}));
}

TEST(SweepPatterns, OneLayerIsReplacedAtEachPlace) {
  EXPECT_EQ(made(R"({ base = "MEM|EM/M", replace = "M", by = "*", at = "each" })"), (Texts{"*EM|EM/M", "ME*|EM/M", "MEM|E*/M"}));
  EXPECT_EQ(made(R"({ base = "MEMEM", replace = "M", by = "*", at = [4, 0] })"), (Texts{"MEME*", "*EMEM"}));
  EXPECT_EQ(made(R"({ base = "M", replace = "M", by = "*" })"), (Texts{"*"}));
}

TEST(SweepPatterns, CellsAreRepeated) {
  EXPECT_EQ(made(R"({ cell = "MEM*", repeat = 3 })"), (Texts{"MEM*MEM*MEM*"}));
  EXPECT_EQ(made(R"({ cell = "ME|M*/E", repeat = 2 })"), (Texts{"ME|M*ME|M*/E"}));
}

TEST(SweepPatterns, WhatIsMadeTwiceIsKeptOnceAndSaid) {
  const std::string value = R"(["M*", { base = "M*", insert = "*" }, "M*"])";
  EXPECT_EQ(made(value), (Texts{"M*", "*M*", "M**"}));
  EXPECT_EQ(notes(value), (Texts{"patterns: \"M**\" is made 2 times and kept once", "patterns: \"M*\" is made 2 times and kept once"}));
}

TEST(SweepPatterns, WhatMaySurpriseIsSaid) {
  EXPECT_EQ(notes(R"({ ratio = { M = 12, "*" = 1 }, layers = 4 })"), (Texts{"patterns: '*' gets none of the 4 layers"}));
  EXPECT_EQ(notes(R"([{ base = "MEME", every = { "*" = 6 } }])"), (Texts{"patterns[0]: the base has 4 layers: none becomes '*', whose period is 6"}));
}

TEST(SweepPatterns, AreTheSameEachTime) {
  const std::string value = R"([{ ratio = { M = 5, "*" = 1, O = 3 }, layers = 40 }, { base = "MEMEMO", replace = "M", by = "*" }])";
  EXPECT_EQ(made(value), made(value));
}

TEST(SweepPatterns, ConfigurationsTakeThem) {
  const std::string toml = "[model]\nhybrid_override_pattern = \"M\"\nhidden_size = 16\n[blocks.mamba2]\nnum_heads = 8\n[blocks.gqa]\nnum_heads = 2\nnum_kv_heads = 1\nhead_dim = 8\n"
                           "[blocks.moe]\nnum_experts = 4\ntop_k = 2\nintermediate_size = 8\n[blocks.mlp]\nintermediate_size = 8\n";
  Issues issues;
  const SweptPatterns patterns = read(R"([{ ratio = { M = 6, "*" = 1, O = 6 }, layers = 13 }, { ratio = { M = 6, "*" = 1, E = 6 }, layers = 13, dialect = "nemotron" }])", issues);
  issues.raise();
  std::vector<std::string> experts;
  for (const SweptPattern& p : patterns.list) {
    std::vector<std::string> sets{"model.hybrid_override_pattern=" + to_toml(Value(p.text))};
    if (!p.dialect.empty()) sets.push_back("model.dialect=" + p.dialect);
    experts.push_back(parse_config(toml, "base.toml", sets, plugins()).binding(p.dialect.empty() ? 'O' : 'E').name);
  }
  EXPECT_EQ(experts, (Texts{"moe", "moe"}));
}

struct Mistake {
  const char *value, *text;
};
class SweepPatternMistake : public testing::TestWithParam<Mistake> {};
TEST_P(SweepPatternMistake, SaysExactlyThis) { EXPECT_EQ(error_of(GetParam().value), GetParam().text); }

constexpr const char* kForms = "\nhelp: a table has one of list, ratio, cell, every, insert, replace";
const Mistake kMistakes[] = {
    {"[]", "sweep.toml:1:12: error: patterns: is empty: the sweep would have no trials\nhelp: remove the axis, or name a pattern"},
    {"{ list = [] }", "sweep.toml:1:21: error: patterns.list: is empty: the sweep would have no trials\nhelp: remove the axis, or name a pattern"},
    {R"(["ME", "M E"])", "sweep.toml:1:19: error: patterns[1]: a space is no symbol at position 1\n  M E\n   ^"},
    {R"({ list = ["ME", "/E"] })", "sweep.toml:1:28: error: patterns.list[1]: empty stage at position 0\n  /E\n  ^"},
    {R"({ base = "MEME", every = { "*" = 0 } })", "sweep.toml:1:45: error: patterns.every.\"*\": must be a whole number in [1, 10000], got the integer 0"},
    {R"({ ratio = { M = 0.5, E = 1 }, layers = 4 })", "sweep.toml:1:28: error: patterns.ratio.M: must be a whole number in [1, 1000000], got the number 0.5"},
    {R"({ ratio = { MM = 1 }, layers = 4 })", "sweep.toml:1:24: error: patterns.ratio.MM: must be one printable ASCII character other than '|' and '/', got \"MM\""},
    {R"({ ratio = {}, layers = 4 })", "sweep.toml:1:22: error: patterns.ratio: must be a table of letters and whole numbers, got an empty one\nhelp: { M = 6, \"*\" = 1 }"},
    {R"({ ratio = { M = 1 }, layers = 10001 })", "sweep.toml:1:42: error: patterns.layers: must be in [1, 10000], got 10001"},
    {R"({ ratio = { M = 1 } })", "sweep.toml:1:12: error: patterns.layers: must stand beside ratio"},
    {R"({ base = "ME", insert = "|" })", "sweep.toml:1:36: error: patterns.insert: must be one printable ASCII character other than '|' and '/', got \"|\""},
    {R"({ base = "ME", insert = "*", at = [3] })", "sweep.toml:1:46: error: patterns.at: must be in [0, 2], got 3\nhelp: layers are counted from 0"},
    {R"({ base = "ME", insert = "*", at = "all" })", "sweep.toml:1:46: error: patterns.at: must be \"each\", a layer's number or a list of them, got the string \"all\""},
    {R"({ base = "MEO", replace = "*", by = "E" })", "sweep.toml:1:38: error: patterns.replace: no layer of \"MEO\" is '*'"},
    {R"({ base = "MEO", replace = "M", by = "E", at = [0, 2] })", "sweep.toml:1:58: error: patterns.at: layer 2 of \"MEO\" is 'O', not 'M'\nhelp: layers are counted from 0"},
    {R"({ base = "MEO", replace = "M", by = "M" })", "sweep.toml:1:48: error: patterns.by: must be another letter than replace"},
    {R"({ cell = "MEM*", repeat = 5000 })", "sweep.toml:1:38: error: patterns.repeat: must make at most 10000 layers, got 5000 x 4"},
    {R"({ cel = "MEM*", repeat = 2 })", "sweep.toml:1:14: error: patterns.cel: unknown key\nhelp: did you mean 'cell'? keys: list, layers, cell, repeat, base, insert, replace, by, dialect, ratio, every, at"},
    {R"({ list = ["M"], dialect = "hf" })", "sweep.toml:1:38: error: patterns.dialect: must be one of \"\", \"card\", \"nemotron\", got \"hf\""},
    {R"({ list = ["M"], repeat = 3 })", "sweep.toml:1:28: error: patterns.repeat: has no effect beside list\nhelp: remove it"},
};
INSTANTIATE_TEST_SUITE_P(All, SweepPatternMistake, testing::ValuesIn(kMistakes));

TEST(SweepPatterns, FormsAreNotMixed) {
  EXPECT_EQ(error_of(R"({ cell = "M", repeat = 2, list = ["M"] })"), "sweep.toml:1:14: error: patterns: has both list and cell" + std::string(kForms));
  EXPECT_EQ(error_of("{ base = \"ME\" }"), "sweep.toml:1:12: error: patterns: says no patterns" + std::string(kForms));
  EXPECT_EQ(error_of("7"), "sweep.toml:1:12: error: patterns: must be a pattern, a table that makes patterns, or an array of both, got the integer 7" + std::string(kForms));
  EXPECT_EQ(error_of("[\"M\", 7]"), "sweep.toml:1:18: error: patterns[1]: must be a pattern or a table that makes patterns, got the integer 7" + std::string(kForms));
}

TEST(SweepPatterns, TooManyAreRefused) {
  const auto literal = [](int count) {
    std::string text = "[";
    for (int i = 0; i < count; ++i) {
      text += '"';
      for (int bit = 0; bit < 14; ++bit) text += i >> bit & 1 ? 'M' : 'E';
      text += "\", ";
    }
    return text + "]";
  };
  EXPECT_EQ(made(literal(10'000)).size(), 10'000);
  EXPECT_EQ(error_of(literal(10'001)), "sweep.toml:1:12: error: patterns: makes more than 10000 patterns\nhelp: split the sweep");
}

}  // namespace
}  // namespace tessera
