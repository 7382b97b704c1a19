#include "tests/failing_writes/failing_writes.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace tessera {

namespace {

template <class F>
F real(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

// FAILING_WRITES_BELOW, _AT, _ERROR (a number), _STAYS, _HALVES, _DELAY_US, _LOG.
FailurePlan plan_of_environment() {
  const auto word = [](const char* name) {
    const char* value = std::getenv((std::string("FAILING_WRITES_") + name).c_str());
    return std::string(value ? value : "");
  };
  return {.below = word("BELOW"), .at = std::atoll(word("AT").c_str()), .error = std::atoi(word("ERROR").c_str()), .stays = !word("STAYS").empty(),
          .halves = !word("HALVES").empty(), .flushes = true, .delay_us = std::atoi(word("DELAY_US").c_str()), .log = word("LOG")};
}

struct State {
  std::mutex mutex;
  FailurePlan plan = plan_of_environment();
  FailureReport report;
};
State& state() {
  static auto* const all = new State;  // calls come until the process has ended
  return *all;
}

std::string path_of(int fd) {
  char path[4096];
  const ssize_t size = ::readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), path, sizeof(path));
  return size > 0 ? std::string(path, static_cast<size_t>(size)) : "";
}

std::string absolute(const char* path) {
  if (path[0] == '/') return path;
  char here[4096];
  return std::string(::getcwd(here, sizeof(here)) ? here : "") + "/" + path;
}

enum class Fate { kRuns, kFails, kHalf };

// Counts the call and says what becomes of it. Sets errno where it fails.
Fate fate(const char* name, const std::string& path, const std::string& given) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (s.plan.below.empty() || !path.starts_with(s.plan.below)) return Fate::kRuns;
  const int64_t call = ++s.report.calls;
  const bool half = s.plan.halves && call == s.plan.at && std::strstr(name, "write");
  const bool later = call > s.plan.at && (s.plan.stays || (s.plan.halves && s.report.failed.empty()));
  // What lasts is a disk that is full or read-only, which can be read and closed.
  const bool spared = s.plan.stays && (std::strcmp(name, "open to read") == 0 || std::strcmp(name, "close") == 0);
  const bool fails = s.plan.at > 0 && !half && !spared && (call == s.plan.at || later);
  if (fails && s.report.failed.empty()) s.report.failed = name, s.report.path = given;
  if (!s.plan.log.empty()) {
    const std::string line = std::to_string(call) + (fails ? "! " : " ") + name + " " + path + "\n";
    const int fd = real<int (*)(const char*, int, ...)>("open")(s.plan.log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd >= 0 && real<ssize_t (*)(int, const void*, size_t)>("write")(fd, line.data(), line.size()) < 0) std::abort();
    if (fd >= 0) real<int (*)(int)>("close")(fd);
  }
  if (s.plan.delay_us > 0) ::usleep(static_cast<useconds_t>(s.plan.delay_us));
  if (half) return Fate::kHalf;
  if (!fails) return Fate::kRuns;
  errno = s.plan.error;
  return Fate::kFails;
}

bool fails(const char* name, const char* path) { return fate(name, absolute(path), path) == Fate::kFails; }

const char* kind_of_open(int flags) {
  if (flags & O_DIRECTORY) return "open folder";
  return (flags & O_ACCMODE) == O_RDONLY ? "open to read" : "open";
}

bool is_folder(int fd) {
  struct stat info;
  return ::fstat(fd, &info) == 0 && S_ISDIR(info.st_mode);
}

size_t half_of(size_t size) { return std::max<size_t>(size / 2, 1); }

}  // namespace

void plan_failure(const FailurePlan& plan) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  s.plan = plan;
  s.report = {};
}

FailureReport end_of_failures() {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  s.plan = {};
  return s.report;
}

}  // namespace tessera

#define SHOWN extern "C" __attribute__((visibility("default")))
using tessera::Fate;

#define OPENS(NAME)                                                                 \
  SHOWN int NAME(const char* path, int flags, ...) {                                \
    va_list rest;                                                                   \
    va_start(rest, flags);                                                          \
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;   \
    va_end(rest);                                                                   \
    if (tessera::fails(tessera::kind_of_open(flags), path)) return -1;              \
    return tessera::real<int (*)(const char*, int, ...)>(#NAME)(path, flags, mode); \
  }
OPENS(open)
OPENS(open64)

SHOWN ssize_t write(int fd, const void* data, size_t size) {
  const std::string path = tessera::path_of(fd);
  const Fate fate = tessera::fate("write", path, path);
  if (fate == Fate::kFails) return -1;
  return tessera::real<ssize_t (*)(int, const void*, size_t)>("write")(fd, data, fate == Fate::kHalf ? tessera::half_of(size) : size);
}

#define WRITES_AT(NAME)                                                                                                                                   \
  SHOWN ssize_t NAME(int fd, const void* data, size_t size, off_t offset) {                                                                               \
    const std::string path = tessera::path_of(fd);                                                                                                        \
    const Fate fate = tessera::fate("write", path, path);                                                                                                 \
    if (fate == Fate::kFails) return -1;                                                                                                                  \
    return tessera::real<ssize_t (*)(int, const void*, size_t, off_t)>(#NAME)(fd, data, fate == Fate::kHalf ? tessera::half_of(size) : size, offset);     \
  }
WRITES_AT(pwrite)
WRITES_AT(pwrite64)

#define FLUSHES(NAME)                                                                                    \
  SHOWN int NAME(int fd) {                                                                               \
    const std::string path = tessera::path_of(fd);                                                       \
    if (tessera::fate(tessera::is_folder(fd) ? "flush folder" : "flush", path, path) == Fate::kFails) return -1; \
    return tessera::state().plan.flushes ? tessera::real<int (*)(int)>(#NAME)(fd) : 0;                   \
  }
FLUSHES(fsync)
FLUSHES(fdatasync)

SHOWN int close(int fd) {
  const std::string path = tessera::path_of(fd);
  const bool fails = tessera::fate("close", path, path) == Fate::kFails;
  const int error = errno, result = tessera::real<int (*)(int)>("close")(fd);
  if (!fails) return result;
  errno = error;
  return -1;
}

SHOWN int rename(const char* from, const char* to) noexcept {
  if (tessera::fails("rename", to)) return -1;
  return tessera::real<int (*)(const char*, const char*)>("rename")(from, to);
}

SHOWN int mkdir(const char* path, mode_t mode) noexcept {
  if (tessera::fails("mkdir", path)) return -1;
  return tessera::real<int (*)(const char*, mode_t)>("mkdir")(path, mode);
}

SHOWN int ftruncate(int fd, off_t size) noexcept {
  const std::string path = tessera::path_of(fd);
  if (tessera::fate("truncate", path, path) == Fate::kFails) return -1;
  return tessera::real<int (*)(int, off_t)>("ftruncate")(fd, size);
}
