// Destructors and look-ups of the contract's polymorphic types: out of line, so that every shared object sees one type_info and one vtable.
#include "tessera/block.hpp"

#include <ATen/ops/add.h>
#include <fmt/format.h>

#include "tessera/plugin.hpp"

namespace tessera {

Block::~Block() = default;
Head::~Head() = default;
ElementType::~ElementType() = default;
BlockType::~BlockType() = default;
HeadType::~HeadType() = default;
Context::~Context() = default;

const char* core_build_key() { return TESSERA_BUILD_KEY; }

void Weights::add(at::Tensor tensor, const Param* row) { list_.emplace_back(std::move(tensor), row); }
void Weights::add_buffer(std::string name, at::Tensor tensor) { buffers_.emplace_back(std::move(name), std::move(tensor)); }

const Weight& Weights::find(std::string_view name) const {
  static const Weight none;
  for (const Weight& weight : list_)
    if (weight.row().name == name) return weight;
  return none;
}

const Weight& Weights::operator[](std::string_view name) const {
  const Weight& weight = find(name);
  if (!weight.defined()) {
    std::string names;
    for (const Weight& w : list_) names += (names.empty() ? "" : ", ") + w.row().name;
    throw Error(ExitCode::kPlugin, fmt::format("forward asks for the parameter '{}', which its table does not declare", name), "declared: " + names);
  }
  return weight;
}

const at::Tensor& Weights::buffer(std::string_view name) const {
  std::string names;
  for (const auto& [key, tensor] : buffers_) {
    if (key == name) return tensor;
    names += (names.empty() ? "" : ", ") + key;
  }
  throw Error(ExitCode::kPlugin, fmt::format("forward asks for the buffer '{}', which its table does not declare", name), "declared: " + names);
}

const at::Tensor& Context::state(std::string_view name) const {
  if (states_) {
    auto found = states_->find(name);
    if (found != states_->end()) return found->second;
  }
  throw Error(ExitCode::kPlugin, fmt::format("forward asks for the decode state '{}', which its table does not declare", name));
}

at::Tensor Context::once(std::string_view name, const std::function<at::Tensor()>& decide) {
  if (decisions_) {
    auto found = decisions_->find(name);
    if (found != decisions_->end()) return found->second;
    if (replaying_) throw Error(ExitCode::kPlugin, fmt::format("recomputation asks for the decision '{}', which the first pass did not take", name));
  }
  at::Tensor result = decide().detach();
  if (decisions_) decisions_->emplace(name, result);
  return result;
}

void Context::add_loss(std::string name, at::Tensor sum, Per per) {
  if (training_) losses_.push_back({std::move(name), std::move(sum), per});
}

void Context::count(std::string_view name, const at::Tensor& counts) {
  if (!training_ || replaying_) return;
  auto [place, added] = counts_.emplace(name, counts.detach());
  if (!added) place->second = at::add(place->second, counts.detach());
}

void Context::observe(std::string_view name, const std::function<at::Tensor()>& compute) {
  if (observing_) observed_.insert_or_assign(std::string(name), compute().detach());
}

}  // namespace tessera
