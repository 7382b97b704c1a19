#include "tessera/error.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

namespace tessera {

namespace {
bool has_place(const std::string& message) { return message.find(": error: ") != std::string::npos; }
}  // namespace

Error::Error(ExitCode code, std::string message, std::string help)
    : code_(code), message_(std::move(message)), help_(std::move(help)) {
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
  for (const Issue& issue : sorted) {
    if (!text.empty()) text += "\n";
    text += issue.place.empty() ? "error: " : issue.place + ": error: ";
    text += issue.key + ": " + issue.rule;
    if (!issue.help.empty()) text += "\nhelp: " + issue.help;
  }
  if (text.starts_with("error: ")) text = text.substr(7);
  throw Error(ExitCode::kUsage, text);
}

std::string nearest(const std::string& word, const std::vector<std::string>& candidates) {
  std::string best;
  size_t best_distance = word.size() / 3 + 1;
  for (const std::string& candidate : candidates) {
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
