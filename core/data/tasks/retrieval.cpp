#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "data/tasks/task.hpp"

namespace tessera {

namespace {

int64_t num_keys(const TaskConfig& config) { return config.vocab_size / 3; }

void check(const TaskConfig& c, Issues& issues) {
  for (const auto& [key, list] : {std::pair<const char*, std::vector<int64_t>>{"length", {c.length}}, {"eval_lengths", c.eval_lengths}})
    for (const int64_t length : list)
      if (length < 3 * c.num_needles)
        return issues.add(key, fmt::format("must hold every needle and its query, got {} < 3 x {} = {}", length, c.num_needles, 3 * c.num_needles), fmt::format("nearest: {}", 3 * c.num_needles));
  if (c.num_needles > num_keys(c))
    issues.add("vocab_size", fmt::format("must give every needle a key, got {} / 3 = {} keys for {} needles", c.vocab_size, num_keys(c), c.num_needles), fmt::format("nearest: {}", 3 * c.num_needles));
}

// Ids: [0, V / 3) are keys, [V / 3, 2 V / 3) values, the rest noise. Needles, a key and its value, stand at places drawn from all; the last n tokens
// are their keys in random order, and the values are asked for. A group holds distances between a value and its query in (group / 2, group].
void write(const TaskConfig& config, const TaskSize& size, Dice& dice, TaskDocument& document) {
  const int64_t n = config.num_needles, third = num_keys(config), first = size.length - n;
  for (int64_t i = 0; i < first; ++i) document.ids[static_cast<size_t>(i)] = 2 * third + dice.below(config.vocab_size - 2 * third);
  // n pairs among first - 2 n noise tokens: every choice of n of first - n places is one arrangement.
  std::vector<int64_t> places = dice.distinct(n, first - n);
  std::sort(places.begin(), places.end());
  const std::vector<int64_t> keys = dice.distinct(n, third), order = dice.distinct(n, n);
  for (int64_t i = 0; i < n; ++i) {
    const auto at = static_cast<size_t>(places[static_cast<size_t>(i)] + i), query = static_cast<size_t>(first + order[static_cast<size_t>(i)]);
    document.ids[at] = document.ids[query] = keys[static_cast<size_t>(i)];
    document.ids[at + 1] = third + dice.below(third);
    document.targets[query] = {.id = document.ids[at + 1], .group = static_cast<int64_t>(std::bit_ceil(query - at - 1))};
  }
}

}  // namespace

Task retrieval() {
  return {.name = "retrieval",
          .source = "after Mohtashami and Jaggi 2023, arXiv:2305.16300 (passkey retrieval), and Hsieh et al. 2024, arXiv:2404.06654 (RULER, several needles)",
          .axis = "distance",
          .keys = {"length", "eval_lengths", "vocab_size", "num_needles"},
          .num_ids = [](const TaskConfig& config) { return config.vocab_size; },
          .check = check,
          .write = write};
}

}  // namespace tessera
