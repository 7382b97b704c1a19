#include "hf/hf_weights.hpp"

#include <ATen/ops/equal.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <set>

namespace tessera {

namespace {

constexpr const char* kLmHead = "lm_head.weight";
constexpr const char* kEmbedding = "embedding.weight";

bool supported(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble; }

void add_list(std::string& text, const char* what, const std::vector<std::string>& names) {
  constexpr size_t kMost = 20;
  if (names.empty()) return;
  text += fmt::format("\n  {} ({}): {}", what, names.size(), fmt::join(names.begin(), names.begin() + static_cast<std::ptrdiff_t>(std::min(names.size(), kMost)), ", "));
  if (names.size() > kMost) text += fmt::format(" and {} more", names.size() - kMost);
}

std::string renamed(const std::string& name, const std::vector<std::string>& map) {
  for (const std::string& rule : map) {
    const auto equals = rule.find('=');
    if (equals == std::string::npos) throw Error(ExitCode::kUsage, fmt::format("checkpoint.initial_load_map: must be \"from=to\", got \"{}\"", rule));
    if (name.starts_with(rule.substr(0, equals))) return rule.substr(equals + 1) + name.substr(equals);
  }
  return name;
}

}  // namespace

HubFolder::HubFolder(const std::filesystem::path& folder, const ModelPlan& plan, bool partial, const std::vector<std::string>& map)
    : file_(SafetensorsFolder::open(folder)), tensors_(hub_tensors(plan)) {
  std::map<std::string, std::string> names;  // as the map makes it -> as the file has it
  for (const std::string& name : file_.names()) {
    const auto [place, added] = names.emplace(renamed(name, map), name);
    if (!added) throw Error(ExitCode::kUsage, fmt::format("checkpoint.initial_load_map: '{}' and '{}' both become '{}'", place->second, name, place->first));
  }
  find_all(names);
  std::set<std::string> used;
  for (const Stored& stored : stored_)
    if (!stored.name.empty()) used.insert(stored.name), ++report_.loaded;
  for (const auto& [name, original] : names) {
    if (used.contains(original) || std::any_of(report_.misshapen.begin(), report_.misshapen.end(), [&](const std::string& m) { return m.starts_with(original + ": "); })) continue;
    if (plan.model.tie_embeddings && name == kLmHead) stores_tied_lm_head_ = true;
    else report_.unexpected.push_back(original);
  }
  if (!partial && !(report_.missing.empty() && report_.misshapen.empty() && report_.unexpected.empty())) {
    std::string text = fmt::format("{}: the tensors are not those of its configuration", folder.string());
    add_list(text, "missing", report_.missing);
    add_list(text, "unexpected", report_.unexpected);
    add_list(text, "misshapen", report_.misshapen);
    throw Error(ExitCode::kRuntime, text);
  }
  if (!stores_tied_lm_head_) return;
  const at::Tensor lm_head = file_.tensor(names.at(kLmHead));
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (tensors_[i].source == kEmbedding && has(i) && !(lm_head.sizes() == at::IntArrayRef(tensors_[i].shape) && lm_head.scalar_type() == dtype(i) && at::equal(lm_head, tensor(i))))
      throw Error(ExitCode::kRuntime, fmt::format("{}: tie_word_embeddings is true, but the stored {} differs from {}", folder.string(), kLmHead, tensors_[i].name),
                  "set tie_word_embeddings to false in config.json to use both");
}

void HubFolder::find_all(const std::map<std::string, std::string>& names) {
  auto find = [&](const std::string& name) -> const TensorEntry* {
    if (name.empty()) return nullptr;
    for (const std::string& spelling : hub_spellings(name))
      if (auto found = names.find(spelling); found != names.end()) return file_.find(found->second);
    return nullptr;
  };
  std::map<std::string, int64_t> num_slices;
  for (const HubTensor& t : tensors_)
    if (t.index >= 0) num_slices[t.source] = std::max(num_slices[t.source], t.index + 1);
  std::set<std::string> told;
  for (const HubTensor& t : tensors_) {
    stored_.emplace_back();
    const TensorEntry* entry = find(t.name);
    const bool packed = !entry;
    if (packed) entry = find(t.packed);
    if (!entry) {
      report_.missing.push_back(t.name);
      continue;
    }
    std::vector<int64_t> wanted = t.shape;
    if (packed && t.index >= 0) wanted.insert(wanted.begin(), num_slices[t.source]);
    if (entry->shape == wanted && supported(entry->dtype)) stored_.back() = {entry->name, packed ? t.index : -1};
    else if (!told.insert(entry->name).second) continue;
    else if (entry->shape != wanted) report_.misshapen.push_back(fmt::format("{}: [{}] in the file, [{}] in the model", entry->name, fmt::join(entry->shape, ", "), fmt::join(wanted, ", ")));
    else report_.misshapen.push_back(fmt::format("{}: {} in the file, only F64, F32, BF16 and F16 are read", entry->name, safetensors_dtype(entry->dtype)));
  }
}

at::Tensor HubFolder::tensor(size_t i) const {
  const at::Tensor whole = file_.tensor(stored_[i].name);
  return stored_[i].index < 0 ? whole : whole.select(0, stored_[i].index);
}

}  // namespace tessera
