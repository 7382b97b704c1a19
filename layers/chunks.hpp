// Spans cut into chunks of one length, for mixers that work on all chunks at once and carry a state from chunk to chunk.
// Letters: N tokens, S spans, M chunks of Q tokens. Chunks lie by their place in the span: all first ones, then all second ones, and so on; at
// every place spans with more chunks come first, so that those which go on to the next place are a prefix. No chunk holds tokens of two spans.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "tessera/spans.hpp"

namespace tessera {

class Chunks {
 public:
  // Chunks of min(longest, the longest span) tokens, the last one of a span padded. longest >= 1; at least one span.
  Chunks(const Spans& spans, int64_t longest, at::Device device);

  int64_t length() const { return length_; }                          // Q
  const std::vector<int64_t>& at_place() const { return at_place_; }  // how many chunks lie at each place; they sum to M
  const std::vector<int64_t>& order() const { return order_; }        // the span of every chunk of the first place
  // x [N, ...] -> [M, Q, ...], zeros in the padding; y [M, Q, ...] -> [N, ...]. Differentiable.
  at::Tensor split(const at::Tensor& x_n) const;
  at::Tensor join(const at::Tensor& y_mq) const;

 private:
  int64_t length_ = 0;
  std::vector<int64_t> at_place_, order_;
  at::Tensor source_, target_;  // int64 [M Q]: the token of a row, N in the padding; [N]: the row of a token
};

}  // namespace tessera
