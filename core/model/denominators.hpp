// What the predictions of a batch are made of and what their sums are divided by.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "data/batch.hpp"
#include "plan/plan.hpp"

namespace tessera {

// What sums are divided by, over the global batch. Index 0 is the main prediction, i > 0 the head's pass i - 1.
struct Denominators {
  std::vector<double> targets, tokens, documents;
  Denominators& operator+=(const Denominators& other);
};
Denominators denominators(const ModelPlan& plan, const Batch& batch);

// Of the whole micro-batch: int64 [N], -1 where there is no target; bool [N], undefined where all are valid.
struct PassInputs {
  at::Tensor targets_n, valid_n;
};
// What a prediction `offset` ahead, whose inner stack embeds ids `shift` ahead, may use.
PassInputs pass_inputs(const Batch& batch, int64_t shift, int64_t offset);

}  // namespace tessera
