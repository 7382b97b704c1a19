#include "checkpoint/saver.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <unistd.h>

#include "checkpoint/together.hpp"

namespace tessera {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

json plugin_versions(const Config& config, const Registry& registry) {
  json out = json::object();
  for (const Binding& binding : config.bindings) out[std::string(binding.type->type())] = binding.type->version();
  if (config.head) out[std::string(config.head->type->type())] = config.head->type->version();
  return out;
}

fs::path aside_of(const fs::path& folder, int64_t process) {
  return (folder.has_parent_path() ? folder.parent_path() : fs::path(".")) / fmt::format("{}{}-{}", kAside, folder.filename().string(), process);
}

// An empty folder to write into, for a checkpoint that is not there yet.
void make_aside(const fs::path& folder, const fs::path& aside) {
  if (is_there(folder)) throw Error(ExitCode::kRuntime, fmt::format("{}: is there already", folder.string()), "move it away");
  make_folder(aside.parent_path());
  std::error_code ignored;
  fs::remove_all(aside, ignored);
  make_folder(aside);
}

json facts_of(const fs::path& file) { return {{"bytes", fs::file_size(file)}, {"crc32", file_crc32(file)}}; }

// The last that is written: with state.json a checkpoint is complete.
void finish_aside(const fs::path& folder, const fs::path& aside, const Config& config, const Registry& registry, const CheckpointState& state, const json& files) {
  const json document{{"format", kCheckpointFormat}, {"step", state.step}, {"tokens", state.tokens}, {"plugins", plugin_versions(config, registry)},
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

std::vector<TensorSpec> moment_specs(const Store& store) {
  std::vector<TensorSpec> specs;
  for (const std::string& slot : Optimizer::slots())
    for (const TensorRow& row : tensor_rows(store.plan()))
      if (row.param && store.trainable(row.name)) specs.push_back({.name = moment_name(slot, row.name), .dtype = at::kFloat, .shape = row.shape()});
  return specs;
}

}  // namespace

Saver::Saver(const Config& config, const Registry& registry, Store& store, Optimizer* optimizer, bool in_background)
    : config_(config), registry_(registry), store_(store), optimizer_(optimizer), in_background_(in_background) {}

Saver::~Saver() { wait(); }

void Saver::wait() const {
  if (flight_.valid()) flight_.wait();
}

void Saver::finish() {
  wait();
  failed_ = false;
  if (flight_.valid()) flight_.get();
}

bool Saver::writes_parameters() const { return !store_.ranks() || store_.ranks()->place().dp_replicate == 0; }

bool Saver::writes_buffers() const {
  if (!store_.ranks()) return true;
  const Place& place = store_.ranks()->place();
  return place.dp_replicate == 0 && place.dp_shard == 0 && place.cp == 0 && place.tp == 0;
}

Saver::Tensors Saver::tensors() {
  const at::NoGradGuard no_grad;
  Tensors all;
  if (writes_parameters()) {
    all.flats[""] = masters;
    if (optimizer_)
      for (const std::string& slot : Optimizer::slots()) all.flats[slot] = optimizer_->slot(slot);
  }
  if (writes_buffers())
    for (const TensorRow& row : tensor_rows(store_.plan()))
      if (row.buffer && store_.has(row.name)) all.buffers[row.name] = store_.buffer(row.name);
  if (!in_background_) return all;
  for (auto& [name, flat] : all.flats) {
    auto& copies = copies_[name];
    for (FlatGroup& group : store_.groups()) {
      const at::Tensor& from = flat(group);
      if (!from.defined()) continue;
      at::Tensor& copy = copies[&group];
      if (!copy.defined()) copy = at::empty(from.sizes(), at::kFloat);
      copy.copy_(from);
    }
    flat = [&copies](FlatGroup& group) -> at::Tensor& { return copies.at(&group); };
  }
  for (auto& [name, buffer] : all.buffers) buffer = buffer.to(at::TensorOptions(at::kCPU), /*non_blocking=*/false, /*copy=*/true);
  return all;
}

void Saver::save(const fs::path& folder, const CheckpointState& state, const std::function<void()>& before, const std::function<void()>& after) {
  finish();
  CheckpointState whole = state;
  whole.optimizer_steps = optimizer_ ? optimizer_->steps_taken() : 0;
  const auto work = [this, folder, state = std::move(whole), tensors = tensors(), before, after] {
    try {
      write(folder, state, tensors, before);
      if (after) after();
    } catch (...) {
      failed_ = in_background_;
      throw;
    }
  };
  if (!in_background_) return work();
  flight_ = std::async(std::launch::async, work);
}

// Every rank writes what it counts (see Store::for_stretches); the first one makes the files and what belongs to them.
void Saver::write(const fs::path& folder, const CheckpointState& state, const Tensors& tensors, const std::function<void()>& before) const {
  const at::NoGradGuard no_grad;
  const Together together(store_.ranks());
  const bool first = together.rank() == 0;
  fs::path aside;
  std::vector<SafetensorsSharedWriter> writers;  // the model's, the moments'
  const auto declare = [&](int64_t process) {
    aside = aside_of(folder, process);
    writers.emplace_back(aside, model_specs(store_), "model");
    if (optimizer_) writers.emplace_back(aside, moment_specs(store_), kOptimizer);
  };
  try {
    const auto processes = together.round([&]() -> json {
      if (!first) return nullptr;
      if (before) before();
      declare(getpid());
      make_aside(folder, aside);
      for (SafetensorsSharedWriter& writer : writers) writer.create();
      write_file(aside / "config.toml", to_toml(config_));
      return getpid();
    });
    together.round([&] {
      if (!first) declare(processes[0].get<int64_t>());
      for (const auto& [name, buffer] : tensors.buffers) writers[0].write(name, 0, buffer);
      for (const auto& [slot, flat] : tensors.flats)
        for (const TensorRow& row : tensor_rows(store_.plan())) {
          if (!row.param || !store_.has(row.name) || (!slot.empty() && !store_.trainable(row.name))) continue;
          const std::string name = slot.empty() ? row.name : moment_name(slot, row.name);
          store_.for_stretches(row.name, flat, [&](int64_t global, const at::Tensor& values) { writers[slot.empty() ? 0 : 1].write(name, global, values); }, /*counted=*/true);
        }
      for (SafetensorsSharedWriter& writer : writers) writer.flush();
      return nullptr;
    });
    // Each file is read once, by one of the ranks.
    const auto facts = together.round([&] {
      std::vector<std::string> names{"config.toml"};
      for (const SafetensorsSharedWriter& writer : writers)
        for (const std::string& name : writer.files()) names.push_back(name);
      json mine = json::object();
      for (size_t i = static_cast<size_t>(together.rank()); i < names.size(); i += static_cast<size_t>(together.size())) mine[names[i]] = facts_of(aside / names[i]);
      return mine;
    });
    together.round([&] {
      json files = json::object();
      for (const json& mine : facts) files.update(mine);
      if (first) finish_aside(folder, aside, config_, registry_, state, files);
      return nullptr;
    });
  } catch (...) {
    std::error_code ignored;
    if (first) fs::remove_all(aside, ignored);
    throw;
  }
}

void save_checkpoint_files(const fs::path& folder, const Config& config, const Registry& registry, const CheckpointState& state,
                           const std::function<void(const fs::path&)>& write_tensors) {
  const fs::path aside = aside_of(folder, getpid());
  try {
    make_aside(folder, aside);
    write_tensors(aside);
    write_file(aside / "config.toml", to_toml(config));
    json files = json::object();
    for (const auto& entry : fs::directory_iterator(aside)) files[entry.path().filename().string()] = facts_of(entry.path());
    finish_aside(folder, aside, config, registry, state, files);
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(aside, ignored);
    throw;
  }
}

}  // namespace tessera
