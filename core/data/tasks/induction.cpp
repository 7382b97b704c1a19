#include "data/tasks/task.hpp"

namespace tessera {

namespace {

// Ids: 0 is the special one, the others are ordinary. One special token stands at a place drawn from all but the last two, and one at the end:
// there, what followed the first is asked for. All else is ordinary and uniform.
void write(const TaskConfig& config, const TaskSize& size, Dice& dice, TaskDocument& document) {
  for (int64_t& id : document.ids) id = 1 + dice.below(config.vocab_size - 1);
  const auto place = static_cast<size_t>(dice.below(size.length - 2));
  document.ids[place] = document.ids.back() = 0;
  document.targets.back() = {.id = document.ids[place + 1], .group = size.length};
}

}  // namespace

Task induction() {
  return {.name = "induction",
          .source = "Olsson et al. 2022, arXiv:2209.11895; in this form Fu et al. 2022, arXiv:2212.14052, and Gu and Dao 2023, arXiv:2312.00752",
          .axis = "length",
          .keys = {"length", "eval_lengths", "vocab_size"},
          .num_ids = [](const TaskConfig& config) { return config.vocab_size; },
          .check = [](const TaskConfig&, Issues&) {},
          .write = write};
}

}  // namespace tessera
