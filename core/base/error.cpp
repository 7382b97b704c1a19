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

// Names and values of a file that is not trusted stand in messages: what would move a terminal's cursor or change its colours shows as `?`,
// and a name of megabytes is cut.
std::string printable(std::string text) {
  constexpr size_t kLongest = 32768;
  if (text.size() > kLongest) {
    size_t end = kLongest;
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;  // not inside a character
    text = text.substr(0, end) + "...";
  }
  for (char& c : text)
    if ((static_cast<unsigned char>(c) < 0x20 && c != '\n') || c == 0x7f) c = '?';
  return text;
}
}  // namespace

Error::Error(ExitCode code, std::string message, std::string help)
    : code_(code), message_(printable(std::move(message))), help_(printable(std::move(help))) {
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
