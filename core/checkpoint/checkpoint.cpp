#include "checkpoint/checkpoint.hpp"

#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>

namespace tessera {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

std::optional<int64_t> step_of(const fs::path& folder) {
  const std::string name = folder.filename().string();
  if (!name.starts_with("step-")) return std::nullopt;
  int64_t step = 0;
  auto [end, error] = std::from_chars(name.data() + 5, name.data() + name.size(), step);
  if (error != std::errc() || end != name.data() + name.size()) return std::nullopt;
  return step;
}

// A part of a state.json that may have been edited.
const json& part(const json& object, const char* key, const fs::path& file) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  if (!object.is_object() || found == object.end()) throw Error(ExitCode::kRuntime, fmt::format("{}: not a checkpoint's state: has no '{}'", file.string(), key));
  return *found;
}

int64_t count(const json& object, const char* key, const fs::path& file) {
  const json& value = part(object, key, file);
  if (value.is_number_unsigned() && value.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX)) return value.get<int64_t>();
  throw Error(ExitCode::kRuntime, fmt::format("{}: not a checkpoint's state: {} must be an integer in [0, 2^63), got {}", file.string(), key, shorten(value.dump())));
}

std::string some(const std::vector<std::string>& names) {
  constexpr size_t kMost = 20;
  std::vector<std::string> head(names.begin(), names.begin() + static_cast<std::ptrdiff_t>(std::min(names.size(), kMost)));
  std::string text = fmt::format("{}", fmt::join(head, ", "));
  if (names.size() > kMost) text += fmt::format(" and {} more", names.size() - kMost);
  return text;
}

}  // namespace

std::vector<fs::path> list_checkpoints(const fs::path& folder) {
  std::vector<std::pair<int64_t, fs::path>> found;
  if (!is_there(folder)) return {};
  std::error_code code;
  fs::directory_iterator entries(folder, code);
  if (code) throw Error(ExitCode::kRuntime, fmt::format("{}: the folder cannot be read: {}", folder.string(), code.message()));
  for (const auto& entry : entries)
    if (auto step = step_of(entry.path()); step && is_there(entry.path() / "state.json")) found.emplace_back(*step, entry.path());
  std::sort(found.begin(), found.end());
  std::vector<fs::path> out;
  for (auto& [step, path] : found) out.push_back(path);
  return out;
}

std::string prune_checkpoints(const fs::path& folder, int64_t keep) {
  const auto all = list_checkpoints(folder);
  const auto surplus = keep > 0 ? std::max<int64_t>(0, static_cast<int64_t>(all.size()) - keep) : 0;
  std::string failed;
  const auto note = [&](const fs::path& path, const std::error_code& code) {
    if (code && failed.empty()) failed = fmt::format("{}: cannot be removed: {}", path.string(), code.message());
  };
  std::error_code code;
  for (int64_t i = 0; i < surplus; ++i) {
    // Renamed first: a crash in the middle of the removal must not leave half a checkpoint under a complete one's name.
    const fs::path& old = all[static_cast<size_t>(i)];
    fs::rename(old, folder / fmt::format("{}removed-{}", kAside, old.filename().string()), code);
    note(old, code);
  }
  std::vector<fs::path> leftovers;
  for (const auto& entry : fs::directory_iterator(folder, code))
    if (entry.path().filename().string().starts_with(kAside)) leftovers.push_back(entry.path());
  for (const fs::path& path : leftovers) {
    fs::remove_all(path, code);
    note(path, code);
  }
  return failed;
}

OpenCheckpoint open_checkpoint(const fs::path& given, bool optimizer, bool check) {
  fs::path folder = given;
  std::error_code code;
  if (!fs::is_directory(folder, code)) throw Error(ExitCode::kRuntime, fmt::format("{}: no such folder", folder.string()), "name a run's folder or one of its checkpoints/step-N");
  if (!is_there(folder / "state.json")) {
    for (const fs::path& below : {folder / "checkpoints", folder})
      if (auto all = list_checkpoints(below); !all.empty()) {
        folder = all.back();
        break;
      }
    if (!is_there(folder / "state.json")) {
      const bool hub = fs::exists(folder / "config.json");
      throw Error(ExitCode::kRuntime, fmt::format("{}: no complete checkpoint there", folder.string()),
                  hub ? fmt::format("it looks like a Hugging Face checkpoint: `tessera convert {} OUT --to tessera` first", folder.string()) : "");
    }
  }
  const fs::path file = folder / "state.json";
  const json document = strict_json(read_file(file, int64_t{64} << 20), file.string(), 64);
  CheckpointState state;
  if (const int64_t format = count(document, "format", file); format > kCheckpointFormat)
    throw Error(ExitCode::kRuntime, fmt::format("{}: format {} is newer than this program's {}", file.string(), format, kCheckpointFormat));
  state.step = count(document, "step", file);
  state.tokens = count(document, "tokens", file);
  state.data = part(document, "data", file);
  state.hf = part(document, "hf", file);
  state.extra = part(document, "extra", file);
  state.optimizer_steps = document.contains("optimizer_steps") ? count(document, "optimizer_steps", file) : state.step;
  const json& files = part(document, "files", file);
  if (!files.is_object()) throw Error(ExitCode::kRuntime, fmt::format("{}: not a checkpoint's state: files must be an object, got {}", file.string(), files.type_name()));
  for (const auto& [name, facts] : files.items()) {
    const fs::path path = folder / fs::path(name).filename();
    std::error_code code;
    if (!fs::is_regular_file(path, code)) throw Error(ExitCode::kRuntime, fmt::format("{}: missing from the checkpoint", path.string()));
    const int64_t bytes = count(facts, "bytes", file), checksum = count(facts, "crc32", file);
    const auto size = static_cast<int64_t>(fs::file_size(path));
    if (size != bytes) throw Error(ExitCode::kRuntime, fmt::format("{}: damaged: {} bytes, {} when it was written", path.string(), size, bytes), "take an older checkpoint");
    const bool opened = optimizer || !path.filename().string().starts_with(kOptimizer);
    if (opened && check && file_crc32(path) != checksum)
      throw Error(ExitCode::kRuntime, fmt::format("{}: damaged: its CRC-32 is not that of when it was written", path.string()), "take an older checkpoint");
  }
  OpenCheckpoint open{.folder = folder, .state = std::move(state), .model = SafetensorsFolder::open(folder)};
  if (optimizer && SafetensorsFolder::exists(folder, kOptimizer)) open.optimizer = SafetensorsFolder::open(folder, kOptimizer);
  return open;
}

