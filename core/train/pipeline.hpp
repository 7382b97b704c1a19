// Pipeline parallelism: which stage works on which micro-batch when, and the run of one step by it.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "model/model.hpp"

namespace tessera {

// One stage's forward or backward pass over one micro-batch. Stage s lies on pipeline rank s % num_ranks.
struct PipelineAction {
  bool forward = true;
  int64_t micro = 0, stage = 0;
  bool operator==(const PipelineAction&) const = default;
};

// What every rank does, in order: one forward, one backward in turn once the pipeline is full, so that a rank keeps the activations of about as many
// micro-batches as there are ranks behind it, whatever their number. With more stages than ranks (a multiple) a rank holds several and takes them in
// turns, which shortens the time it idles. Any number of micro-batches will do. Source: PipeDream-Flush and interleaving, arXiv:2104.04473.
std::vector<std::vector<PipelineAction>> pipeline_schedule(int64_t num_ranks, int64_t num_stages, int64_t num_micro);

// Share of the ranks' time that the schedule leaves idle, with a backward pass of twice a forward pass and equal stages.
double pipeline_bubble(const std::vector<std::vector<PipelineAction>>& schedule);

// Forward and backward over the micro-batches of this data rank by the schedule; `result` gets what each one reports on this rank.
void run_pipeline(Model& model, const std::vector<Batch>& micro_batches, const Denominators& over, const std::function<void(const LossResult&)>& result);

// Cross-entropy of every position's next token over this rank's pieces, fp32 [P], where the last stage lies; undefined on the others. No gradients.
at::Tensor stage_by_stage(Model& model, const MicroBatchPtr& micro);
// Model::hidden over pipeline ranks: the result where the last stage lies, undefined on the others; the observer sees the layers of this rank.
at::Tensor hidden_by_stage(Model& model, const Batch& batch, DecodeState* state = nullptr, const Observer& observer = {});

}  // namespace tessera
