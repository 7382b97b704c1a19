#include "hf/convert.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <map>

#include "checkpoint/file.hpp"
#include "checkpoint/saver.hpp"
#include "hf/hf_config.hpp"
#include "hf/hf_json.hpp"
#include "hf/hf_weights.hpp"

namespace tessera {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr const char* kLmHead = "lm_head.weight";
constexpr const char* kEmbedding = "embedding.weight";

// Files of the tokenizer and of generation, which mean the same in both layouts.
bool travels(const std::string& name) {
  for (const char* whole : {"tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json"})
    if (name == whole) return true;
  return name.starts_with("chat_template") || (name.starts_with("tokenizer") && name.ends_with(".json"));
}

void copy_along(const fs::path& from, const fs::path& to, std::vector<std::string>& notes) {
  std::vector<std::string> copied;
  for (const auto& entry : fs::directory_iterator(from)) {
    const std::string name = entry.path().filename().string();
    if (!entry.is_regular_file() || !travels(name)) continue;
    write_file(to / name, read_file(entry.path()));
    copied.push_back(name);
  }
  std::sort(copied.begin(), copied.end());
  for (const std::string& name : copied) notes.push_back("copied: " + name);
}

// The dtype of most tensors, and by name where another is found.
json dtype_table(const std::vector<std::pair<std::string, at::ScalarType>>& dtypes) {
  std::map<std::string, int64_t> votes;
  for (const auto& [name, dtype] : dtypes) ++votes[safetensors_dtype(dtype)];
  const auto most = std::max_element(votes.begin(), votes.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  if (most == votes.end()) return json::object();
  json out{{"most", most->first}, {"others", json::object()}};
  for (const auto& [name, dtype] : dtypes)
    if (safetensors_dtype(dtype) != most->first) out["others"][name] = safetensors_dtype(dtype);
  return out;
}

// What an import left in the state, checked, since a state can be edited.
struct Origin {
  json config, dtypes;
  bool has_config = false, has_dtypes = false, tied_lm_head = true;

  explicit Origin(const json& state) {
    if (!state.is_object()) return;
    if (auto found = state.find("config"); found != state.end() && found->is_object()) config = *found, has_config = true;
    if (auto found = state.find("dtypes"); found != state.end() && found->is_object()) dtypes = *found, has_dtypes = true;
    if (auto found = state.find("tied_lm_head"); found != state.end() && found->is_boolean()) tied_lm_head = found->get<bool>();
  }
  std::optional<at::ScalarType> dtype(const std::string& name) const {
    if (!has_dtypes) return std::nullopt;
    const json others = dtypes.value("others", json::object());
    const json word = others.contains(name) ? others[name] : dtypes.value("most", json());
    return word.is_string() ? scalar_type_of(word.get<std::string>()) : std::nullopt;
  }
};

json state_of(const fs::path& folder, const HubFolder& hub) {
  std::vector<std::pair<std::string, at::ScalarType>> dtypes;
  for (size_t i = 0; i < hub.tensors().size(); ++i)
    if (hub.has(i)) dtypes.emplace_back(hub.tensors()[i].name, hub.dtype(i));
  return {{"config", read_hf_json(folder / "config.json")}, {"dtypes", dtype_table(dtypes)}, {"tied_lm_head", hub.stores_tied_lm_head()}};
}

const char* hf_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16: return "bfloat16";
    case at::kHalf: return "float16";
    case at::kDouble: return "float64";
    default: return "float32";
  }
}

// Without a trailing slash, so that its last part is the folder's name.
fs::path new_folder(const fs::path& given) {
  fs::path out = fs::absolute(given).lexically_normal();
  if (out.filename().empty()) out = out.parent_path();
  if (fs::exists(out)) throw Error(ExitCode::kUsage, fmt::format("{}: is there already", out.string()), "name a folder that does not exist");
  return out;
}

}  // namespace

Config with_sets(const Config& config, const std::vector<std::string>& sets, const Registry& registry) {
  return sets.empty() ? config : parse_config(to_toml(config), config.source, sets, registry);
}

json hf_state(const fs::path& folder, const ModelPlan& plan) { return state_of(folder, HubFolder(folder, plan, true)); }

LoadReport load_hf(const fs::path& folder, const ModelPlan& plan, Store& store, bool partial, const std::vector<std::string>& map) {
  at::NoGradGuard no_grad;
  const HubFolder hub(folder, plan, partial, map);
  for (size_t i = 0; i < hub.tensors().size(); ++i) {
    const HubTensor& t = hub.tensors()[i];
    if (!hub.has(i)) continue;
    if (!store.has(t.source)) continue;
    const at::Tensor values = hub.tensor(i);
    const int64_t index = std::max<int64_t>(t.index, 0);
    if (!t.is_buffer) store.assign(t.source, masters, values, index * values.numel());
    else (t.index < 0 ? store.buffer(t.source) : store.buffer(t.source).select(0, index)).copy_(values);
  }
  store.touch();
  return hub.report();
}

