// Pipeline parallelism: the run of one step, and of passes without gradients, over the ranks that share the layers.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "model/model.hpp"

namespace tessera {

// Forward and backward over the micro-batches of this data rank by the schedule; `result` gets what each one reports on this rank.
void run_pipeline(Model& model, const std::vector<Batch>& micro_batches, const Denominators& over, const std::function<void(const LossResult&)>& result);

// Of this rank's pieces, where the last stage lies; undefined on the others.
TokenScores scores_by_stage(Model& model, const MicroBatchPtr& micro, bool hits);
// Model::hidden over pipeline ranks: the result where the last stage lies, undefined on the others; the observer sees the layers of this rank.
at::Tensor hidden_by_stage(Model& model, const Batch& batch, DecodeState* state = nullptr, const Observer& observer = {});

}  // namespace tessera
