// Kernels of linear_cross_entropy on a chunk of logits, on plain pointers. c rows of V words, which lie one after the other.
#pragma once
#include "layers/cuda/types.hpp"

namespace tessera::gpu {

struct LogitRows {
  void* logits;  // [c, V] in `type`
  Type type;
  int64_t c, V;
  const int64_t* targets;  // int64 [c], -1: none
  int64_t first;           // the id of the first word; a target outside [first, first + V) is another rank's
};

// loss [c] = log-sum-exp - logit of the target, 0 without one. With want_gradient the logits become softmax - onehot, zeros without a target.
Status softmax_rows(const LogitRows& rows, float* loss, bool want_gradient, Stream stream);

// The same in two halves, for words that lie over ranks: the greatest logit, sum exp(logit - greatest), and the target's logit or 0 ...
Status softmax_sums(const LogitRows& rows, float* greatest, float* sum, float* picked, Stream stream);
// ... and the gradient from the log-sum-exp of all ranks.
Status softmax_gradient(const LogitRows& rows, const float* log_sum_exp, Stream stream);

// How many logits of a row are at least as great as `picked` -> fp32 [c]; targets do not count.
Status count_as_great(const LogitRows& rows, const float* picked, float* count, Stream stream);

}  // namespace tessera::gpu