std::vector<std::string> convert_to_tessera(const fs::path& in, const fs::path& to, const Registry& registry, const ConvertOptions& options) {
  const fs::path out = new_folder(to);
  std::vector<std::string> notes;
  const Config config = with_sets(import_hf_config(in / "config.json", registry, options.waived, notes), options.sets, registry);
  const ModelPlan plan = make_plan(config);
  const HubFolder hub(in, plan);
  const auto& tensors = hub.tensors();

  std::vector<TensorSpec> specs;
  std::vector<std::pair<size_t, size_t>> ranges;  // of `tensors`, one a spec: slices of one tensor lie one after another
  const auto rows = tensor_rows(plan);
  for (size_t i = 0, row = 0; i < tensors.size(); ++row) {
    size_t end = i;
    at::ScalarType dtype = hub.dtype(i);
    for (; end < tensors.size() && tensors[end].source == tensors[i].source; ++end) dtype = c10::promoteTypes(dtype, hub.dtype(end));
    if (options.dtype && !tensors[i].is_buffer) dtype = *options.dtype;
    specs.push_back({.name = tensors[i].source, .dtype = dtype, .shape = rows[row].shape()});
    ranges.emplace_back(i, end);
    i = end;
  }

  CheckpointState state;
  state.hf = state_of(in, hub);
  save_checkpoint_files(out, config, registry, state, [&](const fs::path& aside) {
    SafetensorsFolderWriter writer(aside, specs, {{"format", "pt"}}, options.max_shard_bytes);
    for (size_t s = 0; s < specs.size(); ++s) {
      const auto [begin, end] = ranges[s];
      if (tensors[begin].index < 0) {
        writer.write(specs[s].name, hub.tensor(begin).to(specs[s].dtype));
        continue;
      }
      at::Tensor whole = at::empty(specs[s].shape, at::TensorOptions(specs[s].dtype));
      for (size_t i = begin; i < end; ++i) whole.select(0, tensors[i].index).copy_(hub.tensor(i));
      writer.write(specs[s].name, whole);
    }
    writer.finish();
    copy_along(in, aside, notes);
  });
  notes.push_back(fmt::format("wrote {} tensors to {}", specs.size(), out.string()));
  return notes;
}

std::vector<std::string> convert_to_hf(const fs::path& in, const fs::path& to, const Registry& registry, const ConvertOptions& options) {
  const fs::path out = new_folder(to);
  std::vector<std::string> notes;
  const OpenCheckpoint checkpoint = open_checkpoint(in);
  const Config config = checkpoint_config(checkpoint, options.sets, registry);
  const Origin origin(checkpoint.state.hf);
  json config_json = export_hf_config(config, registry, origin.has_config ? &origin.config : nullptr, notes);
  const ModelPlan plan = make_plan(config);
  std::vector<HubTensor> tensors = hub_tensors(plan);
  // HF does not tie: a tied model stores the matrix twice, unless it came from a folder that did not.
  if (config.model.tie_embeddings && origin.tied_lm_head)
    tensors.push_back({.name = kLmHead, .shape = {config.model.vocab_size, config.model.hidden_size}, .source = kEmbedding});

  std::vector<TensorSpec> specs;
  for (const HubTensor& tensor : tensors) {
    const TensorEntry* entry = checkpoint.model.find(tensor.source);
    if (!entry) throw Error(ExitCode::kRuntime, fmt::format("{}: holds no tensor '{}'", checkpoint.model.path().string(), tensor.source));
    std::vector<int64_t> shape = entry->shape;
    if (tensor.index >= 0 && !shape.empty() && tensor.index < shape[0]) shape.erase(shape.begin());
    if (shape != tensor.shape) throw Error(ExitCode::kRuntime, fmt::format("{}: '{}' has another shape than its configuration says", checkpoint.model.path().string(), tensor.source));
    at::ScalarType dtype = origin.dtype(tensor.name).value_or(entry->dtype);
    if (tensor.is_buffer) dtype = at::kFloat;
    else if (options.dtype) dtype = *options.dtype;
    specs.push_back({.name = tensor.name, .dtype = dtype, .shape = tensor.shape});
  }
  if (options.dtype || !(config_json.contains("dtype") || config_json.contains("torch_dtype"))) {
    const char* word = hf_dtype(options.dtype.value_or(specs.front().dtype));
    if (config_json.contains("dtype")) config_json["dtype"] = word;
    if (config_json.contains("torch_dtype") || !config_json.contains("dtype")) config_json["torch_dtype"] = word;
  }

  const fs::path parent = out.parent_path();
  make_folder(parent);
  const fs::path aside = parent / fmt::format(".saving-{}-{}", out.filename().string(), getpid());
  std::error_code ignored;
  fs::remove_all(aside, ignored);
  try {
    make_folder(aside);
    SafetensorsFolderWriter writer(aside, specs, {{"format", "pt"}}, options.max_shard_bytes);
    for (size_t i = 0; i < tensors.size(); ++i) {
      const at::Tensor stored = checkpoint.model.tensor(tensors[i].source);
      writer.write(tensors[i].name, (tensors[i].index < 0 ? stored : stored.select(0, tensors[i].index)).to(specs[i].dtype));
    }
    writer.finish();
    copy_along(checkpoint.folder, aside, notes);
    write_file(aside / "config.json", hf_json_text(config_json));
    sync_folder(aside);
    rename_into_place(aside, out);
  } catch (...) {
    fs::remove_all(aside, ignored);
    throw;
  }
  notes.push_back(fmt::format("wrote {} tensors to {}", specs.size(), out.string()));
  return notes;
}

}  // namespace tessera
