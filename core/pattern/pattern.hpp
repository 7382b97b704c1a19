// The pattern string: letters are layers, `|` cuts pipeline stages, `/` starts the head's inner stack.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/error.hpp"

namespace tessera {

// One letter of the pattern.
struct PatternLayer {
  char symbol = 0;
  int64_t position = 0;  // in the string, counted from 0
  int64_t stage = 0;     // number of `|` before it
};

struct Pattern {
  std::string text;
  std::vector<PatternLayer> main;
  std::vector<PatternLayer> head;  // the `/` part; empty when there is none
  bool has_head = false;
  int64_t num_stages = 1;
};

// A pattern error: what, and the position it is at (0-based), so that the caller can show the string with a caret.
struct PatternProblem {
  std::string rule;
  int64_t position = 0;
};

// Splits `text` into layers. Reports every problem: empty pattern or stage, `|` in the `/` part, a second `/`, an empty `/` part,
// a space or a byte outside printable ASCII. Symbols are not looked up here.
Pattern parse_pattern(std::string_view text, std::vector<PatternProblem>& problems);

// The same as issues of `key`, each with the text and a caret; after the eighth only their number.
void check_pattern(std::string_view text, const std::string& key, Issues& issues);

// `text` with a caret below `position`, in two indented lines; a long text is cut to the part around it. Unprintable bytes show as `?`.
std::string show_position(std::string_view text, int64_t position);

}  // namespace tessera
