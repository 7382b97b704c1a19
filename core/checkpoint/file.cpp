#include "checkpoint/file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>
#include <vector>

#include "tessera/error.hpp"

namespace tessera {
namespace fs = std::filesystem;

namespace {

[[noreturn]] void fail(const fs::path& path, const char* what, int code) {
  std::string help;
  if (code == ENOSPC || code == EDQUOT) help = "free some space on that disk";
  if (code == EACCES || code == EPERM || code == EROFS) help = "choose a folder that this user may write to";
  throw Error(ExitCode::kRuntime, fmt::format("{}: {}: {}", path.string(), what, std::generic_category().message(code)), help);
}

[[noreturn]] void fail_read(const fs::path& path, const char* what, int code) {
  throw Error(ExitCode::kRuntime, fmt::format("{}: {}: {}", path.string(), what, std::generic_category().message(code)));
}

fs::path folder_of(const fs::path& path) { return path.has_parent_path() ? path.parent_path() : fs::path("."); }

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

// A pipe without a writer must not be waited for: it is refused like everything that is no regular file.
int open_to_read(const fs::path& path) { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); }

int64_t regular_size(const fs::path& path, int fd) {
  struct stat info;
  if (::fstat(fd, &info) != 0) fail_read(path, "cannot be examined", errno);
  if (!S_ISREG(info.st_mode))
    throw Error(ExitCode::kRuntime, fmt::format("{}: must be a regular file, got a {}", path.string(), S_ISDIR(info.st_mode) ? "folder" : "device or pipe"));
  return info.st_size;
}

// Row k is the effect of a byte that has k zero bytes behind it: eight bytes go in at a time.
constexpr auto kCrcRows = [] {
  std::array<std::array<uint32_t, 256>, 8> rows{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = c & 1 ? (c >> 1) ^ 0xedb88320 : c >> 1;
    rows[0][i] = c;
  }
  for (size_t k = 1; k < 8; ++k)
    for (size_t i = 0; i < 256; ++i) rows[k][i] = (rows[k - 1][i] >> 8) ^ rows[0][rows[k - 1][i] & 0xff];
  return rows;
}();

// The CRC of what came before and of `bytes`.
uint32_t crc32(uint32_t before, std::string_view bytes) {
  uint32_t c = ~before;
  const char* at = bytes.data();
  size_t left = bytes.size();
  for (; left >= 8; left -= 8, at += 8) {
    uint64_t word;
    std::memcpy(&word, at, 8);
    word ^= c;
    c = 0;
    for (size_t k = 0; k < 8; ++k) c ^= kCrcRows[7 - k][(word >> (8 * k)) & 0xff];
  }
  for (; left > 0; --left, ++at) c = kCrcRows[0][(c ^ static_cast<unsigned char>(*at)) & 0xff] ^ (c >> 8);
  return ~c;
}

void write_all(int fd, int64_t offset, const void* data, size_t size, const fs::path& path) {
  const char* bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t n = ::pwrite(fd, bytes, size, offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(path, "cannot be written", errno);
    bytes += n, offset += n, size -= static_cast<size_t>(n);
  }
}

size_t read_some(int fd, char* to, size_t size, const fs::path& path) {
  while (true) {
    const ssize_t n = ::read(fd, to, size);
    if (n >= 0) return static_cast<size_t>(n);
    if (errno != EINTR) fail_read(path, "cannot be read", errno);
  }
}

}  // namespace

fs::path AtomicFile::temporary(const fs::path& path) {
  return fs::path(fmt::format("{}.tmp-{}", path.string(), ::getpid()));
}

void AtomicFile::clear_leftovers(const fs::path& path) {
  const std::string begin = path.filename().string() + ".tmp-";
  std::error_code ignored;
  std::vector<fs::path> found;
  for (const auto& entry : fs::directory_iterator(folder_of(path), ignored))
    if (entry.path().filename().string().starts_with(begin)) found.push_back(entry.path());
  for (const fs::path& file : found) fs::remove(file, ignored);
}

