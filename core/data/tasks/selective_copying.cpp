#include <fmt/format.h>

#include <algorithm>

#include "data/tasks/task.hpp"

namespace tessera {

namespace {

void check(const TaskConfig& c, Issues& issues) {
  for (const auto& [key, list] : {std::pair<const char*, std::vector<int64_t>>{"length", {c.length}}, {"eval_lengths", c.eval_lengths}})
    for (const int64_t length : list)
      if (length < 2 * c.num_tokens)
        return issues.add(key, fmt::format("must hold the tokens and their copies, got {} < 2 x {} = {}", length, c.num_tokens, 2 * c.num_tokens), fmt::format("nearest: {}", 2 * c.num_tokens));
}

// Ids: 0 is noise, 1 asks for a copy, [2, V) are content. n tokens of content stand at places drawn from all but the last n, between noise; at the
// last n tokens, all 1, they are asked for in their order.
void write(const TaskConfig& config, const TaskSize& size, Dice& dice, TaskDocument& document) {
  const int64_t n = config.num_tokens, first = size.length - n;
  std::vector<int64_t> places = dice.distinct(n, first);
  std::sort(places.begin(), places.end());
  for (int64_t i = 0; i < n; ++i) {
    const int64_t id = 2 + dice.below(config.vocab_size - 2);
    document.ids[static_cast<size_t>(places[static_cast<size_t>(i)])] = id;
    document.ids[static_cast<size_t>(first + i)] = 1;
    document.targets[static_cast<size_t>(first + i)] = {.id = id, .group = size.length};
  }
}

}  // namespace

Task selective_copying() {
  return {.name = "selective_copying",
          .source = "Gu and Dao 2023, arXiv:2312.00752, after Jing et al. 2017, arXiv:1706.02761",
          .axis = "length",
          .keys = {"length", "eval_lengths", "vocab_size", "num_tokens"},
          .num_ids = [](const TaskConfig& config) { return config.vocab_size; },
          .check = check,
          .write = write};
}

}  // namespace tessera
