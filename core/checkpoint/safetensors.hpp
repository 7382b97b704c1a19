// The safetensors format: one file, or a folder of shards with an index. Reading trusts nothing that a file claims; writing streams
// with the memory of one tensor and leaves whole files only.
// Format: u64 little-endian header length, JSON header, data. Source: github.com/huggingface/safetensors (format section), with
// its rules: no gaps, no overlap, header of at most 100 MB. All failures are Error(kRuntime) "<path>: <what, with numbers>".
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "checkpoint/file.hpp"

namespace tessera {

// "F32", "BF16", "I64", ...; throws Error(kRuntime) for a dtype that the format cannot hold.
std::string safetensors_dtype(at::ScalarType dtype);
std::optional<at::ScalarType> scalar_type_of(std::string_view safetensors_dtype);

struct TensorSpec {
  std::string name;
  at::ScalarType dtype = at::ScalarType::Float;
  std::vector<int64_t> shape;
  int64_t num_bytes() const;
};

struct TensorEntry : TensorSpec {
  int64_t begin = 0, end = 0;  // bytes in the file
};

// One file, mapped. Copies share the map.
class SafetensorsFile {
 public:
  static SafetensorsFile open(const std::filesystem::path& path);
  // In the order of their data.
  const std::vector<TensorEntry>& entries() const { return entries_; }
  const TensorEntry* find(std::string_view name) const;  // nullptr when absent
  // A view on the map (copied where its bytes are not aligned), which keeps the map alive. Writes to it do not reach the file.
  // Throws where the name is absent, or a BOOL is neither 0 nor 1.
  at::Tensor tensor(std::string_view name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::filesystem::path& path() const { return map_->path(); }

 private:
  std::shared_ptr<const MappedFile> map_;
  std::vector<TensorEntry> entries_;
  std::map<std::string, size_t, std::less<>> index_;
  std::map<std::string, std::string> metadata_;
};

// `<stem>.safetensors`, or `<stem>.safetensors.index.json` and its shards. Opening checks every header: a missing shard, a tensor that the
// index puts into a shard that lacks it, and a tensor in a shard that the index leaves out are errors.
class SafetensorsFolder {
 public:
  // `path`: a folder, a .safetensors file, or an .index.json.
  static SafetensorsFolder open(const std::filesystem::path& path, const std::string& stem = "model");
  // True when a folder holds either form.
  static bool exists(const std::filesystem::path& folder, const std::string& stem = "model");
  // Sorted by name.
  std::vector<std::string> names() const;
  int64_t size() const { return static_cast<int64_t>(shard_of_.size()); }
  const TensorEntry* find(std::string_view name) const;
  at::Tensor tensor(std::string_view name) const;  // as SafetensorsFile::tensor
  // Of the single file, or the first shard.
  const std::map<std::string, std::string>& metadata() const { return files_.front().metadata(); }
  const std::vector<SafetensorsFile>& files() const { return files_; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, size_t, std::less<>> shard_of_;
};


using Metadata = std::map<std::string, std::string>;
inline constexpr int64_t kShardBytes = 5'000'000'000;  // at most, of data in a file, unless told otherwise

// The header of a file, and where its tensors' data begin. In the file the wider dtypes come first, so that all data are aligned.
struct SafetensorsHeader {
  std::string bytes;
  std::map<std::string, int64_t, std::less<>> begin;  // of every tensor's data in the file
  // Throws Error(kRuntime) naming `path`.
  SafetensorsHeader(const std::filesystem::path& path, const std::vector<TensorSpec>& specs, const Metadata& metadata);
};

// Writes one file. Tensors are declared first and then written in any order. Nothing appears under `path` before finish().
class SafetensorsWriter {
 public:
  SafetensorsWriter(const std::filesystem::path& path, const std::vector<TensorSpec>& specs, const Metadata& metadata = {{"format", "pt"}});
  // Any device and strides; the dtype and shape declared.
  void write(std::string_view name, const at::Tensor& tensor);
  // Throws when a declared tensor was not written.
  void finish();
  bool complete() const { return left_ == 0; }

 private:
  struct Slot {
    TensorSpec spec;
    int64_t begin = 0;
    bool written = false;
  };
  AtomicFile file_;
  std::map<std::string, Slot, std::less<>> slots_;
  size_t left_ = 0;
};

// Writes `<stem>.safetensors` where all fits into `max_shard_bytes` of data, else `<stem>-00001-of-0000N.safetensors` and the index, last.
class SafetensorsFolderWriter {
 public:
  SafetensorsFolderWriter(std::filesystem::path folder, const std::vector<TensorSpec>& specs, Metadata metadata = {{"format", "pt"}},
                          int64_t max_shard_bytes = kShardBytes, std::string stem = "model");
  // In any order; the order of declaration keeps one shard open at a time.
  void write(std::string_view name, const at::Tensor& tensor);
  void finish();
  int64_t total_bytes() const { return total_bytes_; }
  // File names written, the index included.
  std::vector<std::string> files() const;

 private:
  struct Shard {
    std::string file;
    std::vector<TensorSpec> specs;
    std::unique_ptr<SafetensorsWriter> writer;
    bool done = false;
  };
  std::filesystem::path folder_;
  Metadata metadata_;
  std::string stem_;
  int64_t total_bytes_ = 0;
  std::vector<Shard> shards_;
  std::map<std::string, size_t, std::less<>> shard_of_;
};

// The same files filled by several processes at once, each with what it holds. One calls create(), then, when all know that it has, each writes its
// stretches and flushes. The folder is nobody's to read before all have.
class SafetensorsSharedWriter {
 public:
  SafetensorsSharedWriter(std::filesystem::path folder, const std::vector<TensorSpec>& specs, std::string stem);
  void create();
  // Elements [first, first + values.numel()) of a tensor, in its dtype.
  void write(std::string_view name, int64_t first, const at::Tensor& values);
  void flush();
  std::vector<std::string> files() const;  // the index included

 private:
  struct File {
    std::string name;
    SafetensorsHeader header;
    std::unique_ptr<SharedFile> open;
  };
  std::filesystem::path folder_;
  std::string stem_;
  std::vector<File> files_;
  std::map<std::string, size_t, std::less<>> file_of_;
  int64_t total_bytes_ = 0;
};

}  // namespace tessera