AtomicFile::AtomicFile(fs::path path) : path_(std::move(path)), temporary_(temporary(path_)) {
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) fail(path_, "cannot be created", errno);
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::write_at(int64_t offset, const void* data, size_t size) {
  write_all(fd_, offset, data, size, path_);
  end_ = std::max(end_, offset + static_cast<int64_t>(size));
}

SharedFile::SharedFile(fs::path path, bool create) : path_(std::move(path)) {
  fd_ = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC | (create ? O_CREAT | O_TRUNC : 0), 0666);
  if (fd_ < 0) fail(path_, create ? "cannot be created" : "cannot be opened for writing", errno);
}

SharedFile::~SharedFile() { ::close(fd_); }

void SharedFile::write_at(int64_t offset, const void* data, size_t size) { write_all(fd_, offset, data, size, path_); }

void SharedFile::flush() {
  if (::fsync(fd_) != 0) fail(path_, "cannot be flushed to disk", errno);
}

void AtomicFile::append(std::string_view bytes) { write_at(end_, bytes.data(), bytes.size()); }

void AtomicFile::commit() {
  if (::fsync(fd_) != 0) fail(path_, "cannot be flushed to disk", errno);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail(path_, "cannot be renamed into place", errno);
  ::close(fd_);
  fd_ = -1;
  sync_folder(folder_of(path_));
}

bool is_there(const fs::path& path) {
  std::error_code code;
  const bool found = fs::exists(path, code);
  if (code) throw Error(ExitCode::kRuntime, fmt::format("{}: cannot be examined: {}", path.string(), code.message()));
  return found;
}

void write_file(const fs::path& path, std::string_view text) {
  AtomicFile file(path);
  file.append(text);
  file.commit();
}

std::string read_file(const fs::path& path, int64_t max_bytes) {
  const Descriptor file{open_to_read(path)};
  if (file.fd < 0) fail_read(path, "cannot be opened", errno);
  const int64_t size = regular_size(path, file.fd);
  if (size > max_bytes)
    throw Error(ExitCode::kRuntime, fmt::format("{}: must hold at most {} bytes, got {}", path.string(), max_bytes, size));
  std::string text(static_cast<size_t>(size), '\0');
  size_t done = 0;
  while (done < text.size()) {
    const size_t n = read_some(file.fd, text.data() + done, text.size() - done, path);
    if (n == 0) break;
    done += n;
  }
  text.resize(done);
  return text;
}

// Read and not mapped: a disk that fails is an error then, not a signal.
uint32_t file_crc32(const fs::path& path) {
  const Descriptor file{open_to_read(path)};
  if (file.fd < 0) fail_read(path, "cannot be opened", errno);
  regular_size(path, file.fd);
  uint32_t crc = 0;
  std::vector<char> block(size_t{1} << 20);
  while (const size_t n = read_some(file.fd, block.data(), block.size(), path)) crc = crc32(crc, std::string_view(block.data(), n));
  return crc;
}

int open_append(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (fd < 0) fail(path, "cannot be created", errno);
  return fd;
}

void append_to(int fd, std::string_view bytes, const fs::path& path) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(path, "cannot be written", errno);
    bytes.remove_prefix(static_cast<size_t>(n));
  }
}

void flush_file(int fd, const fs::path& path) {
  if (::fsync(fd) != 0) fail(path, "cannot be flushed to disk", errno);
}

void close_file(int fd) {
  if (fd >= 0) ::close(fd);
}

void make_folder(const fs::path& folder) {
  std::error_code code;
  if (fs::is_directory(folder, code)) return;
  const fs::path above = folder_of(folder);
  if (!folder.has_filename()) return make_folder(above);  // "runs/name/"
  make_folder(above);
  if (::mkdir(folder.c_str(), 0777) != 0) {
    if (errno == EEXIST && fs::is_directory(folder, code)) return;
    fail(folder, "folder cannot be created", errno);
  }
  sync_folder(above);
}

