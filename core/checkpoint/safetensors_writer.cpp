#include <c10/core/ScalarType.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "checkpoint/safetensors.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace fs = std::filesystem;
using nlohmann::json;

namespace {

template <class... T>
[[noreturn]] void fail(const fs::path& path, fmt::format_string<T...> format, T&&... args) {
  throw Error(ExitCode::kRuntime, path.string() + ": " + fmt::format(format, std::forward<T>(args)...));
}

// Files of at most `most` bytes of data each, by name.
std::vector<std::pair<std::string, std::vector<TensorSpec>>> split(const std::vector<TensorSpec>& specs, int64_t most, const std::string& stem) {
  std::vector<std::pair<std::string, std::vector<TensorSpec>>> files(1);
  int64_t in_file = 0;
  for (const TensorSpec& spec : specs) {
    const int64_t bytes = spec.num_bytes();
    if (in_file > 0 && bytes > most - in_file) {
      files.emplace_back();
      in_file = 0;
    }
    files.back().second.push_back(spec);
    in_file += bytes;
  }
  for (size_t i = 0; i < files.size(); ++i) files[i].first = files.size() == 1 ? stem + ".safetensors" : fmt::format("{}-{:05}-of-{:05}.safetensors", stem, i + 1, files.size());
  return files;
}

std::string index_name(const std::string& stem) { return stem + ".safetensors.index.json"; }

void write_index(const fs::path& folder, const std::string& stem, int64_t total_bytes, const std::map<std::string, std::string>& file_of) {
  const json index{{"metadata", {{"total_size", total_bytes}}}, {"weight_map", file_of}};
  write_file(folder / index_name(stem), index.dump(2) + "\n");
}

}  // namespace

SafetensorsHeader::SafetensorsHeader(const fs::path& path, const std::vector<TensorSpec>& specs, const Metadata& metadata) {
  std::vector<const TensorSpec*> order;
  for (const TensorSpec& spec : specs) {
    if (spec.name == "__metadata__") fail(path, "a tensor cannot be called '__metadata__'");
    if (invalid_utf8(spec.name) >= 0) fail(path, "a tensor's name must be UTF-8");
    order.push_back(&spec);
  }
  std::stable_sort(order.begin(), order.end(),
                   [](const TensorSpec* a, const TensorSpec* b) { return c10::elementSize(a->dtype) > c10::elementSize(b->dtype); });
  for (const auto& [key, word] : metadata)
    if (invalid_utf8(key) >= 0 || invalid_utf8(word) >= 0) fail(path, "metadata must be UTF-8");
  std::string text = metadata.empty() ? "{" : "{\"__metadata__\":" + json(metadata).dump();
  int64_t offset = 0;
  for (const TensorSpec* spec : order) {
    int64_t end = 0;
    if (__builtin_add_overflow(offset, spec->num_bytes(), &end)) fail(path, "must hold fewer than 2^63 bytes");
    if (!begin.emplace(spec->name, offset).second) fail(path, "tensor '{}' is declared twice", spec->name);
    text += fmt::format(R"({}{}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", text.size() > 1 ? "," : "", json(spec->name).dump(),
                        safetensors_dtype(spec->dtype), fmt::join(spec->shape, ","), offset, end);
    offset = end;
  }
  text += "}";
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();
  char prefix[8];
  std::memcpy(prefix, &length, 8);
  bytes = std::string(prefix, 8) + text;
  for (auto& [unused, at] : begin) at += static_cast<int64_t>(bytes.size());
}

SafetensorsWriter::SafetensorsWriter(const fs::path& path, const std::vector<TensorSpec>& specs, const Metadata& metadata) : file_(path), left_(specs.size()) {
  const SafetensorsHeader header(path, specs, metadata);
  for (const TensorSpec& spec : specs) slots_.emplace(spec.name, Slot{spec, header.begin.find(spec.name)->second, false});
  file_.append(header.bytes);
}

void SafetensorsWriter::write(std::string_view name, const at::Tensor& tensor) {
  const auto it = slots_.find(name);
  if (it == slots_.end()) fail(file_.path(), "tensor '{}' was not declared", name);
  Slot& slot = it->second;
  if (slot.written) fail(file_.path(), "tensor '{}' was written twice", name);
  if (tensor.scalar_type() != slot.spec.dtype || !tensor.sizes().equals(slot.spec.shape))
    fail(file_.path(), "tensor '{}' was declared as {} [{}], got {} [{}]", name, safetensors_dtype(slot.spec.dtype), fmt::join(slot.spec.shape, ", "),
         safetensors_dtype(tensor.scalar_type()), fmt::join(tensor.sizes(), ", "));
  const at::Tensor flat = tensor.detach().cpu().contiguous();
  file_.write_at(slot.begin, flat.const_data_ptr(), flat.nbytes());
  slot.written = true;
  --left_;
}

