#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "data/tasks/task.hpp"

namespace tessera {

namespace {

int64_t num_keys(const TaskConfig& config) { return config.vocab_size / 2 - 1; }

void check(const TaskConfig& c, Issues& issues) {
  const int64_t most = *std::max_element(c.num_pairs.begin(), c.num_pairs.end());
  if (4 * most > c.length)
    issues.add("length", fmt::format("must hold every pair and its query, got {} < 4 x {} pairs = {}", c.length, most, 4 * most), fmt::format("nearest: {}", 4 * most));
  for (const auto& [key, list] : {std::pair{"num_pairs", &c.num_pairs}, {"eval_num_pairs", &c.eval_num_pairs}})
    for (const int64_t pairs : *list)
      if (pairs > num_keys(c))
        return issues.add("vocab_size", fmt::format("must give every pair of {} a key, got {} / 2 - 1 = {} keys for {} pairs", key, c.vocab_size, num_keys(c), pairs),
                          fmt::format("nearest: {}", 2 * (pairs + 1)));
}

// Ids: 0 is blank, [1, V / 2) are keys, [V / 2, V) values. Pairs k1 v1 k2 v2 ... stand first; then every key is asked for once, at an even distance
// from them by a power law, between blanks.
void write(const TaskConfig& config, const TaskSize& size, Dice& dice, TaskDocument& document) {
  const int64_t first_value = config.vocab_size / 2, pairs = size.num_pairs, slots = (size.length - 2 * pairs) / 2;
  const std::vector<int64_t> keys = dice.distinct(pairs, num_keys(config)), values = dice.distinct(pairs, config.vocab_size - first_value);
  // Drawn one after the other with odds (slot + 1)^(power - 1): those with the least exponential waiting times of these rates (Efraimidis and Spirakis 2006).
  std::vector<std::pair<double, int64_t>> waits;
  for (int64_t s = 0; s < slots; ++s) waits.emplace_back(-std::log(dice.uniform()) * std::pow(static_cast<double>(s + 1), 1 - config.power), s);
  std::sort(waits.begin(), waits.end());
  for (size_t p = 0; p < static_cast<size_t>(pairs); ++p) {
    const auto query = static_cast<size_t>(2 * pairs + 2 * waits[p].second);
    document.ids[2 * p] = document.ids[query] = 1 + keys[p];
    document.ids[2 * p + 1] = first_value + values[p];
    document.targets[query] = {.id = first_value + values[p], .group = pairs};
  }
}

}  // namespace

Task mqar() {
  return {.name = "mqar",
          .source = "Arora et al. 2023, arXiv:2312.04927, and the code of HazyResearch/zoology",
          .axis = "pairs",
          .keys = {"length", "num_pairs", "eval_num_pairs", "vocab_size", "power"},
          .pair_tokens = 4,
          .num_ids = [](const TaskConfig& config) { return config.vocab_size; },
          .check = check,
          .write = write};
}

}  // namespace tessera
