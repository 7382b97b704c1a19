// What a fuzz target holds the product to: an input is read, or refused by a tessera::Error that a person can read. Everything else
// (another exception, a crash, a hang, undefined behaviour, memory that the input merely claims) ends the process and is a finding.
#pragma once
#include <fcntl.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>

#include "checkpoint/file.hpp"
#include "tessera/error.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace tessera::fuzz {

// Throws std::logic_error for a text that is no message for people.
inline void hold_text(const std::string& text) {
  constexpr size_t kLongest = 1 << 16;
  const char* why = nullptr;
  if (!text.starts_with("error: ") && text.find(": error: ") == std::string::npos) why = "does not say that it is an error";
  for (unsigned char c : text)
    if ((c < 0x20 && c != '\n') || c == 0x7f) why = "holds control characters";
  if (text.size() > kLongest) why = "is too long to read";
  if (invalid_utf8(text) >= 0) why = "is not UTF-8";
  if (why) throw std::logic_error(std::string("a message ") + why + ": " + text.substr(0, 4096));
}

template <class F>
void hold(F run) {
  try {
    run();
  } catch (const Error& error) {
    hold_text(error.what());
  }
}

// Throws std::logic_error when what must hold of an accepted input does not.
inline void must(bool holds, const char* what) {
  if (!holds) throw std::logic_error(what);
}

// A folder of this process in memory, for readers that take paths.
class Folder {
 public:
  Folder() : path_(std::filesystem::path("/dev/shm") / ("tessera-fuzz-" + std::to_string(::getpid()))) {
    if (!std::filesystem::is_directory("/dev/shm")) path_ = std::filesystem::temp_directory_path() / path_.filename();
    std::filesystem::create_directories(path_);
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::filesystem::path put(const std::string& name, std::string_view bytes) const {
    const std::filesystem::path file = path_ / name;
    const int fd = ::open(file.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    const bool whole = fd >= 0 && ::write(fd, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size());
    ::close(fd);
    if (!whole) throw std::runtime_error(file.string() + " cannot be written");
    return file;
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline const Folder& folder() {
  static const Folder one;
  return one;
}

// Takes numbers from the front of an input, 0 where it has ended.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : rest_(reinterpret_cast<const char*>(data), size) {}
  unsigned take() {
    if (rest_.empty()) return 0;
    const auto byte = static_cast<unsigned char>(rest_.front());
    rest_.remove_prefix(1);
    return byte;
  }
  unsigned take16() { const unsigned low = take(); return low | take() << 8; }
  std::string_view rest() const { return rest_; }

 private:
  std::string_view rest_;
};

}  // namespace tessera::fuzz
