#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <vector>

#include "checkpoint/file.hpp"
#include "data/glob.hpp"
#include "data/hash.hpp"
#include "data/source.hpp"
#include "tessera/error.hpp"
#include "tessera/schema.hpp"
#include "tessera/schema.hpp"

namespace tessera {
namespace fs = std::filesystem;

namespace {

std::vector<fs::path> matching_files(const std::string& pattern) {
  std::vector<fs::path> files = glob(pattern);
  if (!files.empty()) return files;
  std::error_code code;
  if (fs::is_directory(pattern, code))
    throw Error(ExitCode::kRuntime, fmt::format("data.path: '{}' is a folder", pattern), fmt::format("'{}' names the files in it and below", (fs::path(pattern) / "**").string()));
  if (fs::exists(pattern, code)) throw Error(ExitCode::kRuntime, fmt::format("data.path: '{}' is a device or pipe, not a regular file", pattern));
  throw Error(ExitCode::kRuntime, fmt::format("data.path: no file matches '{}'", pattern),
              fmt::format("paths are relative to the current folder, {}", fs::current_path(code).string()));
}

std::string name_below(const fs::path& file, const std::string& pattern) { return file.lexically_relative(glob_root(pattern)).string(); }

class BytesSource final : public Source {
 public:
  explicit BytesSource(const std::string& pattern) : files_(matching_files(pattern)), name_(fmt::format("bytes '{}'", pattern)) {
    Fingerprint print;
    for (const fs::path& file : files_) {
      const MappedFile map(file);
      lengths_.push_back(map.size());
      print.add_file(name_below(file, pattern), map.data(), map.size());
    }
    hash_ = print.text();
  }
  int64_t num_documents() const override { return static_cast<int64_t>(files_.size()); }
  int64_t document_len(int64_t document) const override { return lengths_[static_cast<size_t>(document)]; }
  std::string document_name(int64_t document) const override { return files_[static_cast<size_t>(document)].string(); }
  const std::string& name() const override { return name_; }
  const std::string& hash() const override { return hash_; }

  void read(int64_t document, int64_t begin, std::span<int64_t> out) const override {
    if (document != open_) {
      map_ = std::make_unique<MappedFile>(files_[static_cast<size_t>(document)]);
      open_ = document;
      if (map_->size() != document_len(document))
        throw Error(ExitCode::kRuntime, fmt::format("{}: changed while it was in use: it had {} bytes, now {}", document_name(document),
                                                    document_len(document), map_->size()));
    }
    const auto* bytes = reinterpret_cast<const unsigned char*>(map_->data()) + begin;
    std::copy(bytes, bytes + out.size(), out.begin());
  }

 private:
  std::vector<fs::path> files_;
  std::vector<int64_t> lengths_;
  std::string name_, hash_;
  mutable int64_t open_ = -1;
  mutable std::unique_ptr<MappedFile> map_;
};

class JsonlSource final : public Source {
 public:
  JsonlSource(const std::string& pattern, std::string field) : field_(std::move(field)), name_(fmt::format("jsonl '{}'", pattern)) {
    Fingerprint print;
    print.add(field_);
    for (const fs::path& path : matching_files(pattern)) {
      files_.push_back(std::make_unique<MappedFile>(path));
      print.add_file(name_below(path, pattern), files_.back()->data(), files_.back()->size());
      index(static_cast<int64_t>(files_.size()) - 1);
    }
    hash_ = print.text();
    lengths_.assign(lines_.size(), -1);
  }
  int64_t num_documents() const override { return static_cast<int64_t>(lines_.size()); }
  int64_t document_len(int64_t document) const override {
    int64_t& length = lengths_[static_cast<size_t>(document)];
    if (length < 0) length = static_cast<int64_t>(text(document).size());
    return length;
  }
  const std::string& name() const override { return name_; }
  const std::string& hash() const override { return hash_; }

  std::string document_name(int64_t document) const override {
    const Line& line = lines_[static_cast<size_t>(document)];
    return fmt::format("{}:{}", files_[static_cast<size_t>(line.file)]->path().string(), line.number);
  }

  void read(int64_t document, int64_t begin, std::span<int64_t> out) const override {
    const auto* bytes = reinterpret_cast<const unsigned char*>(text(document).data()) + begin;
    std::copy(bytes, bytes + out.size(), out.begin());
  }

 private:
  struct Line {
    int64_t file, begin, end, number;
  };

  void index(int64_t file) {
    const char* data = files_[static_cast<size_t>(file)]->data();
    const int64_t size = files_[static_cast<size_t>(file)]->size();
    int64_t number = 1;
    for (int64_t begin = 0; begin < size; ++number) {
      const void* newline = std::memchr(data + begin, '\n', static_cast<size_t>(size - begin));
      const int64_t end = newline == nullptr ? size : static_cast<const char*>(newline) - data;
      const std::string_view line(data + begin, static_cast<size_t>(end - begin));
      if (line.find_first_not_of(" \t\r") != std::string_view::npos) lines_.push_back({file, begin, end, number});
      begin = end + 1;
    }
  }

  // The text of a line, kept until another line is asked for.
  const std::string& text(int64_t document) const {
    if (document == open_) return text_;
    const Line& line = lines_[static_cast<size_t>(document)];
    const std::string_view bytes(files_[static_cast<size_t>(line.file)]->data() + line.begin, static_cast<size_t>(line.end - line.begin));
    const nlohmann::json object = strict_json(bytes, document_name(document), 64);
    if (!object.is_object())
      throw Error(ExitCode::kRuntime, fmt::format("{}: must be a JSON object, got {}", document_name(document), object.type_name()));
    const auto it = object.find(field_);
    if (it == object.end()) {
      std::string keys;
      for (const auto& [key, unused] : object.items()) keys += (keys.empty() ? "" : ", ") + key;
      throw Error(ExitCode::kRuntime, fmt::format("{}: has no field '{}'", document_name(document), field_), fmt::format("fields of this line: {}", shorten(keys)));
    }
    if (!it->is_string())
      throw Error(ExitCode::kRuntime, fmt::format("{}: field '{}' must be a string, got {}", document_name(document), field_, it->type_name()));
    text_ = it->get<std::string>();
    open_ = document;
    return text_;
  }

  std::string field_, name_, hash_;
  std::vector<std::unique_ptr<MappedFile>> files_;
  std::vector<Line> lines_;
  mutable std::vector<int64_t> lengths_;  // -1 where not asked for yet
  mutable int64_t open_ = -1;
  mutable std::string text_;
};

}  // namespace

std::unique_ptr<Source> open_bytes(const std::string& glob) { return std::make_unique<BytesSource>(glob); }
std::unique_ptr<Source> open_jsonl(const std::string& glob, const std::string& field) { return std::make_unique<JsonlSource>(glob, field); }

}  // namespace tessera
