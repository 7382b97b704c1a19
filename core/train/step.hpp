// One optimizer step over the micro-batches of a global batch.
#pragma once
#include <map>
#include <span>
#include <string>
#include <vector>

#include "data/loader.hpp"
#include "model/model.hpp"
#include "train/optimizer.hpp"

namespace tessera {

struct StepResult {
  double loss = 0;        // main next-token mean over the global batch, nats
  double total_loss = 0;  // with the head's predictions and auxiliary losses
  double grad_norm = 0;   // before clipping
  std::map<std::string, double> parts;  // "mtp.1", "seq_aux", "z"
  LayerCounts counts;
  bool finite = true;     // false: loss or gradient was not, and no step was taken
};

// The micro-batches of one data rank: each takes an equal stretch of a global batch's rows, local_batch_size at a time, so that what all ranks do together
// depends on the rows alone. `first_token` is the number of the first row's first token in training's order. On several data ranks the number of rows divides by local_batch_size x data_ranks.
std::vector<Batch> micro_batches(std::span<const Row> rows, int64_t local_batch_size, int64_t first_token);
// The rows of that stretch: [begin, end).
Range rows_of(int64_t num_rows, int64_t data_rank, int64_t data_ranks);
// Which of the data ranks this one is.
int64_t data_rank(const MeshGroups* groups);

// This data rank's micro-batches of the loader's next global batch, whose first token has the number `first_token` in training's order.
std::vector<Batch> next_batches(Loader& loader, const Config& config, const Mesh& mesh, int64_t data_rank, int64_t first_token);

// Forward and backward over `micro_batches`, which are moved to the model's device (what is counted of those on the host is waited for by none), clipping, AdamW, blocks' after_step. The loss and its gradients are means over the
// valid targets of all micro-batches together. A loss or gradient that is not finite leaves weights, moments and buffers untouched,
// with the gradients still in the store for a diagnosis.
StepResult train_step(Model& model, Optimizer& optimizer, const std::vector<Batch>& micro_batches, double lr, double max_norm);
// The forward and backward half alone: fills the store's gradients.
StepResult accumulate(Model& model, const std::vector<Batch>& micro_batches);

}  // namespace tessera
