// What a model's values look like from inside, for the metrics and for a step that failed. All ranks call alike.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "model/model.hpp"

namespace tessera {

// Where a value that is not finite came from, the same on every rank: "layers.3 (mamba2), forward", or the gradient of the last unit of the stack that has one.
std::string diagnose_nonfinite(Model& model, const std::vector<Batch>& micro_batches);

// RMS of the residual stream after the embedding (-1) and after each layer, of those that this pipeline rank has.
std::map<int64_t, double> residual_norms(Model& model, const Batch& batch);

}  // namespace tessera
