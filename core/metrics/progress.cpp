#include "metrics/progress.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace tessera {

namespace {

// Three significant digits of a number below 1000.
std::string three_digits(double value) {
  const double size = std::abs(value);
  return fmt::format("{:.{}f}", value, size >= 99.95 ? 0 : size >= 9.995 ? 1 : size >= 0.9995 ? 2 : 3);
}

std::string scaled(double value, double base, std::initializer_list<const char*> prefixes) {
  if (!std::isfinite(value)) return fmt::format("{} ", value);
  const auto last = prefixes.end() - 1;
  auto prefix = prefixes.begin();
  for (; prefix != last && std::abs(value) >= 999.5; ++prefix) value /= base;
  return three_digits(value) + " " + *prefix;
}

}  // namespace

std::string format_si(double value) { return scaled(value, 1e3, {"", "k", "M", "G", "T", "P", "E"}); }

std::string format_bytes(int64_t bytes) {
  if (bytes < 1000) return fmt::format("{} B", bytes);
  return scaled(static_cast<double>(bytes) / 1024, 1024, {"KiB", "MiB", "GiB", "TiB", "PiB"});
}

std::string format_duration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0 || seconds > 1e10) return "?";
  const auto s = static_cast<int64_t>(std::llround(seconds));
  if (s < 60) return fmt::format("{}s", s);
  if (s < 3600) return fmt::format("{}m{:02}s", s / 60, s % 60);
  if (s < 86400) return fmt::format("{}h{:02}m", s / 3600, s / 60 % 60);
  return fmt::format("{}d{:02}h", s / 86400, s / 3600 % 24);
}

std::string progress_line(const Progress& p) {
  const int width = static_cast<int>(std::to_string(p.steps).size());
  std::string line = fmt::format("step {:>{}}/{}  loss {:.4f}", p.step, width, p.steps, p.loss);
  if (p.val_loss) line += fmt::format("  val {:.4f}", *p.val_loss);
  if (p.val_accuracy) line += fmt::format(" ({:.1f} % right)", 100 * *p.val_accuracy);
  line += fmt::format("  norm {:.3g}  {}tok/s  {}FLOP/s", p.grad_norm, format_si(p.tokens_per_s), format_si(p.flops_per_s));
  if (p.peak_share > 0) line += fmt::format(" ({:.0f} %)", 100 * p.peak_share);
  return line + fmt::format("  {}  {} left", format_bytes(p.memory_bytes), format_duration(p.seconds_left));
}

std::string progress_text(const Progress& progress, bool terminal, bool keep) {
  return (terminal ? "\r\033[K" : "") + progress_line(progress) + (keep || !terminal ? "\n" : "");
}

}  // namespace tessera
