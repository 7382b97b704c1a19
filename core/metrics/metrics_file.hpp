// metrics.jsonl: one JSON object a line, one line a step.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>

namespace tessera {

// Opens the file for appending. Lines of steps up to `last_step` are kept, later ones and a last line that a crash cut short are removed (in one
// atomic replacement): 0 begins anew, a resumed run passes the step it goes on from. Error(kRuntime) `<file>:<line>: ...` where an earlier line is no
// object with an integer `step`; Error(kRuntime) that names the file and the system's reason where it cannot be written.
class MetricsFile {
 public:
  MetricsFile(std::filesystem::path path, int64_t last_step);
  ~MetricsFile();
  MetricsFile(const MetricsFile&) = delete;
  MetricsFile& operator=(const MetricsFile&) = delete;
  // Numbers are written so that they read back exactly; NaN and infinities, which JSON lacks, as null.
  void write(const nlohmann::json& line);
  // To disk: the lines that a checkpoint's resumption keeps must last as long as the checkpoint.
  void flush();

 private:
  std::filesystem::path path_;
  int fd_ = -1;
};

}  // namespace tessera
