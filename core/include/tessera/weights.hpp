// Handles to a block's parameters and buffers for one use.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>
#include <vector>

#include "tessera/tables.hpp"

namespace tessera {

// One parameter as this rank holds it for one use: gathered, in the compute dtype (fp32 where the row says so).
// Matrices go through operators (`linear`, `grouped_linear`), which take the handle; `tensor()` is for vectors.
class Weight {
 public:
  Weight() = default;
  Weight(at::Tensor tensor, const Param* row) : tensor_(std::move(tensor)), row_(row) {}
  bool defined() const { return tensor_.defined(); }
  const at::Tensor& tensor() const { return tensor_; }
  const Param& row() const { return *row_; }

 private:
  at::Tensor tensor_;
  const Param* row_ = nullptr;
};

// The parameters and buffers of one layer. Valid during one forward call: a block keeps none of it.
class Weights {
 public:
  void add(at::Tensor tensor, const Param* row);
  void add_buffer(std::string name, at::Tensor tensor);
  // The handle of a declared parameter. Throws Error(kPlugin) that lists the declared names when there is none.
  const Weight& operator[](std::string_view name) const;
  // An undefined handle when the parameter is not declared (an optional bias).
  const Weight& find(std::string_view name) const;
  const at::Tensor& buffer(std::string_view name) const;
  const std::vector<Weight>& list() const { return list_; }

 private:
  std::vector<Weight> list_;
  std::vector<std::pair<std::string, at::Tensor>> buffers_;
};

}  // namespace tessera
