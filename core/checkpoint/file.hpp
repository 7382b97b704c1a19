// Files that are whole or absent: written aside, flushed, renamed into place; and files read through a map.
// Every failure is Error(kRuntime) that names the file and the system's reason.
#pragma once
#include <nlohmann/json_fwd.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

namespace tessera {

// A file that appears under its name only when commit() returns. Until then its bytes lie in `temporary()` beside it, which the
// destructor removes. Flushed to disk before the rename, and the folder after it, so that a crash leaves the old file or the new.
class AtomicFile {
 public:
  // Creates the temporary file. The folder must exist.
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write_at(int64_t offset, const void* data, size_t size);
  void append(std::string_view bytes);
  void commit();
  const std::filesystem::path& path() const { return path_; }
  static std::filesystem::path temporary(const std::filesystem::path& path);  // "<path>.tmp-<process id>"
  // Removes the temporaries of `path` that killed processes left. No other process may be writing it.
  static void clear_leftovers(const std::filesystem::path& path);

 private:
  std::filesystem::path path_, temporary_;
  int fd_ = -1;
  int64_t end_ = 0;
};

// A file that several processes fill together, each its own stretches. Until all have flushed it is of no use.
class SharedFile {
 public:
  // One process creates it, empty, before the others open it.
  SharedFile(std::filesystem::path path, bool create);
  ~SharedFile();
  SharedFile(const SharedFile&) = delete;
  SharedFile& operator=(const SharedFile&) = delete;
  void write_at(int64_t offset, const void* data, size_t size);
  void flush();

 private:
  std::filesystem::path path_;
  int fd_ = -1;
};

// Whether there is such a file or folder. What cannot be examined is an error and not absent: a run would begin anew over what it cannot see.
bool is_there(const std::filesystem::path& path);
// Replaces the content of `path` atomically.
void write_file(const std::filesystem::path& path, std::string_view text);
// The whole file. Refuses a folder, and a file above `max_bytes`.
std::string read_file(const std::filesystem::path& path, int64_t max_bytes = int64_t{1} << 30);
// A file that grows by whole records. Each append_to() is one write where the system allows, so that readers and a crash see whole records.
int open_append(const std::filesystem::path& path);
void append_to(int fd, std::string_view bytes, const std::filesystem::path& path);
void flush_file(int fd, const std::filesystem::path& path);  // to disk
void close_file(int fd);
// Creates a folder and its parents, each flushed into the folder that holds it.
void make_folder(const std::filesystem::path& folder);
// Flushes a folder's entries.
void sync_folder(const std::filesystem::path& folder);
// Renames a finished file or folder into place and flushes the folder that holds it. A folder in the place that holds anything is refused.
void rename_into_place(const std::filesystem::path& from, const std::filesystem::path& to);

// A folder for one process at a time, until the end of the object or of the process.
class FolderLock {
 public:
  // Error(kRuntime) `<folder>: <held>` where another process has it. File systems that cannot lock are taken to be free.
  FolderLock(const std::filesystem::path& folder, const char* held, const char* help);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int fd_ = -1;
};

// JSON of a file that is not trusted: UTF-8 throughout, no key twice in an object, at most `max_depth` levels.
// `place` begins the error: "<place>: key 'a' occurs twice".
nlohmann::json strict_json(std::string_view text, const std::string& place, int max_depth = 8);
// CRC-32 (IEEE 802.3) of a whole file.
uint32_t file_crc32(const std::filesystem::path& path);
// The byte at which `text` stops being UTF-8, or -1.
int64_t invalid_utf8(std::string_view text);

// A file mapped privately: writes to the map stay in this process. Only regular files.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const char* data() const { return data_; }
  int64_t size() const { return size_; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  char* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace tessera
