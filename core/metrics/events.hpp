// Scalars for TensorBoard.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace tessera {

// CRC-32C (Castagnoli) and its masked form. Source: TensorFlow core/lib/hash/crc32c.h, tsl/lib/io/record_writer.h.
uint32_t crc32c(std::string_view bytes);
uint32_t masked_crc32c(std::string_view bytes);

// One events file, `<folder>/events.out.tfevents.<seconds>.<host>`, of records {u64 length, masked crc of it, Event, masked crc of it}. Every scalar is
// on disk's way when scalar() returns. Throws Error(kRuntime) that names the file where it cannot be written.
// Source: TensorFlow core/util/event.proto and framework/summary.proto, encoded by hand.
class EventFile {
 public:
  // `last_step` > 0: the run goes on from there, and TensorBoard forgets what earlier files say of later steps.
  explicit EventFile(const std::filesystem::path& folder, int64_t last_step = 0);
  ~EventFile();
  EventFile(const EventFile&) = delete;
  EventFile& operator=(const EventFile&) = delete;
  // Stored in fp32, not finite values too.
  void scalar(std::string_view tag, int64_t step, double value);
  // The numbers of a line of metrics.jsonl at its step, each under its key; those by group, as of {"val_accuracy_by": {"pairs 4": 0.5}}, under "val_accuracy/pairs 4".
  void line(const nlohmann::json& line);
  const std::filesystem::path& path() const { return path_; }

 private:
  void record(const std::string& event);
  std::filesystem::path path_;
  int fd_ = -1;
};

}  // namespace tessera
