// What is in a checkpoint's tensors, and in a model's layers while it reads a text.
#pragma once
#include <string>
#include <vector>

#include "checkpoint/safetensors.hpp"
#include "model/model.hpp"

namespace tessera {

struct TensorStatistics {
  std::string name, dtype;
  std::vector<int64_t> shape;
  double mean = 0, rms = 0, least = 0, greatest = 0;  // of the finite elements
  double zeros = 0;                                   // share of the elements
  int64_t not_finite = 0;                             // elements
};
// One tensor at a time, in the order of names.
std::vector<TensorStatistics> tensor_statistics(const SafetensorsFolder& file);

struct LayerStatistics {
  std::string layer;                             // "layers.3 (moe)"
  double residual_rms = 0;                       // of the residual stream behind it
  std::map<std::string, double> state_rms;       // of each row of decode state that the text leaves; of per-token rows, over its tokens
  std::map<std::string, std::vector<double>> counts;  // what the layer counts, such as tokens by expert: "expert_load"
  std::map<std::string, std::vector<double>> observed;  // what its block tells of this text (Context::observe), such as by head: "attention_entropy"
};
// Of the layers of the main stack, with one document as input.
std::vector<LayerStatistics> layer_statistics(Model& model, const std::vector<int64_t>& ids);

}  // namespace tessera
