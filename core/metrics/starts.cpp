#include "metrics/starts.hpp"

#include <fmt/chrono.h>
#include <unistd.h>

#include <string>

#include "checkpoint/file.hpp"
#include "metrics/machine.hpp"
#include "parallel/rendezvous.hpp"
#include "tessera/build_key.hpp"

namespace tessera {

using nlohmann::json;

json describe_start() {
  return {{"time", fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)))}, {"version", TESSERA_VERSION}, {"build", TESSERA_BUILD_KEY}, {"host", host_name()},
          {"cpu", processor_name()}, {"cores", ::sysconf(_SC_NPROCESSORS_ONLN)}, {"memory_bytes", ::sysconf(_SC_PHYS_PAGES) * ::sysconf(_SC_PAGESIZE)}};
}

void append_start(const std::filesystem::path& file, const json& start) {
  const int fd = open_append(file);
  try {
    append_to(fd, start.dump(-1, ' ', false, json::error_handler_t::replace) + "\n", file);
  } catch (...) {
    close_file(fd);
    throw;
  }
  close_file(fd);
}

}  // namespace tessera
