// How the tokens of a micro-batch lie over the ranks that share it.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "tessera/spans.hpp"
#include "tessera/tables.hpp"

namespace tessera {

// Over the context-parallel ranks: the rows of the whole micro-batch are cut into 2 x ranks chunks of near equal length, wherever that falls in a
// document. Rank r holds chunks r and 2 x ranks - 1 - r, one after the other, so that causal attention costs every rank alike. A chunk may be empty.
class ContextCut {
 public:
  struct Chunk {
    int64_t begin = 0, end = 0;  // rows of the whole micro-batch
    int64_t rank = 0;            // who holds them
    int64_t local = 0;           // where they begin among the rows of that rank
    int64_t length() const { return end - begin; }
  };

  ContextCut(Spans whole, int64_t ranks, int64_t rank);

  int64_t num_ranks() const { return ranks_; }
  int64_t rank() const { return rank_; }
  const Spans& whole() const { return whole_; }
  const std::vector<Chunk>& chunks() const { return chunks_; }  // in the order of rows
  int64_t num_tokens(int64_t rank) const;
  int64_t most_tokens() const;                                  // of any rank
  // Row numbers in the whole micro-batch of the rows that `rank` holds, in its order.
  std::vector<Range> ranges(int64_t rank) const;
  // The spans of this rank: pieces of documents, with their positions and the documents' numbers and lengths.
  const Spans& spans() const { return spans_; }
  // This rank's rows of a tensor of the whole micro-batch, [N, ...].
  at::Tensor take(const at::Tensor& whole_n) const;

 private:
  Spans whole_, spans_;
  int64_t ranks_, rank_;
  std::vector<Chunk> chunks_;
};

// Rows [begin, end) of n that tensor-parallel rank `rank` of `degree` holds where tokens are cut over them: ceil(n / degree) each, the last ones fewer or none.
Range sequence_range(int64_t n, int64_t degree, int64_t rank);

// The spans of rows [begin, end): the pieces of `spans` that lie there.
Spans spans_between(const Spans& spans, int64_t begin, int64_t end);

}  // namespace tessera
