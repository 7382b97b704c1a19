#include <fmt/format.h>

#include <cmath>
#include <map>

#include "data/tasks/task.hpp"

namespace tessera {

namespace {

void check(const TaskConfig& c, Issues& issues) {
  const double contexts = std::pow(static_cast<double>(c.vocab_size), static_cast<double>(c.order));
  if (contexts > static_cast<double>(c.length))
    issues.add("length", fmt::format("must be at least vocab_size^order, so that tokens come again, got {} < {}^{} = {:.0f}", c.length, c.vocab_size, c.order, contexts),
               "lower vocab_size or order, or lengthen documents");
}

// Every document has rules of its own: what follows the first occurrence of n tokens follows them again, three times of four, and is asked for then.
// All else is uniform in [0, V).
void write(const TaskConfig& config, const TaskSize& size, Dice& dice, TaskDocument& document) {
  const auto n = static_cast<size_t>(config.order);
  std::map<std::vector<int64_t>, int64_t> next;
  std::vector<int64_t> last;
  for (size_t i = 0; i < document.ids.size(); ++i) {
    document.ids[i] = dice.below(config.vocab_size);
    if (i >= n) {
      last.assign(document.ids.begin() + static_cast<std::ptrdiff_t>(i - n), document.ids.begin() + static_cast<std::ptrdiff_t>(i));
      const auto rule = next.find(last);
      if (rule == next.end()) {
        next.emplace(last, document.ids[i]);
      } else if (dice.below(4) != 0) {
        document.ids[i] = rule->second;
        document.targets[i - 1] = {.id = rule->second, .group = size.length};
      }
    }
  }
}

}  // namespace

Task ngram() {
  return {.name = "ngram",
          .source = "after Akyürek et al. 2024, arXiv:2401.12973, and Edelman et al. 2024, arXiv:2402.11004",
          .axis = "length",
          .keys = {"length", "eval_lengths", "vocab_size", "order"},
          .num_ids = [](const TaskConfig& config) { return config.vocab_size; },
          .check = check,
          .write = write};
}

}  // namespace tessera
