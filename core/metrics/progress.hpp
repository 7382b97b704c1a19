// What a run says while it trains.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

namespace tessera {

struct Progress {
  int64_t step = 0, steps = 0;
  double loss = 0;                 // nats
  std::optional<double> val_loss, val_accuracy;  // where they were measured
  double grad_norm = 0;
  double tokens_per_s = 0, flops_per_s = 0;
  double peak_share = 0;           // of this machine's measured matrix peak; 0: not known
  int64_t memory_bytes = 0;
  double seconds_left = 0;
};

// "step 12/1000  loss 2.3456  norm 1.23  12.3 ktok/s  120 GFLOP/s (45 %)  1.50 GiB  3m20s left", no line end.
std::string progress_line(const Progress& progress);
// The line as it goes to stderr: on a terminal it replaces the line before (unless `keep` ends it), elsewhere it is a line of its own.
std::string progress_text(const Progress& progress, bool terminal, bool keep);

std::string format_si(double value);            // three digits and a prefix: "12.3 k", "1.00 T", "0.500 "
std::string format_bytes(int64_t bytes);        // "512 B", "1.50 GiB"
std::string format_duration(double seconds);    // "42s", "3m20s", "1h05m", "2d03h"

}  // namespace tessera
