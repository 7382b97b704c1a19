#include "tessera/error.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

namespace tessera {

namespace {
constexpr size_t kMostIssues = 50;

// A message that begins with a place, `file:12:3: error: ...`, says already that it is an error.
bool has_place(const std::string& message) {
  const std::string first = message.substr(0, message.find('\n'));
  return first.starts_with("error: ") || first.find(": error: ") != std::string::npos;
}

// Names and values of a file that is not trusted stand in messages: what would move a terminal's cursor or change its colours shows as `?`, and
// so does a byte that is part of no character. A name of megabytes is cut.
std::string printable(const std::string& text) {
  constexpr size_t kLongest = 32768;
  const auto byte = [&](size_t at) { return at < text.size() ? static_cast<unsigned char>(text[at]) : 0u; };
  std::string out;
  for (size_t at = 0; at < text.size();) {
    if (out.size() >= kLongest) return out + "...";
    const unsigned lead = byte(at);
    size_t length = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : lead >> 3 == 30 ? 4 : 0;
    for (size_t i = 1; i < length; ++i)
      if (byte(at + i) >> 6 != 2) length = 0;
    if (length == 0 || (lead < 0x20 && lead != '\n') || lead == 0x7f) out += '?', length = 1;
    else out += text.substr(at, length);
    at += length;
  }
  return out;
}
}  // namespace

Error::Error(ExitCode code, std::string message, std::string help)
    : code_(code), message_(printable(message)), help_(printable(help)) {
  what_ = has_place(message_) ? message_ : "error: " + message_;
  if (!help_.empty()) what_ += "\nhelp: " + help_;
}
Error::Error(const Error&) = default;
Error::~Error() = default;

void Issues::add(std::string key, std::string rule, std::string help) { list_.push_back({std::move(key), std::move(rule), std::move(help), {}}); }
void Issues::add(Issue issue) { list_.push_back(std::move(issue)); }

namespace {
// "file:12:3" -> 12, 3, so that issues are told in the order of the file.
std::pair<int64_t, int64_t> line_column(const std::string& place) {
  auto second = place.rfind(':');
  if (second == std::string::npos) return {0, 0};
  auto first = place.rfind(':', second - 1);
  if (first == std::string::npos) return {0, 0};
  return {std::atoll(place.c_str() + first + 1), std::atoll(place.c_str() + second + 1)};
}
}  // namespace

void Issues::raise() const {
  if (list_.empty()) return;
  auto sorted = list_;
  std::stable_sort(sorted.begin(), sorted.end(), [](const Issue& a, const Issue& b) { return line_column(a.place) < line_column(b.place); });
  std::string text;
  for (size_t i = 0; i < std::min(sorted.size(), kMostIssues); ++i) {
    const Issue& issue = sorted[i];
    if (!text.empty()) text += "\n";
    text += issue.place.empty() ? "error: " : issue.place + ": error: ";
    text += issue.key + ": " + issue.rule;
    if (!issue.help.empty()) text += "\nhelp: " + issue.help;
  }
  if (sorted.size() > kMostIssues) text += "\nerror: " + std::to_string(sorted.size() - kMostIssues) + " more mistakes";
  throw Error(ExitCode::kUsage, text);
}

std::string nearest(const std::string& word, const std::vector<std::string>& candidates) {
  std::string best;
  size_t best_distance = word.size() / 3 + 1;
  for (const std::string& candidate : candidates) {
    const size_t difference = word.size() > candidate.size() ? word.size() - candidate.size() : candidate.size() - word.size();
    if (difference > best_distance) continue;
    std::vector<size_t> row(candidate.size() + 1);
    std::iota(row.begin(), row.end(), size_t{0});
    for (size_t i = 1; i <= word.size(); ++i) {
      size_t diagonal = row[0]++;
      for (size_t j = 1; j <= candidate.size(); ++j) {
        size_t next = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (word[i - 1] != candidate[j - 1])});
        diagonal = std::exchange(row[j], next);
      }
    }
    if (row.back() < best_distance || (row.back() == best_distance && best.empty())) best_distance = row.back(), best = candidate;
  }
  return best;
}

}  // namespace tessera
