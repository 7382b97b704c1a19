// ModelPlan: the model as data. Every name, shape, shard, state and cost is read from here; no tensor, no device.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "config/config.hpp"

namespace tessera {

// One layer of the main stack or of the head's inner stack.
struct LayerPlan {
  std::string prefix;        // "layers.3." or "heads.mtp.layers.0.": what its tensors are called by
  int64_t index = 0;         // position in its stack
  int64_t stage = 0;         // pipeline stage
  char symbol = 0;
  std::string binding;       // table below [blocks]
  const BlockType* type = nullptr;
  ConfigPtr config;
  int64_t weights_of = 0;    // index of the layer (of the same stack) whose weights it uses; its own unless the binding is shared
  ParamTable params;         // the block's rows and, first, the core's `pre_norm.weight`
  BufferTable buffers;
  StateTable states;
};

// The head, for each of its weight sets: own parameters and inner layers.
struct HeadSet {
  std::string prefix;        // "heads.mtp." or "heads.mtp.1." when there are several sets
  ParamTable params;
  std::vector<LayerPlan> layers;
};

struct HeadPlan {
  std::string name;
  const HeadType* type = nullptr;
  ConfigPtr config;
  std::vector<HeadPass> passes;
  std::vector<HeadSet> sets;
};

struct ModelPlan {
  ModelConfig model;
  Env env;
  Pattern pattern;
  ParamTable embedding;      // embedding.weight
  ParamTable output;         // final_norm.weight, lm_head.weight (absent when tied)
  std::vector<LayerPlan> layers;
  std::optional<HeadPlan> head;
  int64_t num_stages = 1;    // pipeline stages: the pattern's, or, where it has no `|`, as many as pipeline ranks, of near equal cost
};

ModelPlan make_plan(const Config& config, const Mesh& mesh = {});

// Every stored tensor of the model in checkpoint order, shared weights once: the one list that store, checkpoints and conversion walk.
struct TensorRow {
  std::string name;           // full checkpoint name
  const Param* param = nullptr;    // exactly one of the two is set
  const Buffer* buffer = nullptr;
  const LayerPlan* layer = nullptr;  // nullptr for the embedding, the output and the head's own parameters
  const std::vector<int64_t>& shape() const { return param ? param->shape : buffer->shape; }
};
std::vector<TensorRow> tensor_rows(const ModelPlan& plan);

// Totals in the hub layout, where experts are split and buffers count.
struct Totals {
  int64_t elements = 0, tensors = 0;
  int64_t trained = 0;  // elements of parameters, buffers left out
};
Totals totals(const ModelPlan& plan);

// Forward cost of a batch of documents by binding, the head's passes and the lm_head included ("lm_head", "embedding", "norm").
struct CostRow {
  std::string name;
  int64_t num_layers = 0;
  Cost cost;
};
std::vector<CostRow> cost_rows(const ModelPlan& plan, const Documents& documents);

}  // namespace tessera
