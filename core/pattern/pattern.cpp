#include "pattern/pattern.hpp"

#include <algorithm>

#include <fmt/format.h>

namespace tessera {

namespace {
bool printable(char c) { return c > 0x20 && c < 0x7f; }
}  // namespace

Pattern parse_pattern(std::string_view text, std::vector<PatternProblem>& problems) {
  Pattern pattern{.text = std::string(text)};
  const auto problem = [&](std::string rule, int64_t at) { problems.push_back({std::move(rule), at}); };
  const auto size = static_cast<int64_t>(text.size());
  int64_t stage_begin = 0;  // where the current stage began
  const auto end_stage = [&](int64_t at) {
    if (at == stage_begin) problem(pattern.num_stages == 1 && at == size ? "empty pattern" : "empty stage", std::max<int64_t>(0, at == size ? at - 1 : at));
    stage_begin = at + 1;
  };
  for (int64_t at = 0; at < size; ++at) {
    const char c = text[at];
    if (c == '/' && pattern.has_head) {
      problem("a second '/'", at);
    } else if (c == '/') {
      end_stage(at);
      pattern.has_head = true;
      if (at + 1 == size) problem("no layers after '/'", at);
    } else if (c == '|' && pattern.has_head) {
      problem("'|' in the head's part", at);
    } else if (c == '|') {
      end_stage(at);
      ++pattern.num_stages;
    } else if (!printable(c)) {
      problem(c == ' ' ? "a space is no symbol" : fmt::format("byte 0x{:02x} is no symbol", static_cast<unsigned char>(c)), at);
    } else if (pattern.has_head) {
      pattern.head.push_back({c, at, pattern.num_stages - 1});
    } else {
      pattern.main.push_back({c, at, pattern.num_stages - 1});
    }
  }
  if (!pattern.has_head) end_stage(size);
  return pattern;
}

void check_pattern(std::string_view text, const std::string& key, Issues& issues) {
  constexpr size_t kShown = 8;
  std::vector<PatternProblem> problems;
  parse_pattern(text, problems);
  for (size_t i = 0; i < std::min(problems.size(), kShown); ++i)
    issues.add(key, fmt::format("{} at position {}\n{}", problems[i].rule, problems[i].position, show_position(text, problems[i].position)));
  if (problems.size() > kShown) issues.add(key, fmt::format("{} more problems", problems.size() - kShown));
}

std::string show_position(std::string_view text, int64_t position) {
  constexpr int64_t kBefore = 60, kAfter = 20;  // characters of a long pattern that are shown around the position
  const auto size = static_cast<int64_t>(text.size());
  position = std::clamp<int64_t>(position, 0, size);
  int64_t begin = 0, end = size;
  if (size > kBefore + kAfter) {
    begin = std::max<int64_t>(0, position - kBefore);
    end = std::min(size, position + kAfter);
  }
  std::string shown = begin > 0 ? "..." : "";
  const auto caret = static_cast<int64_t>(shown.size()) + position - begin;
  for (int64_t at = begin; at < end; ++at) shown += printable(text[at]) || text[at] == ' ' ? text[at] : '?';
  if (end < size) shown += "...";
  return "  " + shown + "\n  " + std::string(caret, ' ') + "^";
}

}  // namespace tessera
