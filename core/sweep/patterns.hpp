// Patterns as an axis of a sweep: literal lists, and generators that make patterns from a rule.
// In a sweep's file one value says them: a pattern, a generator, or an array of both.
//   "MEM*"                                        itself
//   { list = ["MEM*", "MEME"] }                   each of them
//   { ratio = { M = 6, "*" = 1 }, layers = 28 }   ratio_pattern
//   { cell = "MEM*", repeat = 4 }                 repeat_pattern
//   { base = "MEMEMEME", every = { "*" = 6 } }    every sixth layer, the first of them the sixth, becomes `*`; of several letters a later one goes over an earlier
//   { base = "MEME", insert = "*", at = PLACES }  one pattern a place p of 0..layers: `*` becomes layer p, before the layer that was p, in its stage
//   { base = "MEME", replace = "M", by = "*", at = PLACES }  one pattern a layer p that is `M`
// PLACES is "each", a number or a list of numbers; layers are counted from 0. Each table may have `dialect`. `every`, `insert`, `replace` and `repeat` change
// the main stack; `|` and the `/` part of a base stay where they are.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "config/toml_tree.hpp"
#include "tessera/schema.hpp"

namespace tessera {

// The keys of a generator, but for the tables `ratio` and `every` and for `at`.
struct PatternGenerator {
  std::vector<std::string> list;
  int64_t layers = 0;
  std::string base, insert, replace, by, cell;
  int64_t repeat = 0;
  std::string dialect;
};
Schema<PatternGenerator> pattern_schema();

struct SweptPattern {
  std::string text;
  std::string dialect;  // "": that of the base configuration
  bool operator==(const SweptPattern&) const = default;
};
struct SweptPatterns {
  std::vector<SweptPattern> list;  // in the order in which the value says them, each once
  std::vector<std::string> notes;  // what was left out, or may surprise
};

// Reads the value that issues call `path`. Every pattern obeys parse_pattern; what its letters mean is looked up by the configuration that takes it.
// More than 10^4 patterns are an issue.
SweptPatterns read_patterns(const std::string& path, const TomlNode& node, Issues& issues);

using LetterCounts = std::vector<std::pair<char, int64_t>>;

// How many of `layers` each letter gets: the nearest to the ratio by largest remainder. All get the whole part of layers * weight / sum of weights; the layers that
// are left go one each to the largest remainders, of equal ones to the earlier letter. Weights in [1, 10^6], `layers` in [0, 10^4].
LetterCounts ratio_counts(const LetterCounts& ratio, int64_t layers);

// Those counts spread evenly: the i-th of c equal letters wants to be at (i + 1/2) / c of the stack, all are sorted by that, equal ones in the order of `ratio`.
std::string ratio_pattern(const LetterCounts& ratio, int64_t layers);

// The main part of `cell` `times` over, then its `/` part.
std::string repeat_pattern(const std::string& cell, int64_t times);

}  // namespace tessera
