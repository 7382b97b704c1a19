// What one rank of a mesh holds of a parameter: the part that tensor and expert axes leave it, before flat buffers are cut over data ranks.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "parallel/mesh_groups.hpp"
#include "tessera/tables.hpp"

namespace tessera {

// Elements of the part (by its own index) that `size` neighbouring ranks along `axis` hold alike, and whose gradients are the sum of theirs.
struct SharedElements {
  Range elements;
  Axis axis = Axis::kTensor;
  int64_t size = 1;
};

class LocalPart {
 public:
  // Throws Error(kUsage) with the rule where the mesh cannot cut the parameter.
  LocalPart(const Param& param, const Mesh& mesh, const Place& place);

  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t size() const { return num_elements(shape_); }
  bool whole() const { return whole_; }
  const std::vector<SharedElements>& shared() const { return shared_; }

  // The part of a tensor of the global shape; a view where that is possible.
  at::Tensor take(const at::Tensor& global) const;
  // Writes the part into its place in a tensor of the global shape.
  void put(const at::Tensor& part, const at::Tensor& global) const;
  // Stretches of the part's elements [begin, end) that lie together in the global tensor: their first global element, first own element, and number.
  void for_stretches(Range elements, const std::function<void(int64_t global, int64_t own, int64_t count)>& visit) const;

 private:
  std::vector<int64_t> global_shape_, shape_;
  std::vector<std::vector<Range>> ranges_;  // of every dimension, in the order of the part
  std::vector<SharedElements> shared_;
  bool whole_ = true;
};

// What two ranges have in common; begin >= end where that is nothing.
inline Range common(Range a, Range b) { return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end}; }

// Whether an axis of the experts' view cuts it: such parameters are reduced over the copies of an expert and not over all data ranks.
bool is_expert(const Param& param);

}  // namespace tessera
