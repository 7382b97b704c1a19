#include "tessera/context_cut.hpp"

#include <ATen/ops/cat.h>

#include <algorithm>

namespace tessera {

namespace {

void add_between(std::vector<Span>& out, const Spans& spans, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < spans.size(); ++i) {
    const Span& span = spans.list()[static_cast<size_t>(i)];
    const int64_t row = spans.rows()[static_cast<size_t>(i)], from = std::max(begin, row), to = std::min(end, row + span.length);
    if (from >= to) continue;
    Span piece = span;
    piece.start += from - row;
    piece.length = to - from;
    out.push_back(piece);
  }
}

}  // namespace

Spans spans_between(const Spans& spans, int64_t begin, int64_t end) {
  std::vector<Span> list;
  add_between(list, spans, begin, end);
  return Spans(std::move(list));
}

Range sequence_range(int64_t n, int64_t degree, int64_t rank) {
  const int64_t each = (n + degree - 1) / degree;
  return {std::min(n, each * rank), std::min(n, each * (rank + 1))};
}

ContextCut::ContextCut(Spans whole, int64_t ranks, int64_t rank) : whole_(std::move(whole)), ranks_(ranks), rank_(rank) {
  const int64_t count = 2 * ranks, n = whole_.num_tokens();
  for (int64_t i = 0; i < count; ++i) chunks_.push_back({.begin = n * i / count, .end = n * (i + 1) / count, .rank = std::min(i, count - 1 - i)});
  for (int64_t i = ranks; i < count; ++i) chunks_[static_cast<size_t>(i)].local = chunks_[static_cast<size_t>(count - 1 - i)].length();
  std::vector<Span> list;
  for (const Range& range : ranges(rank)) add_between(list, whole_, range.begin, range.end);
  spans_ = Spans(std::move(list));
}

std::vector<Range> ContextCut::ranges(int64_t rank) const {
  const Chunk &first = chunks_[static_cast<size_t>(rank)], &second = chunks_[static_cast<size_t>(2 * ranks_ - 1 - rank)];
  return {{first.begin, first.end}, {second.begin, second.end}};
}

int64_t ContextCut::num_tokens(int64_t rank) const {
  int64_t total = 0;
  for (const Range& range : ranges(rank)) total += range.end - range.begin;
  return total;
}

int64_t ContextCut::most_tokens() const {
  int64_t most = 0;
  for (int64_t r = 0; r < ranks_; ++r) most = std::max(most, num_tokens(r));
  return most;
}

at::Tensor ContextCut::take(const at::Tensor& whole_n) const {
  std::vector<at::Tensor> parts;
  for (const Range& range : ranges(rank_)) parts.push_back(whole_n.narrow(0, range.begin, range.end - range.begin));
  return at::cat(parts, 0);
}

}  // namespace tessera
