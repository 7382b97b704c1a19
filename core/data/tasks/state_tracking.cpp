// Tasks whose answer is the product of all that was read: parity, and permutations.
#include <algorithm>
#include <numeric>

#include "data/tasks/task.hpp"

namespace tessera {

namespace {

// The least length of training or validation that a prefix fits into.
int64_t length_group(const TaskConfig& config, int64_t prefix) {
  int64_t group = 0;
  const auto offer = [&](int64_t length) {
    if (length >= prefix && (group == 0 || length < group)) group = length;
  };
  offer(config.length);
  for (const int64_t length : config.eval_lengths) offer(length);
  return group;
}

// Ids 0 and 1, uniform; at every token the parity of the ones up to it.
void write_parity(const TaskConfig& config, const TaskSize& size, Dice& dice, TaskDocument& document) {
  int64_t parity = 0;
  for (int64_t i = 0; i < size.length; ++i) {
    const auto at = static_cast<size_t>(i);
    parity ^= document.ids[at] = dice.below(2);
    document.targets[at] = {.id = parity, .group = length_group(config, i + 1)};
  }
}

int64_t factorial(int64_t n) { return n <= 1 ? 1 : n * factorial(n - 1); }

// Permutations of [0, degree) in lexicographic order.
std::vector<std::vector<int64_t>> permutations_of(int64_t degree) {
  std::vector<std::vector<int64_t>> all;
  std::vector<int64_t> next(static_cast<size_t>(degree));
  std::iota(next.begin(), next.end(), 0);
  do all.push_back(next);
  while (std::next_permutation(next.begin(), next.end()));
  return all;
}

// Id i is the permutation at place i of the lexicographic order, uniform; at every token the product of those up to it, the later one applied after.
void write_permutations(const TaskConfig& config, const TaskSize& size, Dice& dice, TaskDocument& document) {
  const auto all = permutations_of(config.degree);
  std::vector<int64_t> product = all[0];
  for (int64_t i = 0; i < size.length; ++i) {
    const auto at = static_cast<size_t>(i);
    document.ids[at] = dice.below(static_cast<int64_t>(all.size()));
    for (int64_t& to : product) to = all[static_cast<size_t>(document.ids[at])][static_cast<size_t>(to)];
    document.targets[at] = {.id = std::lower_bound(all.begin(), all.end(), product) - all.begin(), .group = length_group(config, i + 1)};
  }
}

}  // namespace

Task parity() {
  return {.name = "parity",
          .source = "Merrill, Petty and Sabharwal 2024, arXiv:2404.08819; Grazzi et al. 2024, arXiv:2411.12537",
          .axis = "length",
          .keys = {"length", "eval_lengths"},
          .num_ids = [](const TaskConfig&) -> int64_t { return 2; },
          .check = [](const TaskConfig&, Issues&) {},
          .write = write_parity};
}

Task permutations() {
  return {.name = "permutations",
          .source = "Merrill, Petty and Sabharwal 2024, arXiv:2404.08819",
          .axis = "length",
          .keys = {"length", "eval_lengths", "degree"},
          .num_ids = [](const TaskConfig& config) { return factorial(config.degree); },
          .check = [](const TaskConfig&, Issues&) {},
          .write = write_permutations};
}

}  // namespace tessera
