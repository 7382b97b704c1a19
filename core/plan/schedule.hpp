// Which pipeline rank works on which micro-batch when.
#pragma once
#include <cstdint>
#include <vector>

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

}  // namespace tessera
