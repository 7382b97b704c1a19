#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "data/tasks/task.hpp"

namespace tessera {

namespace {

using Motif = std::vector<int64_t>;

// Ids: [0, V / 2) spell keys, [V / 2, V) values.
void check(const TaskConfig& c, Issues& issues) {
  int64_t most = 0;
  for (const auto* list : {&c.num_pairs, &c.eval_num_pairs})
    for (const int64_t pairs : *list) most = std::max(most, pairs);
  // Every key takes at most one of the V / 2 first tokens, so that at least half of all draws give a further key.
  if (most > c.vocab_size / 4)
    issues.add("vocab_size", fmt::format("must give keys of which none begins another, got {} / 4 = {} for {} pairs", c.vocab_size, c.vocab_size / 4, most), fmt::format("nearest: {}", 4 * most));
  if (const int64_t needed = 2 * c.motif_len; c.length < needed)
    issues.add("length", fmt::format("must hold a pair of motifs, got {} < 2 x {} = {}", c.length, c.motif_len, needed), fmt::format("nearest: {}", needed));
}

Motif draw_motif(Dice& dice, int64_t most, int64_t first_id, int64_t num_ids) {
  Motif motif(static_cast<size_t>(1 + dice.below(most)));
  for (int64_t& id : motif) id = first_id + dice.below(num_ids);
  return motif;
}

bool begins(const Motif& a, const Motif& b) { return a.size() <= b.size() && std::equal(a.begin(), a.end(), b.begin()); }

// P pairs of a key and a value, each of 1 to motif_len tokens; no key begins another one. Pairs drawn from them with repetition fill the document,
// the last one cut. Every token of a value is asked for whose pair stood in the document before.
void write(const TaskConfig& config, const TaskSize& size, Dice& dice, TaskDocument& document) {
  const int64_t half = config.vocab_size / 2;
  std::vector<Motif> keys, values;
  while (static_cast<int64_t>(keys.size()) < size.num_pairs) {
    const Motif key = draw_motif(dice, config.motif_len, 0, half);
    if (std::any_of(keys.begin(), keys.end(), [&](const Motif& other) { return begins(key, other) || begins(other, key); })) continue;
    keys.push_back(key);
    values.push_back(draw_motif(dice, config.motif_len, half, config.vocab_size - half));
  }
  std::vector<bool> seen(keys.size());
  for (size_t i = 0; i < document.ids.size();) {
    const auto pair = static_cast<size_t>(dice.below(size.num_pairs));
    for (const int64_t id : keys[pair])
      if (i < document.ids.size()) document.ids[i++] = id;
    for (const int64_t id : values[pair]) {
      if (i >= document.ids.size()) break;
      if (seen[pair]) document.targets[i - 1] = {.id = id, .group = size.num_pairs};
      document.ids[i++] = id;
    }
    seen[pair] = true;
  }
}

}  // namespace

Task fuzzy_recall() {
  return {.name = "fuzzy_recall",
          .source = "Poli et al. 2024 (MAD), arXiv:2403.17844",
          .axis = "pairs",
          .keys = {"length", "num_pairs", "eval_num_pairs", "vocab_size", "motif_len"},
          .pair_tokens = 8,
          .num_ids = [](const TaskConfig& config) { return config.vocab_size; },
          .check = check,
          .write = write};
}

}  // namespace tessera
