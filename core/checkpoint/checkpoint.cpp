#include "checkpoint/checkpoint.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>

namespace tessera {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr int64_t kFormat = 1;
constexpr const char* kAside = ".saving-";
constexpr const char* kOptimizer = "optimizer";  // how its files' names begin

// Whether there is such a file. What cannot be examined is an error and not absent: a run would begin anew over what it cannot see.
bool there(const fs::path& path) {
  std::error_code code;
  const bool found = fs::exists(path, code);
  if (code) throw Error(ExitCode::kRuntime, fmt::format("{}: cannot be examined: {}", path.string(), code.message()));
  return found;
}

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

json plugin_versions(const Config& config, const Registry& registry) {
  json out = json::object();
  for (const Binding& binding : config.bindings) out[std::string(binding.type->type())] = binding.type->version();
  if (config.head) out[std::string(config.head->type->type())] = config.head->type->version();
  return out;
}

}  // namespace

namespace {

fs::path aside_of(const fs::path& folder, int64_t process) {
  return (folder.has_parent_path() ? folder.parent_path() : fs::path(".")) / fmt::format("{}{}-{}", kAside, folder.filename().string(), process);
}

// An empty folder to write into, for a checkpoint that is not there yet.
void make_aside(const fs::path& folder, const fs::path& aside) {
  if (there(folder)) throw Error(ExitCode::kRuntime, fmt::format("{}: is there already", folder.string()), "move it away");
  make_folder(aside.parent_path());
  std::error_code ignored;
  fs::remove_all(aside, ignored);
  make_folder(aside);
}

// The last that is written: with state.json a checkpoint is complete.
void finish_aside(const fs::path& folder, const fs::path& aside, const Config& config, const Registry& registry, const CheckpointState& state, const json& files) {
  const json document{{"format", kFormat}, {"step", state.step}, {"tokens", state.tokens}, {"plugins", plugin_versions(config, registry)},
                      {"data", state.data}, {"hf", state.hf}, {"extra", state.extra}, {"optimizer_steps", state.optimizer_steps}, {"files", files}};
  write_file(aside / "state.json", document.dump(1) + "\n");
  sync_folder(aside);
  rename_into_place(aside, folder);
}

std::vector<TensorSpec> model_specs(const Store& store) {
  std::vector<TensorSpec> specs;
  for (const TensorRow& row : tensor_rows(store.plan())) specs.push_back({.name = row.name, .dtype = at::kFloat, .shape = row.shape()});
  return specs;
}

std::string moment_name(const std::string& slot, const std::string& parameter) { return "optimizer." + slot + "." + parameter; }

std::vector<TensorSpec> moment_specs(const Store& store) {
  std::vector<TensorSpec> specs;
  for (const std::string& slot : Optimizer::slots())
    for (const TensorRow& row : tensor_rows(store.plan()))
      if (row.param && store.trainable(row.name)) specs.push_back({.name = moment_name(slot, row.name), .dtype = at::kFloat, .shape = row.shape()});
  return specs;
}

// Does a rank's part of a work that all ranks do at once. Where one of them fails, all throw the first one's error.
void together(const MeshGroups& ranks, at::Device device, const std::function<void()>& part) {
  constexpr int64_t kBytes = 1024;
  std::string failure, help;
  try {
    part();
  } catch (const Error& error) {
    failure = error.message().substr(0, kBytes / 2 - 1), help = error.help().substr(0, kBytes / 2 - 1);
  } catch (const std::exception& error) {
    failure = std::string(error.what()).substr(0, kBytes / 2 - 1);
  }
  if (!ranks.all()) {
    if (!failure.empty()) throw Error(ExitCode::kRuntime, failure, help);
    return;
  }
  at::Tensor own = at::zeros({kBytes}, at::kByte), all = at::empty({kBytes * ranks.all()->size()}, at::TensorOptions(at::kByte).device(device));
  std::copy(failure.begin(), failure.end(), own.mutable_data_ptr<uint8_t>());
  std::copy(help.begin(), help.end(), own.mutable_data_ptr<uint8_t>() + kBytes / 2);
  ranks.all()->all_gather(all, own.to(device));
  const at::Tensor host = all.to(at::kCPU);
  for (int64_t r = 0; r < ranks.all()->size(); ++r) {
    const char* text = reinterpret_cast<const char*>(host.const_data_ptr<uint8_t>()) + r * kBytes;
    if (*text) throw Error(ExitCode::kRuntime, text, text + kBytes / 2);
  }
}

// Every rank writes what it counts (see Store::for_stretches) into files of full size, one rank makes them and what belongs to them.
void save_over_ranks(const fs::path& folder, const Config& config, const Registry& registry, Store& store, Optimizer* optimizer, const CheckpointState& state) {
  const MeshGroups& ranks = *store.ranks();
  const Place& place = ranks.place();
  const bool first = place.rank == 0;
  ranks.whereabouts().place = "a save";
  // The folder that is written aside is called by the first rank's process.
  at::Tensor numbers = at::zeros({1}, at::TensorOptions(at::kLong).device(store.device()));
  if (first) numbers.fill_(static_cast<int64_t>(getpid()));
  if (ranks.all()) ranks.all()->all_reduce(numbers);
  const fs::path aside = aside_of(folder, numbers.item<int64_t>());
  const Metadata metadata{{"format", "pt"}};
  SafetensorsSharedWriter model(aside, model_specs(store), metadata);
  std::optional<SafetensorsSharedWriter> moments;
  if (optimizer) moments.emplace(aside, moment_specs(store), metadata, 5'000'000'000, kOptimizer);
  try {
    together(ranks, store.device(), [&] {
      if (!first) return;
      make_aside(folder, aside);
      model.create();
      if (moments) moments->create();
      write_file(aside / "config.toml", to_toml(config));
    });
    together(ranks, store.device(), [&] {
      const bool buffers = place.dp_replicate == 0 && place.dp_shard == 0 && place.cp == 0 && place.tp == 0;
      for (const TensorRow& row : tensor_rows(store.plan())) {
        if (!store.has(row.name)) continue;
        if (row.buffer) {
          if (buffers) model.write(row.name, 0, store.buffer(row.name));
          continue;
        }
        store.for_stretches(row.name, masters, [&](int64_t first_element, const at::Tensor& values) { model.write(row.name, first_element, values); }, /*counted=*/true);
        if (!moments || !store.trainable(row.name)) continue;
        for (const std::string& slot : Optimizer::slots())
          store.for_stretches(row.name, optimizer->slot(slot),
                              [&](int64_t first_element, const at::Tensor& values) { moments->write(moment_name(slot, row.name), first_element, values); }, /*counted=*/true);
      }
      model.flush();
      if (moments) moments->flush();
    });
    // Each file is read once, by one of the ranks.
    std::vector<std::string> names = model.files();
    if (moments)
      for (const std::string& name : moments->files()) names.push_back(name);
    at::Tensor checksums = at::zeros({static_cast<int64_t>(names.size())}, at::kLong);
    together(ranks, store.device(), [&] {
      for (size_t i = 0; i < names.size(); ++i)
        if (static_cast<int64_t>(i) % ranks.mesh().size() == place.rank) checksums.mutable_data_ptr<int64_t>()[i] = file_crc32(aside / names[i]);
    });
    at::Tensor sums = checksums.to(store.device());
    if (ranks.all()) ranks.all()->all_reduce(sums);
    checksums = sums.to(at::kCPU);
    together(ranks, store.device(), [&] {
      if (!first) return;
      json files = json::object();
      for (const auto& entry : fs::directory_iterator(aside)) {
        const std::string name = entry.path().filename().string();
        const auto found = std::find(names.begin(), names.end(), name);
        const int64_t checksum = found == names.end() ? file_crc32(entry.path()) : checksums.const_data_ptr<int64_t>()[found - names.begin()];
        files[name] = {{"bytes", entry.file_size()}, {"crc32", checksum}};
      }
      finish_aside(folder, aside, config, registry, state, files);
    });
  } catch (...) {
    std::error_code ignored;
    if (first) fs::remove_all(aside, ignored);
    throw;
  }
}

}  // namespace

void save_checkpoint_files(const fs::path& folder, const Config& config, const Registry& registry, const CheckpointState& state,
                           const std::function<void(const fs::path&)>& write_tensors) {
  const fs::path aside = aside_of(folder, getpid());
  try {
    make_aside(folder, aside);
    write_tensors(aside);
    write_file(aside / "config.toml", to_toml(config));
    json files = json::object();
    for (const auto& entry : fs::directory_iterator(aside))
      files[entry.path().filename().string()] = {{"bytes", entry.file_size()}, {"crc32", file_crc32(entry.path())}};
    finish_aside(folder, aside, config, registry, state, files);
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(aside, ignored);
    throw;
  }
}

void save_checkpoint(const fs::path& folder, const Config& config, const Registry& registry, Store& store, Optimizer* optimizer, const CheckpointState& state) {
  at::NoGradGuard no_grad;
  CheckpointState whole = state;
  whole.optimizer_steps = optimizer ? optimizer->steps_taken() : 0;
  if (store.ranks()) return save_over_ranks(folder, config, registry, store, optimizer, whole);
  save_checkpoint_files(folder, config, registry, whole, [&](const fs::path& aside) {
    const auto rows = tensor_rows(store.plan());
    SafetensorsFolderWriter model(aside, model_specs(store));
    for (const TensorRow& row : rows) model.write(row.name, row.param ? store.parameter(row.name) : store.buffer(row.name));
    model.finish();
    if (!optimizer) return;
    SafetensorsFolderWriter moments(aside, moment_specs(store), {{"format", "pt"}}, 5'000'000'000, kOptimizer);
    for (const std::string& slot : Optimizer::slots())
      for (const TensorRow& row : rows)
        if (row.param && store.trainable(row.name)) moments.write(moment_name(slot, row.name), optimizer->moment(slot, row.name));
    moments.finish();
  });
}

std::vector<fs::path> list_checkpoints(const fs::path& folder) {
  std::vector<std::pair<int64_t, fs::path>> found;
  if (!there(folder)) return {};
  std::error_code code;
  fs::directory_iterator entries(folder, code);
  if (code) throw Error(ExitCode::kRuntime, fmt::format("{}: the folder cannot be read: {}", folder.string(), code.message()));
  for (const auto& entry : entries)
    if (auto step = step_of(entry.path()); step && there(entry.path() / "state.json")) found.emplace_back(*step, entry.path());
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
  if (!there(folder / "state.json")) {
    for (const fs::path& below : {folder / "checkpoints", folder})
      if (auto all = list_checkpoints(below); !all.empty()) {
        folder = all.back();
        break;
      }
    if (!there(folder / "state.json")) {
      const bool hub = fs::exists(folder / "config.json");
      throw Error(ExitCode::kRuntime, fmt::format("{}: no complete checkpoint there", folder.string()),
                  hub ? fmt::format("it looks like a Hugging Face checkpoint: `tessera convert {} OUT --to tessera` first", folder.string()) : "");
    }
  }
  const fs::path file = folder / "state.json";
  const json document = strict_json(read_file(file, int64_t{64} << 20), file.string(), 64);
  CheckpointState state;
  if (const int64_t format = count(document, "format", file); format > kFormat)
    throw Error(ExitCode::kRuntime, fmt::format("{}: format {} is newer than this program's {}", file.string(), format, kFormat));
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
      const std::string name = "optimizer." + slot + "." + row.name;
      const TensorEntry* entry = checkpoint.optimizer->find(name);
      if (!entry || entry->shape != row.shape())
        throw Error(ExitCode::kRuntime, fmt::format("{}: {} is {}", checkpoint.optimizer->path().string(), name, entry ? "misshapen" : "missing"));
      if (store.has(row.name)) store.assign(row.name, optimizer.slot(slot), checkpoint.optimizer->tensor(name));
    }
  optimizer.set_steps_taken(checkpoint.state.optimizer_steps);
}

}  // namespace tessera
