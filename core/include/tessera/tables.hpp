// The declared tables of a block: parameters, buffers, decode state, cost. Allocation, initialisation, sharding, optimizer groups,
// checkpoint and HF names, memory and FLOP figures are all derived from these rows. Shapes are GLOBAL: no rank in sight.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "tessera/env.hpp"

namespace tessera {

// Initial values. They depend on (seed, layer, parameter name, element index) only, never on a layout.
struct Init {
  enum class Kind { kConstant, kNormal, kUniform };
  Kind kind = Kind::kNormal;
  double mean = 0, std = 0;                        // kConstant: mean
  double low = 0, high = 1;                        // kUniform
  std::function<double(double)> map;               // applied to the drawn value; empty: as drawn

  static Init constant(double value) { return {.kind = Kind::kConstant, .mean = value}; }
  static Init normal(double std) { return {.kind = Kind::kNormal, .std = std}; }
  static Init uniform(double low, double high, std::function<double(double)> map = {}) {
    return {.kind = Kind::kUniform, .low = low, .high = high, .map = std::move(map)};
  }
};

// A cut of dimension `dim` over a mesh axis, in multiples of `unit` elements. When the degree exceeds size / unit, and is a multiple of
// it, ranks share a unit in sub-groups (replicated) and its gradient is summed over the sub-group.
struct Shard {
  Axis axis;
  int64_t dim = 0;
  int64_t unit = 1;
};

// A named part of a packed matrix along the cut dimension, cut by its own unit.
// Mamba2's in_proj.weight is {z, x, B, C, dt}: every rank gets its heads of z, x and dt and its groups of B and C.
struct Segment {
  std::string name;
  int64_t size = 0;
  int64_t unit = 1;
};

struct Param {
  std::string name;             // "in_proj.weight": unique in the block; the checkpoint's name behind `layers.<index>.`
  std::vector<int64_t> shape;   // global
  std::vector<Shard> shards;    // empty means replicated, and must be written: use `replicated()`
  std::vector<Segment> segments;  // of dimension shards[0].dim; sizes sum to its length; empty: one segment
  Init init;
  bool decay = true;            // weight decay applies
  bool fp32 = false;            // stays fp32 in every training dtype
  std::string hf_name;          // behind `backbone.layers.N.`; empty: "mixer." + name. "{}" stands for the index of dimension 0, which HF splits
  std::string hf_packed_name;   // the spelling newer files use for the unsplit tensor; empty: none
};
inline std::vector<Shard> replicated() { return {}; }
using ParamTable = std::vector<Param>;

// Non-trained state of a block that is saved with it, fp32, the same on every rank.
struct Buffer {
  std::string name;
  std::vector<int64_t> shape;
  double init = 0;
  std::string hf_name;  // as in Param
};
using BufferTable = std::vector<Buffer>;

// Decode state. Per-sequence rows (SSM, convolution) are overwritten by each step and rolled back from a snapshot;
// per-token rows (K, V) are kept for every token seen and rolled back by truncation.
struct State {
  enum class Per { kSequence, kToken };
  std::string name;
  std::vector<int64_t> shape;  // of one sequence or of one token, global
  Per per = Per::kSequence;
  bool fp32 = false;           // else the compute dtype
  std::vector<Shard> shards;   // dims of `shape`
};
using StateTable = std::vector<State>;

// What one forward pass over some documents takes. A backward pass takes twice the FLOPs of each kind.
struct Cost {
  double matmul = 0;       // FLOPs in matrix products with parameters (2 a multiply-add)
  double mixing = 0;       // FLOPs in products among activations: attention scores, scan chunks
  double elementwise = 0;  // FLOPs elsewhere, roughly
  double bytes = 0;        // moved to and from memory beyond the weights, in elements of the compute dtype
  double activations = 0;  // elements kept for the backward pass without recomputation
  double flops() const { return matmul + mixing; }
  Cost& operator+=(const Cost& other);
};

int64_t num_elements(const std::vector<int64_t>& shape);

// The slices of dimension `dim` that rank `rank` of `degree` holds, as [begin, end) ranges in global coordinates, segment by segment.
// Fails (nullopt) where a segment cannot be cut: `why` then gives the rule with its numbers.
struct Range {
  int64_t begin = 0, end = 0;
};
std::optional<std::vector<Range>> shard_ranges(const Param& param, const Shard& shard, int64_t degree, int64_t rank, std::string* why);
// Shape on one rank of `mesh`; nullopt with `why` where the mesh does not admit the parameter.
std::optional<std::vector<int64_t>> local_shape(const Param& param, const Mesh& mesh, std::string* why);

}  // namespace tessera
