// The cases of conformance: every loaded block and head type, in the sizes that tests/plugins/conformance/<type>[.<variant>].toml gives.
// Such a file holds the keys of the type's table. TESSERA_CONFORMANCE_PATH names further folders, for plugins built elsewhere.
#pragma once
#include <fmt/format.h>

#include <cstdlib>
#include <filesystem>
#include <ostream>
#include <string>
#include <vector>

#include "tests/support/folder.hpp"
#include "tests/support/model.hpp"

namespace tessera::conformance {

struct Case {
  std::string type, variant, text;
  bool given = false;  // a file gives its sizes
};
inline void PrintTo(const Case& c, std::ostream* out) { *out << c.type << (c.variant.empty() ? "" : ".") << c.variant; }

inline std::vector<std::filesystem::path> folders() {
  std::vector<std::filesystem::path> list{std::filesystem::path(TESSERA_SOURCE_DIR) / "tests/plugins/conformance"};
  const char* more = std::getenv("TESSERA_CONFORMANCE_PATH");
  std::string text = more ? more : "";
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(':', begin), text.size());
    if (end > begin) list.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return list;
}

inline std::vector<Case> cases_of(const std::string& type) {
  std::vector<Case> list;
  for (const auto& folder : folders())
    for (const std::string& name : entries(folder)) {
      if (!name.starts_with(type + ".") || !name.ends_with(".toml")) continue;
      const std::string middle = name.substr(type.size(), name.size() - type.size() - 5);  // "" or ".variant"
      list.push_back({type, middle.empty() ? "" : middle.substr(1), file_text(folder / name), true});
    }
  if (list.empty()) list.push_back({.type = type});
  return list;
}

inline std::vector<Case> block_cases() {
  std::vector<Case> list;
  for (const BlockType* type : plugins().blocks())
    for (Case& c : cases_of(std::string(type->type()))) list.push_back(std::move(c));
  return list;
}

inline std::vector<Case> head_cases() {
  std::vector<Case> list;
  for (const HeadType* type : plugins().heads())
    for (Case& c : cases_of(std::string(type->type()))) list.push_back(std::move(c));
  return list;
}

inline std::string how_to_add(const Case& c) {
  return fmt::format("'{}' (from {}) has no sizes to be tested in: write the keys of its table into {}/{}.toml, or into a folder named by TESSERA_CONFORMANCE_PATH", c.type,
                     plugins().file_of(c.type).string(), folders().front().string(), c.type);
}

inline constexpr int64_t kVocab = 40, kHidden = 32;

inline std::string model_text(const std::string& pattern) {
  // Initial weights are larger than a run's, so that every part of a block moves its output.
  return fmt::format("[model]\nhybrid_override_pattern = \"{}\"\nvocab_size = {}\nhidden_size = {}\ninit_std = 0.2\n", pattern, kVocab, kHidden);
}

// Layers X of one type. `pattern` may bind Y to another.
inline std::string block_text(const Case& c, const std::string& pattern = "XX", const std::string& other = {}) {
  return model_text(pattern) + fmt::format("[symbols]\nX = \"{}\"\n{}[blocks.{}]\n{}", c.type, other.empty() ? "" : "Y = \"" + other + "\"\n", c.type, c.text);
}

// Two layers, and the head over one layer, of the first block type that has sizes.
inline std::string head_text(const Case& c, const std::string& pattern = "XX/X") {
  for (const Case& block : block_cases())
    if (block.given) return block_text(block, pattern) + fmt::format("[heads.{}]\n{}", c.type, c.text);
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

}  // namespace tessera::conformance