Config checkpoint_config(const OpenCheckpoint& checkpoint, const std::vector<std::string>& sets, const Registry& registry) {
  return load_config(checkpoint.folder / "config.toml", sets, registry);
}

namespace {

std::string renamed(const std::string& name, const std::vector<std::string>& map) {
  for (const std::string& rule : map) {
    const auto equals = rule.find('=');
    if (equals == std::string::npos)
      throw Error(ExitCode::kUsage, fmt::format("checkpoint.initial_load_map: must be \"from=to\", got \"{}\"", rule));
    if (name.starts_with(rule.substr(0, equals))) return rule.substr(equals + 1) + name.substr(equals);
  }
  return name;
}

}  // namespace

LoadReport load_weights(const SafetensorsFolder& file, Store& store, bool partial, const std::vector<std::string>& map) {
  at::NoGradGuard no_grad;
  LoadReport report;
  std::map<std::string, std::string> source_of;  // the model's name -> the file's
  for (const std::string& name : file.names()) {
    auto [place, added] = source_of.emplace(renamed(name, map), name);
    if (!added) throw Error(ExitCode::kUsage, fmt::format("checkpoint.initial_load_map: '{}' and '{}' both become '{}'", place->second, name, place->first));
  }
  std::vector<std::pair<TensorRow, std::string>> take;
  for (const TensorRow& row : tensor_rows(store.plan())) {
    auto found = source_of.find(row.name);
    if (found == source_of.end()) {
      report.missing.push_back(row.name);
      continue;
    }
    const TensorEntry* entry = file.find(found->second);
    if (entry->shape != row.shape())
      report.misshapen.push_back(fmt::format("{}: [{}] in the file, [{}] in the model", row.name, fmt::join(entry->shape, ", "), fmt::join(row.shape(), ", ")));
    else take.emplace_back(row, found->second);
    source_of.erase(found);
  }
  for (const auto& [name, original] : source_of) report.unexpected.push_back(original);
  if (!partial && !(report.missing.empty() && report.unexpected.empty() && report.misshapen.empty())) {
    std::string text = fmt::format("{}: the checkpoint is of another architecture", file.path().string());
    if (!report.missing.empty()) text += fmt::format("\n  missing ({}): {}", report.missing.size(), some(report.missing));
    if (!report.unexpected.empty()) text += fmt::format("\n  unexpected ({}): {}", report.unexpected.size(), some(report.unexpected));
    if (!report.misshapen.empty()) text += fmt::format("\n  misshapen ({}): {}", report.misshapen.size(), some(report.misshapen));
    throw Error(ExitCode::kRuntime, text);
  }
  for (const auto& [row, name] : take) {
    if (!store.has(row.name)) continue;
    if (row.param) store.assign(row.name, masters, file.tensor(name));
    else store.buffer(row.name).copy_(file.tensor(name));
  }
  report.loaded = static_cast<int64_t>(take.size());
  store.touch();
  return report;
}

void load_optimizer(const OpenCheckpoint& checkpoint, Store& store, Optimizer& optimizer) {
  at::NoGradGuard no_grad;
  if (!checkpoint.optimizer)
    throw Error(ExitCode::kRuntime, fmt::format("{}: holds no optimizer state, so a run cannot be resumed from it", checkpoint.folder.string()),
                "start a new run from its weights with [checkpoint] initial_load_path");
  for (const std::string& slot : Optimizer::slots())
    for (const TensorRow& row : tensor_rows(store.plan())) {
      if (!row.param || !store.trainable(row.name)) continue;
      const std::string name = moment_name(slot, row.name);
      const TensorEntry* entry = checkpoint.optimizer->find(name);
      if (!entry || entry->shape != row.shape())
        throw Error(ExitCode::kRuntime, fmt::format("{}: {} is {}", checkpoint.optimizer->path().string(), name, entry ? "misshapen" : "missing"));
      if (store.has(row.name)) store.assign(row.name, optimizer.slot(slot), checkpoint.optimizer->tensor(name));
    }
  optimizer.set_steps_taken(checkpoint.state.optimizer_steps);
}

}  // namespace tessera
