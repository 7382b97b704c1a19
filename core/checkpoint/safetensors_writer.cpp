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

}  // namespace

SafetensorsWriter::SafetensorsWriter(const fs::path& path, const std::vector<TensorSpec>& specs, const Metadata& metadata) : file_(path) {
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
    if (!slots_.emplace(spec->name, Slot{*spec, offset, false}).second) fail(path, "tensor '{}' is declared twice", spec->name);
    text += fmt::format(R"({}{}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", text.size() > 1 ? "," : "", json(spec->name).dump(),
                        safetensors_dtype(spec->dtype), fmt::join(spec->shape, ","), offset, end);
    offset = end;
  }
  left_ = slots_.size();
  text += "}";
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();
  char prefix[8];
  std::memcpy(prefix, &length, 8);
  file_.append(std::string_view(prefix, 8));
  file_.append(text);
  for (auto& [unused, slot] : slots_) slot.begin += 8 + static_cast<int64_t>(length);
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
    : folder_(std::move(folder)), metadata_(std::move(metadata)), stem_(std::move(stem)), shards_(1) {
  int64_t in_shard = 0;
  for (const TensorSpec& spec : specs) {
    const int64_t bytes = spec.num_bytes();
    if (in_shard > 0 && bytes > max_shard_bytes - in_shard) {
      shards_.emplace_back();
      in_shard = 0;
    }
    if (!shard_of_.emplace(spec.name, shards_.size() - 1).second) fail(folder_, "tensor '{}' is declared twice", spec.name);
    shards_.back().specs.push_back(spec);
    in_shard += bytes;
    total_bytes_ += bytes;
  }
  for (size_t i = 0; i < shards_.size(); ++i)
    shards_[i].file = shards_.size() == 1 ? stem_ + ".safetensors" : fmt::format("{}-{:05}-of-{:05}.safetensors", stem_, i + 1, shards_.size());
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
  json index{{"metadata", {{"total_size", total_bytes_}}}, {"weight_map", json::object()}};
  for (const auto& [name, shard] : shard_of_) index["weight_map"][name] = shards_[shard].file;
  write_file(folder_ / (stem_ + ".safetensors.index.json"), index.dump(2) + "\n");
}

std::vector<std::string> SafetensorsFolderWriter::files() const {
  std::vector<std::string> list;
  for (const Shard& shard : shards_) list.push_back(shard.file);
  if (shards_.size() > 1) list.push_back(stem_ + ".safetensors.index.json");
  return list;
}

}  // namespace tessera
