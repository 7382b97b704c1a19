#include "metrics/metrics_file.hpp"

#include <fmt/format.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "checkpoint/file.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace fs = std::filesystem;
using nlohmann::json;

namespace {

// The text of the lines up to a step. A text that does not end in a newline has lost the rest of its last line.
std::string kept_lines(const std::string& text, int64_t last_step, const fs::path& path) {
  std::string kept;
  int64_t number = 1;
  for (size_t begin = 0; begin < text.size(); ++number) {
    const size_t end = text.find('\n', begin);
    if (end == std::string::npos) break;
    const std::string place = fmt::format("{}:{}", path.string(), number);
    const json line = strict_json(std::string_view(text).substr(begin, end - begin), place, 64);
    const auto step = line.is_object() ? line.find("step") : line.end();
    if (step == line.end() || !step->is_number_integer())
      throw Error(ExitCode::kRuntime, place + ": must be an object with an integer 'step'", "move the file away: it is written by training runs alone");
    if (step->get<int64_t>() <= last_step) kept.append(text, begin, end + 1 - begin);
    if (step->get<int64_t>() >= last_step) break;  // a crash may have left anything behind it
    begin = end + 1;
  }
  return kept;
}

}  // namespace

MetricsFile::MetricsFile(fs::path path, int64_t last_step) : path_(std::move(path)) {
  if (fs::exists(path_)) {
    const std::string text = last_step > 0 ? read_file(path_, std::numeric_limits<int64_t>::max()) : "";
    const std::string kept = kept_lines(text, last_step, path_);
    if (last_step == 0 || kept.size() != text.size()) write_file(path_, kept);
  }
  fd_ = open_append(path_);
}

MetricsFile::~MetricsFile() { close_file(fd_); }

void MetricsFile::write(const json& line) { append_to(fd_, line.dump(-1, ' ', false, json::error_handler_t::replace) + "\n", path_); }

void MetricsFile::flush() { flush_file(fd_, path_); }

}  // namespace tessera
