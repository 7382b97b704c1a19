// Conformance: prefill, decoding and the decode state of a block.
#include <ATen/ops/cat.h>
#include <fmt/ranges.h>

#include "tests/support/conformance.hpp"

namespace tessera::conformance {

namespace {

// Spans of one sequence a slot: tokens [start, start + length) of ids.
struct Piece {
  int64_t slot, start, length;
  at::Tensor ids_n;
};
Batch pieces(const std::vector<Piece>& list) {
  std::vector<Span> spans;
  std::vector<at::Tensor> ids;
  for (const Piece& p : list) {
    spans.push_back({.document = p.slot, .start = p.start, .length = p.length, .document_len = p.start + p.length, .state_slot = p.slot});
    ids.push_back(p.ids_n.narrow(0, p.start, p.length));
  }
  return {.ids_n = at::cat(ids), .spans = Spans(spans)};
}

}  // namespace

TEST_P(Conformance, PrefillAndDecodingGiveTheWholeForward) {
  Built built(text());
  const at::Tensor ids = random_ids(130, kVocab);
  const at::Tensor whole = hidden(built.model, {.ids_n = ids, .spans = Spans::documents({130})});
  for (const std::vector<int64_t>& chunks : std::vector<std::vector<int64_t>>{{}, {120}, {1, 2, 3, 63, 31}, {64, 16, 48}}) {
    DecodeState state(built.plan, 1, at::kCPU, at::kFloat);
    std::vector<at::Tensor> rows;
    int64_t seen = 0;
    const auto feed = [&](int64_t length) {
      rows.push_back(hidden(built.model, pieces({{0, seen, length, ids}}), &state));
      seen += length;
    };
    for (const int64_t chunk : chunks) feed(chunk);
    while (seen < 130) feed(1);
    expect(close(at::cat(rows), whole, kStackTolerance), fmt::format("130 tokens fed in chunks of [{}], the rest one by one, against all at once", fmt::join(chunks, ", ")));
  }
}

TEST_P(Conformance, PromptsOfDifferentLengthsTogetherEqualEachAlone) {
  Built built(text());
  const std::vector<int64_t> lengths{1, 63, 130};
  std::vector<at::Tensor> ids, whole;
  for (const int64_t n : lengths) {
    ids.push_back(random_ids(n + 4, kVocab, static_cast<uint64_t>(n)));
    whole.push_back(hidden(built.model, {.ids_n = ids.back(), .spans = Spans::documents({n + 4})}));
  }
  DecodeState state(built.plan, 3, at::kCPU, at::kFloat);
  const auto feed = [&](const std::vector<Piece>& list) {
    const Batch batch = pieces(list);
    const at::Tensor got = hidden(built.model, batch, &state);
    for (size_t i = 0; i < list.size(); ++i)
      expect(close(got.narrow(0, batch.spans.rows()[i], list[i].length), whole[static_cast<size_t>(list[i].slot)].narrow(0, list[i].start, list[i].length), kStackTolerance),
             fmt::format("{} tokens of sequence {} from {} on, fed beside those of other sequences, against the whole sequence alone", list[i].length, list[i].slot, list[i].start));
  };
  feed({{0, 0, 1, ids[0]}, {1, 0, 63, ids[1]}, {2, 0, 100, ids[2]}});
  feed({{2, 100, 30, ids[2]}, {0, 1, 1, ids[0]}});                     // a prompt's second chunk beside another's first new token
  feed({{1, 63, 1, ids[1]}, {2, 130, 1, ids[2]}, {0, 2, 1, ids[0]}});  // in another order
  feed({{0, 3, 2, ids[0]}, {2, 131, 3, ids[2]}});                      // several new tokens, one sequence left out
  feed({{1, 64, 3, ids[1]}});
}

TEST_P(Conformance, DecodeStateRollsBack) {
  Built built(text());
  const at::Tensor ids = random_ids(60, kVocab);
  DecodeState state(built.plan, 1, at::kCPU, at::kFloat);
  hidden(built.model, pieces({{0, 0, 41, ids}}), &state);
  DecodeState kept = state.snapshot();
  const at::Tensor first = hidden(built.model, pieces({{0, 41, 5, ids}}), &state);
  hidden(built.model, pieces({{0, 46, 1, changed(ids, 41, 60)}}), &state);
  expect(bit_equal(hidden(built.model, pieces({{0, 41, 5, ids}}), &kept), first), "5 tokens again from a snapshot of the decode state, other tokens decoded in between");
}

// A slot that another sequence used before holds its leftovers: a span that starts at 0 must not see them.
TEST_P(Conformance, ASlotIsUsedAgainFromNothing) {
  Built built(text());
  const at::Tensor ids = random_ids(40, kVocab, 1), other = random_ids(50, kVocab, 2);
  DecodeState fresh(built.plan, 1, at::kCPU, at::kFloat), used(built.plan, 1, at::kCPU, at::kFloat);
  hidden(built.model, pieces({{0, 0, 50, other}}), &used);
  for (const auto& [start, length] : std::vector<std::pair<int64_t, int64_t>>{{0, 39}, {39, 1}})
    expect(same(built, hidden(built.model, pieces({{0, start, length, ids}}), &used), hidden(built.model, pieces({{0, start, length, ids}}), &fresh)),
           fmt::format("{} tokens from {} on in a slot that another sequence used before, against a fresh slot", length, start));
}

TEST_P(Conformance, EveryStateRowIsWritten) {
  Built built(text());
  DecodeState state(built.plan, 1, at::kCPU, at::kFloat);
  hidden(built.model, pieces({{0, 0, 40, random_ids(40, kVocab)}}), &state);
  for (const LayerPlan& layer : built.plan.layers)
    for (const State& row : layer.states) {
      const at::Tensor& held = state.layer(layer.index).at(row.name);
      if (!held.to(at::kDouble).abs().sum().item<double>()) ADD_FAILURE() << "state row '" << row.name << "' is declared, but holds zeros alone after 40 tokens";
    }
}

}  // namespace tessera::conformance
