// How the parameters that a rank of a mesh holds lie in flat buffers: the one layout that the store allocates and that memory and traffic are planned by.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "plan/placement.hpp"
#include "plan/plan.hpp"

namespace tessera {

// What is gathered and reduced together: a layer, a head's own parameters, the embedding, or the output.
struct Unit {
  std::string key;     // a layer's or head's prefix, or one of the two below
  std::string prefix;  // of its tensors' names
  const ParamTable* params = nullptr;
  const BufferTable* buffers = nullptr;  // nullptr: none
  bool on_both_ends = false;             // the first and the last pipeline rank hold it, with one gradient
};
inline constexpr const char* kEmbeddingUnit = "embedding";  // embedding.weight
inline constexpr const char* kOutputUnit = "output";        // final_norm.weight, lm_head.weight
// Those of this rank's pipeline stages, in checkpoint order. The plan must outlive them.
std::vector<Unit> units_of(const ModelPlan& plan, const Mesh& mesh, const Place& place);

// The parameters of a unit that are reduced, computed and decayed alike.
struct FlatBuffer {
  std::string unit;           // its key
  bool experts = false;       // reduced over the copies of an expert, not over all data ranks
  bool fp32 = false;          // computed in fp32 in every dtype
  bool decay = false;
  bool trainable = true;
  struct Slot {
    std::string name;         // full checkpoint name
    const Param* row = nullptr;
    LocalPart part;           // what tensor and expert axes leave this rank
    int64_t offset = 0;       // elements
    Range range() const { return {offset, offset + part.size()}; }
  };
  std::vector<Slot> slots;
  int64_t ranks = 1;          // that share the buffer in equal parts
  int64_t length = 0;         // elements of the whole buffer, padding included
  Range own;                  // of them held here
  int64_t size() const { return own.end - own.begin; }
  int64_t element_bytes(bool bf16) const { return bf16 && !fp32 ? 2 : 4; }  // of what is computed with
  // Of `own`, by its own index: what other ranks hold alike.
  struct Shared {
    Range range;
    std::optional<Axis> axis;  // neighbours along it; none: the ends of the pipeline
    int64_t ranks = 2;
  };
  std::vector<Shared> shared;
  std::vector<Range> counted;  // of `own`: what this rank counts in sums over all ranks, so that everything counts once
};
std::vector<FlatBuffer> flat_buffers(const Unit& unit, const std::vector<std::string>& freeze, const Mesh& mesh, const Place& place);
// Of all units.
std::vector<FlatBuffer> flat_buffers(const ModelPlan& plan, const std::vector<std::string>& freeze, const Mesh& mesh, const Place& place);

// Whether one of the names or prefixes of training.freeze holds for a parameter.
bool frozen(const std::string& name, const std::vector<std::string>& freeze);

}  // namespace tessera
