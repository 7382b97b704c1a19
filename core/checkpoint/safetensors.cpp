#include "checkpoint/safetensors.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/ScalarType.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>

#include "tessera/error.hpp"

namespace tessera {
namespace fs = std::filesystem;
using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors data are little-endian");

namespace {

constexpr int64_t kMaxHeader = 100'000'000;
constexpr int64_t kMaxDims = 64;
constexpr std::pair<const char*, at::ScalarType> kDtypes[] = {
    {"F32", at::kFloat},      {"BF16", at::kBFloat16},  {"F16", at::kHalf},     {"F64", at::kDouble},
    {"I64", at::kLong},       {"I32", at::kInt},        {"I16", at::kShort},    {"I8", at::kChar},
    {"U8", at::kByte},        {"U16", at::kUInt16},     {"U32", at::kUInt32},   {"U64", at::kUInt64},
    {"BOOL", at::kBool},      {"F8_E4M3", at::kFloat8_e4m3fn}, {"F8_E5M2", at::kFloat8_e5m2}, {"F8_E8M0", at::kFloat8_e8m0fnu},
    {"C64", at::kComplexFloat}};

template <class... T>
[[noreturn]] void fail(const fs::path& path, fmt::format_string<T...> format, T&&... args) {
  throw Error(ExitCode::kRuntime, path.string() + ": " + fmt::format(format, std::forward<T>(args)...));
}

std::string shape_text(const std::vector<int64_t>& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

// Bytes of a tensor, or nullopt beyond int64. Zeros do not hide an overflow: strides are products of the rest.
std::optional<int64_t> checked_bytes(const std::vector<int64_t>& shape, int64_t item) {
  int64_t span = item, bytes = item;
  for (const int64_t n : shape) {
    if (n < 0 || __builtin_mul_overflow(span, std::max<int64_t>(n, 1), &span)) return std::nullopt;
    bytes *= n;
  }
  return bytes;
}

int64_t non_negative(const json& value, const fs::path& path, const std::string& name, const char* key) {
  if (value.is_number_unsigned() && value.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX)) return value.get<int64_t>();
  fail(path, "tensor '{}': {} must be an integer in [0, 2^63), got {}", name, key, value.dump());
}

TensorEntry read_entry(const std::string& name, const json& value, const fs::path& path, int64_t data_bytes) {
  if (!value.is_object()) fail(path, "tensor '{}': must be an object, got {}", name, value.type_name());
  for (const char* key : {"dtype", "shape", "data_offsets"})
    if (!value.contains(key)) fail(path, "tensor '{}': has no '{}'", name, key);
  for (const auto& [key, unused] : value.items())
    if (key != "dtype" && key != "shape" && key != "data_offsets") fail(path, "tensor '{}': unknown key '{}'", name, key);
  TensorEntry entry;
  entry.name = name;
  const json& dtype = value["dtype"];
  const auto type = dtype.is_string() ? scalar_type_of(dtype.get_ref<const std::string&>()) : std::nullopt;
  if (!type) fail(path, "tensor '{}': unknown dtype {}", name, dtype.dump());
  entry.dtype = *type;
  const json& shape = value["shape"];
  if (!shape.is_array()) fail(path, "tensor '{}': shape must be a list, got {}", name, shape.type_name());
  if (static_cast<int64_t>(shape.size()) > kMaxDims)
    fail(path, "tensor '{}': must have at most {} dimensions, got {}", name, kMaxDims, shape.size());
  for (const json& n : shape) entry.shape.push_back(non_negative(n, path, name, "shape"));
  const json& offsets = value["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2) fail(path, "tensor '{}': data_offsets must be two integers, got {}", name, offsets.dump());
  entry.begin = non_negative(offsets[0], path, name, "data_offsets");
  entry.end = non_negative(offsets[1], path, name, "data_offsets");
  if (entry.begin > entry.end || entry.end > data_bytes)
    fail(path, "tensor '{}': bytes [{}, {}) lie outside the data, which has {} bytes", name, entry.begin, entry.end, data_bytes);
  const int64_t item = static_cast<int64_t>(c10::elementSize(entry.dtype));
  const auto bytes = checked_bytes(entry.shape, item);
  if (!bytes) fail(path, "tensor '{}': shape {} of {} has more than 2^63 bytes", name, shape_text(entry.shape), dtype.get<std::string>());
  if (*bytes != entry.end - entry.begin)
    fail(path, "tensor '{}': shape {} of {} takes {} bytes, but data_offsets [{}, {}] hold {}", name, shape_text(entry.shape),
         dtype.get<std::string>(), *bytes, entry.begin, entry.end, entry.end - entry.begin);
  return entry;
}

// Every byte of the data belongs to exactly one tensor.
void check_cover(const std::vector<TensorEntry>& entries, const fs::path& path, int64_t data_bytes) {
  int64_t end = 0;
  const TensorEntry* last = nullptr;
  for (const TensorEntry& entry : entries) {
    if (entry.begin < end)
      fail(path, "tensor '{}' overlaps '{}': bytes [{}, {}) and [{}, {})", entry.name, last->name, entry.begin, entry.end, last->begin, last->end);
    if (entry.begin > end) fail(path, "bytes [{}, {}) of the data belong to no tensor", end, entry.begin);
    end = entry.end;
    last = &entry;
  }
  if (end != data_bytes) fail(path, "bytes [{}, {}) of the data belong to no tensor", end, data_bytes);
}

}  // namespace

std::string safetensors_dtype(at::ScalarType dtype) {
  for (const auto& [name, type] : kDtypes)
    if (type == dtype) return name;
  throw Error(ExitCode::kRuntime, fmt::format("safetensors cannot hold a tensor of dtype {}", c10::toString(dtype)));
}

std::optional<at::ScalarType> scalar_type_of(std::string_view text) {
  for (const auto& [name, type] : kDtypes)
    if (text == name) return type;
  return std::nullopt;
}

int64_t TensorSpec::num_bytes() const {
  const auto bytes = checked_bytes(shape, static_cast<int64_t>(c10::elementSize(dtype)));
  if (!bytes) throw Error(ExitCode::kRuntime, fmt::format("tensor '{}': shape {} cannot be stored", name, shape_text(shape)));
  return *bytes;
}

SafetensorsFile SafetensorsFile::open(const fs::path& path) {
  SafetensorsFile file;
  file.map_ = std::make_shared<const MappedFile>(path);
  const MappedFile& map = *file.map_;
  if (map.size() < 8) fail(path, "must begin with 8 bytes of header length, but the file has {}", map.size());
  uint64_t header_len = 0;
  std::memcpy(&header_len, map.data(), 8);
  if (header_len > static_cast<uint64_t>(map.size() - 8))
    fail(path, "header of {} bytes is longer than the file, which has {} bytes after its length", header_len, map.size() - 8);
  if (header_len > static_cast<uint64_t>(kMaxHeader)) fail(path, "header must have at most {} bytes, got {}", kMaxHeader, header_len);
  const std::string_view text(map.data() + 8, header_len);
  const json header = strict_json(text, path.string() + ": header", 4);
  if (!header.is_object()) fail(path, "header must be a JSON object, got {}", header.type_name());
  const int64_t data_begin = 8 + static_cast<int64_t>(header_len), data_bytes = map.size() - data_begin;
  for (const auto& [name, value] : header.items()) {
    if (name != "__metadata__") {
      file.entries_.push_back(read_entry(name, value, path, data_bytes));
      continue;
    }
    if (!value.is_object()) fail(path, "__metadata__ must be an object of strings, got {}", value.type_name());
    for (const auto& [key, word] : value.items()) {
      if (!word.is_string()) fail(path, "__metadata__ must be an object of strings, but '{}' is {}", key, word.dump());
      file.metadata_[key] = word.get<std::string>();
    }
  }
  std::sort(file.entries_.begin(), file.entries_.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  check_cover(file.entries_, path, data_bytes);
  for (size_t i = 0; i < file.entries_.size(); ++i) {
    TensorEntry& entry = file.entries_[i];
    entry.begin += data_begin;
    entry.end += data_begin;
    file.index_[entry.name] = i;
  }
  return file;
}

const TensorEntry* SafetensorsFile::find(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &entries_[it->second];
}

at::Tensor SafetensorsFile::tensor(std::string_view name) const {
  const TensorEntry* entry = find(name);
  if (entry == nullptr) fail(path(), "has no tensor '{}'", name);
  const auto options = at::TensorOptions().dtype(entry->dtype);
  const int64_t bytes = entry->end - entry->begin;
  if (bytes == 0) return at::empty(entry->shape, options);
  const char* data = map_->data() + entry->begin;
  if (entry->dtype == at::kBool) {
    const char* bad = std::find_if(data, data + bytes, [](char c) { return c != 0 && c != 1; });
    if (bad != data + bytes)
      fail(path(), "tensor '{}': BOOL must be 0 or 1, got {} at element {}", name, static_cast<unsigned char>(*bad), bad - data);
  }
  if (reinterpret_cast<uintptr_t>(data) % c10::elementSize(entry->dtype) != 0) {
    at::Tensor copy = at::empty(entry->shape, options);
    std::memcpy(copy.mutable_data_ptr(), data, static_cast<size_t>(bytes));
    return copy;
  }
  return at::from_blob(const_cast<char*>(data), entry->shape, [keep = map_](void*) {}, options);
}

bool SafetensorsFolder::exists(const fs::path& folder, const std::string& stem) {
  std::error_code code;
  return fs::exists(folder / (stem + ".safetensors"), code) || fs::exists(folder / (stem + ".safetensors.index.json"), code);
}

SafetensorsFolder SafetensorsFolder::open(const fs::path& path, const std::string& stem) {
  SafetensorsFolder folder;
  folder.path_ = path;
  std::error_code code;
  if (fs::is_directory(path, code)) {
    const fs::path one = path / (stem + ".safetensors"), index = path / (stem + ".safetensors.index.json");
    const bool has_one = fs::exists(one, code), has_index = fs::exists(index, code);
    if (has_one && has_index) fail(path, "holds both {} and {}", one.filename().string(), index.filename().string());
    if (!has_one && !has_index) fail(path, "holds neither {} nor {}", one.filename().string(), index.filename().string());
    folder.path_ = has_one ? one : index;
  }
  if (folder.path_.extension() != ".json") {
    folder.files_.push_back(SafetensorsFile::open(folder.path_));
    for (const TensorEntry& entry : folder.files_[0].entries()) folder.shard_of_[entry.name] = 0;
    return folder;
  }
  const fs::path& index_path = folder.path_;
  const json index = strict_json(read_file(index_path, kMaxHeader), index_path.string());
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) fail(index_path, "has no object 'weight_map'");
  std::map<std::string, size_t> number;
  for (const auto& [name, shard] : index["weight_map"].items()) {
    if (!shard.is_string()) fail(index_path, "weight_map: the shard of '{}' must be a file name, got {}", name, shard.dump());
    const std::string file = shard.get<std::string>();
    if (file.empty() || file == "." || file == ".." || file.find('/') != std::string::npos || file.find('\0') != std::string::npos)
      fail(index_path, "weight_map: the shard of '{}' must be a file name in the index's folder, got {}", name, shard.dump());
    const auto [it, is_new] = number.emplace(file, folder.files_.size());
    if (is_new) {
      const fs::path shard_path = index_path.parent_path() / file;
      if (!fs::exists(shard_path, code)) fail(index_path, "shard {} of tensor '{}' is missing", file, name);
      folder.files_.push_back(SafetensorsFile::open(shard_path));
    }
    if (folder.files_[it->second].find(name) == nullptr) fail(index_path, "shard {} does not hold tensor '{}'", file, name);
    folder.shard_of_[name] = it->second;
  }
  if (folder.files_.empty()) fail(index_path, "weight_map is empty");
  for (const SafetensorsFile& file : folder.files_)
    for (const TensorEntry& entry : file.entries())
      if (folder.shard_of_.count(entry.name) == 0)
        fail(index_path, "weight_map does not list tensor '{}' of shard {}", entry.name, file.path().filename().string());
  return folder;
}

std::vector<std::string> SafetensorsFolder::names() const {
  std::vector<std::string> list;
  for (const auto& [name, unused] : shard_of_) list.push_back(name);
  return list;
}

const TensorEntry* SafetensorsFolder::find(std::string_view name) const {
  const auto it = shard_of_.find(name);
  return it == shard_of_.end() ? nullptr : files_[it->second].find(name);
}

at::Tensor SafetensorsFolder::tensor(std::string_view name) const {
  const auto it = shard_of_.find(name);
  if (it == shard_of_.end()) fail(path_, "has no tensor '{}'", name);
  return files_[it->second].tensor(name);
}

}  // namespace tessera
