// What the conformance suite runs on: every block and head type of the plugins under test, in sizes that a file gives or its schema suggests.
// A file <type>[.<variant>].toml holds the keys of the type's table. It is looked for in options().sizes, in the folders of
// TESSERA_CONFORMANCE_PATH, beside the plugin, and one folder above.
#pragma once
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <filesystem>
#include <ostream>
#include <string>
#include <vector>

#include "cli/describe.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/folder.hpp"
#include "tests/support/model.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera::conformance {

struct Options {
  std::vector<std::filesystem::path> plugins;  // the types that these bring; empty: those of every plugin that loads
  std::vector<std::filesystem::path> sizes;
};
inline Options& options() {
  static Options chosen;
  return chosen;
}

struct Case {
  std::string type, variant, text;
  std::string from;    // where its sizes come from, for people
  bool given = false;  // it has sizes
  std::string name() const { return variant.empty() ? type : type + "." + variant; }
};
// As GoogleTest allows it.
inline std::string test_name(const testing::TestParamInfo<Case>& info) {
  std::string name = info.param.name();
  for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return name;
}
inline void PrintTo(const Case& c, std::ostream* out) { *out << c.name(); }

inline constexpr int64_t kVocab = 40, kHidden = 32;

inline std::vector<std::filesystem::path> folders(const std::filesystem::path& plugin) {
  std::vector<std::filesystem::path> list = options().sizes;
  const char* more = std::getenv("TESSERA_CONFORMANCE_PATH");
  const std::string text = more ? more : "";
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(':', begin), text.size());
    if (end > begin) list.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  const std::filesystem::path here = std::filesystem::absolute(plugin).parent_path();
  list.push_back(here);
  list.push_back(here.parent_path());
  return list;
}

inline std::vector<Case> cases_of(const ElementType& type) {
  const std::string word(type.type());
  std::vector<Case> list;
  for (const auto& folder : folders(plugins().file_of(word))) {
    if (!std::filesystem::is_directory(folder)) continue;
    for (const std::string& name : entries(folder)) {
      if (!name.starts_with(word + ".") || !name.ends_with(".toml")) continue;
      const std::string middle = name.substr(word.size(), name.size() - word.size() - 5);  // "" or ".variant"
      const Case found{.type = word, .variant = middle.empty() ? "" : middle.substr(1), .text = file_text(folder / name), .from = "the sizes of " + (folder / name).string(), .given = true};
      if (std::none_of(list.begin(), list.end(), [&](const Case& c) { return c.variant == found.variant; })) list.push_back(found);
    }
  }
  if (!list.empty()) return list;
  Case suggested{.type = word};
  std::vector<std::pair<std::string, Value>> keys;
  if (example_config(type, {.hidden_size = kHidden, .vocab_size = kVocab, .num_layers = 2}, keys)) {
    suggested.given = true;
    for (const auto& [key, value] : keys) {
      suggested.text += fmt::format("{} = {}\n", key, to_toml(value));
      suggested.from += fmt::format("{}{} = {}", suggested.from.empty() ? "" : ", ", key, to_toml(value));
    }
    suggested.from += fmt::format("{} (there is no {}.toml)", suggested.from.empty() ? "its defaults" : ", as its schema suggests", word);
  }
  return {suggested};
}

inline bool under_test(const ElementType& type) {
  const auto& chosen = options().plugins;
  const auto same = [&](const std::filesystem::path& file) { return std::filesystem::weakly_canonical(file) == std::filesystem::weakly_canonical(plugins().file_of(type.type())); };
  return chosen.empty() || std::any_of(chosen.begin(), chosen.end(), same);
}

template <class T>
std::vector<Case> cases(const std::vector<const T*>& types) {
  std::vector<Case> list;
  for (const T* type : types)
    if (under_test(*type))
      for (Case& c : cases_of(*type)) list.push_back(std::move(c));
  return list;
}
inline std::vector<Case> block_cases() { return cases(plugins().blocks()); }
inline std::vector<Case> head_cases() { return cases(plugins().heads()); }

inline std::string how_to_add(const Case& c) {
  return fmt::format("'{}' (from {}) has no sizes to be tested in, and its schema suggests none: write the keys of its table into {}.toml beside the plugin or one folder above", c.type,
                     plugins().file_of(c.type).string(), c.type);
}

inline std::string model_text(const std::string& pattern) {
  // Initial weights are larger than a run's, so that every part of a block moves its output.
  return fmt::format("[model]\nhybrid_override_pattern = \"{}\"\nvocab_size = {}\nhidden_size = {}\ninit_std = 0.2\n", pattern, kVocab, kHidden);
}

// Layers X of one type.
inline std::string block_text(const Case& c, const std::string& pattern = "XX") {
  return model_text(pattern) + fmt::format("[symbols]\nX = \"{}\"\n[blocks.{}]\n{}", c.type, c.type, c.text);
}

// Two layers, and the head over one layer, of the first block type that has sizes.
inline std::string head_text(const Case& c, const std::string& pattern = "XX/X") {
  for (const BlockType* type : plugins().blocks())
    if (const Case block = cases_of(*type).front(); block.given) return block_text(block, pattern) + fmt::format("[heads.{}]\n{}", c.type, c.text);
  return {};
}

// True where a parameter is cut by experts: products then have shapes that depend on all tokens of the batch.
inline bool has_experts(const ModelPlan& plan) {
  for (const TensorRow& row : tensor_rows(plan))
    if (row.param)
      for (const Shard& shard : row.param->shards)
        if (shard.axis != Axis::kTensor) return true;
  return false;
}

// A failure that begins with what was done, for readers who do not have this source.
inline void expect(const testing::AssertionResult& result, const std::string& what) {
  if (!result) ADD_FAILURE() << what << ": " << result.message();
}

// The same ids with other ones in [begin, end).
inline at::Tensor changed(const at::Tensor& ids_n, int64_t begin, int64_t end) {
  at::Tensor out = ids_n.clone();
  out.narrow(0, begin, end - begin).add_(1).remainder_(kVocab);
  return out;
}

inline at::Tensor hidden(Model& model, const Batch& batch, DecodeState* state = nullptr) {
  at::NoGradGuard no_grad;
  return model.hidden(batch, state);
}

inline const double kStackTolerance = tolerance(at::kFloat, Op::kModel, kHidden);

// The fixture of all checks of a block; tests/plugins/conformance_*_test.cpp hold them.
class Conformance : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (!GetParam().given) FAIL() << how_to_add(GetParam());
  }
  std::string text(const std::string& pattern = "XX") const { return block_text(GetParam(), pattern); }
  const BlockType& type() const { return *plugins().block(GetParam().type); }
  // Dense blocks give equal bits where the shapes are equal; experts see other shapes.
  static testing::AssertionResult same(const Built& built, const at::Tensor& got, const at::Tensor& want) {
    return has_experts(built.plan) ? close(got, want, kStackTolerance) : bit_equal(got, want);
  }
};

class HeadConformance : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (!GetParam().given) FAIL() << how_to_add(GetParam());
    text_ = head_text(GetParam());
    ASSERT_FALSE(text_.empty()) << "no block type has sizes to be tested in";
  }
  const HeadType& type() const { return *plugins().head(GetParam().type); }
  std::string text_;
};

}  // namespace tessera::conformance