void SafetensorsWriter::finish() {
  for (const auto& [name, slot] : slots_)
    if (!slot.written) fail(file_.path(), "tensor '{}' was declared but not written", name);
  file_.commit();
}

SafetensorsFolderWriter::SafetensorsFolderWriter(fs::path folder, const std::vector<TensorSpec>& specs, Metadata metadata, int64_t max_shard_bytes,
                                                 std::string stem)
    : folder_(std::move(folder)), metadata_(std::move(metadata)), stem_(std::move(stem)) {
  for (auto& [file, in_file] : split(specs, max_shard_bytes, stem_)) {
    for (const TensorSpec& spec : in_file) {
      if (!shard_of_.emplace(spec.name, shards_.size()).second) fail(folder_, "tensor '{}' is declared twice", spec.name);
      total_bytes_ += spec.num_bytes();
    }
    shards_.push_back({.file = file, .specs = std::move(in_file), .writer = nullptr});
  }
}

void SafetensorsFolderWriter::write(std::string_view name, const at::Tensor& tensor) {
  const auto it = shard_of_.find(name);
  if (it == shard_of_.end()) fail(folder_, "tensor '{}' was not declared", name);
  Shard& shard = shards_[it->second];
  if (shard.done) fail(folder_ / shard.file, "tensor '{}' was written twice", name);
  if (!shard.writer) shard.writer = std::make_unique<SafetensorsWriter>(folder_ / shard.file, shard.specs, metadata_);
  shard.writer->write(name, tensor);
  if (!shard.writer->complete()) return;
  shard.writer->finish();
  shard.writer.reset();
  shard.done = true;
}

void SafetensorsFolderWriter::finish() {
  for (Shard& shard : shards_) {
    if (shard.done) continue;
    if (!shard.writer) shard.writer = std::make_unique<SafetensorsWriter>(folder_ / shard.file, shard.specs, metadata_);
    shard.writer->finish();
    shard.writer.reset();
    shard.done = true;
  }
  if (shards_.size() == 1) return;
  std::map<std::string, std::string> file_of;
  for (const auto& [name, shard] : shard_of_) file_of[name] = shards_[shard].file;
  write_index(folder_, stem_, total_bytes_, file_of);
}

std::vector<std::string> SafetensorsFolderWriter::files() const {
  std::vector<std::string> list;
  for (const Shard& shard : shards_) list.push_back(shard.file);
  if (shards_.size() > 1) list.push_back(index_name(stem_));
  return list;
}

SafetensorsSharedWriter::SafetensorsSharedWriter(fs::path folder, const std::vector<TensorSpec>& specs, std::string stem)
    : folder_(std::move(folder)), stem_(std::move(stem)) {
  for (const auto& [file, in_file] : split(specs, kShardBytes, stem_)) {
    for (const TensorSpec& spec : in_file) {
      file_of_.emplace(spec.name, files_.size());
      total_bytes_ += spec.num_bytes();
    }
    files_.push_back({.name = file, .header = SafetensorsHeader(folder_ / file, in_file, {{"format", "pt"}}), .open = nullptr});
  }
}

void SafetensorsSharedWriter::create() {
  for (File& file : files_) {
    file.open = std::make_unique<SharedFile>(folder_ / file.name, /*create=*/true);
    file.open->write_at(0, file.header.bytes.data(), file.header.bytes.size());
  }
  if (files_.size() == 1) return;
  std::map<std::string, std::string> file_of;
  for (const auto& [name, file] : file_of_) file_of[name] = files_[file].name;
  write_index(folder_, stem_, total_bytes_, file_of);
}

void SafetensorsSharedWriter::write(std::string_view name, int64_t first, const at::Tensor& values) {
  File& file = files_[file_of_.find(name)->second];
  if (!file.open) file.open = std::make_unique<SharedFile>(folder_ / file.name, /*create=*/false);
  const at::Tensor flat = values.detach().cpu().contiguous();
  file.open->write_at(file.header.begin.find(name)->second + first * static_cast<int64_t>(flat.element_size()), flat.const_data_ptr(), flat.nbytes());
}

void SafetensorsSharedWriter::flush() {
  for (File& file : files_) {
    if (file.open) file.open->flush();
    file.open.reset();
  }
}

std::vector<std::string> SafetensorsSharedWriter::files() const {
  std::vector<std::string> list;
  for (const File& file : files_) list.push_back(file.name);
  if (files_.size() > 1) list.push_back(index_name(stem_));
  return list;
}

}  // namespace tessera