void sync_folder(const fs::path& folder) {
  const Descriptor handle{::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  if (handle.fd < 0) fail(folder, "folder cannot be opened", errno);
  // Some network file systems cannot flush a folder and say EINVAL: their renames are as durable as they get.
  if (::fsync(handle.fd) != 0 && errno != EINVAL) fail(folder, "folder cannot be flushed to disk", errno);
}

void rename_into_place(const fs::path& from, const fs::path& to) {
  if (fs::is_directory(from)) sync_folder(from);
  if (::rename(from.c_str(), to.c_str()) != 0) fail(to, "cannot be renamed into place", errno);
  sync_folder(folder_of(to));
}

FolderLock::FolderLock(const fs::path& folder, const char* held, const char* help) : fd_(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  if (fd_ < 0) fail(folder, "folder cannot be opened", errno);
  if (::flock(fd_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return;
  ::close(fd_);
  throw Error(ExitCode::kRuntime, fmt::format("{}: {}", folder.string(), held), help);
}

FolderLock::~FolderLock() { ::close(fd_); }

int64_t invalid_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&](size_t k) { return i + k < text.size() ? static_cast<unsigned char>(text[i + k]) : 0u; };
    const unsigned lead = byte(0);
    const size_t length = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : lead >> 3 == 30 ? 4 : 0;
    if (length == 0) return static_cast<int64_t>(i);
    unsigned code = length == 1 ? lead : lead & (0x7f >> length);
    for (size_t k = 1; k < length; ++k) {
      if (byte(k) >> 6 != 2) return static_cast<int64_t>(i);
      code = code << 6 | (byte(k) & 0x3f);
    }
    constexpr unsigned kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
    if (code < kLeast[length] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return static_cast<int64_t>(i);
    i += length;
  }
  return -1;
}

nlohmann::json strict_json(std::string_view text, const std::string& place, int max_depth) {
  if (const int64_t at = invalid_utf8(text); at >= 0)
    throw Error(ExitCode::kRuntime, fmt::format("{}: not UTF-8 at byte {}", place, at));
  std::vector<std::set<std::string>> keys;
  using Event = nlohmann::json::parse_event_t;
  const auto watch = [&](int depth, Event event, nlohmann::json& value) {
    if (event == Event::object_start || event == Event::array_start) {
      if (depth >= max_depth) throw Error(ExitCode::kRuntime, fmt::format("{}: JSON nested deeper than {} levels", place, max_depth));
      if (event == Event::object_start) keys.emplace_back();
    } else if (event == Event::object_end) {
      keys.pop_back();
    } else if (event == Event::key && !keys.back().insert(value.get<std::string>()).second) {
      throw Error(ExitCode::kRuntime, fmt::format("{}: key '{}' occurs twice", place, value.get<std::string>()));
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text.begin(), text.end(), watch);
  } catch (const nlohmann::json::parse_error& error) {
    throw Error(ExitCode::kRuntime, fmt::format("{}: not valid JSON at byte {}", place, error.byte > 0 ? error.byte - 1 : 0));
  } catch (const nlohmann::json::exception&) {
    throw Error(ExitCode::kRuntime, fmt::format("{}: JSON holds a number out of range", place));
  }
}

MappedFile::MappedFile(const fs::path& path) : path_(path) {
  const Descriptor file{open_to_read(path)};
  if (file.fd < 0) fail_read(path, "cannot be opened", errno);
  size_ = regular_size(path, file.fd);
  if (size_ == 0) return;
  void* map = ::mmap(nullptr, static_cast<size_t>(size_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file.fd, 0);
  if (map == MAP_FAILED) fail_read(path, "cannot be mapped", errno);
  data_ = static_cast<char*>(map);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, static_cast<size_t>(size_));
}

}  // namespace tessera
