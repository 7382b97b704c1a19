#include "hf/hf_names.hpp"

#include <fmt/format.h>

namespace tessera {

namespace {

constexpr const char* kBackbone = "backbone.";
constexpr const char* kIndex = "{}";

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  if (const auto at = text.find(from); at != std::string::npos) text.replace(at, from.size(), to);
  return text;
}

void add(std::vector<HubTensor>& out, const std::string& prefix, const std::string& hub_name, const std::string& packed, const std::string& source,
         const std::vector<int64_t>& shape, bool is_buffer) {
  const std::string name = prefix + hub_name;
  if (name.find(kIndex) == std::string::npos) {
    out.push_back({.name = name, .shape = shape, .source = source, .is_buffer = is_buffer, .packed = packed.empty() ? "" : prefix + packed});
    return;
  }
  const std::vector<int64_t> one(shape.begin() + 1, shape.end());
  for (int64_t i = 0; i < shape.at(0); ++i)
    out.push_back({.name = replaced(name, kIndex, fmt::format("{}", i)), .shape = one, .source = source, .index = i, .is_buffer = is_buffer,
                   .packed = packed.empty() ? "" : prefix + packed});
}

void add_layer(std::vector<HubTensor>& out, const LayerPlan& layer, const std::string& prefix) {
  if (layer.weights_of != layer.index)
    throw Error(ExitCode::kUsage, fmt::format("{} uses the weights of layer {}: the hub layout has no shared layers", layer.prefix, layer.weights_of));
  for (const Param& p : layer.params) add(out, prefix, p.hf_name.empty() ? "mixer." + p.name : p.hf_name, p.hf_packed_name, layer.prefix + p.name, p.shape, false);
  for (const Buffer& b : layer.buffers) add(out, prefix, b.hf_name.empty() ? "mixer." + b.name : b.hf_name, "", layer.prefix + b.name, b.shape, true);
}

}  // namespace

std::vector<HubTensor> hub_tensors(const ModelPlan& plan) {
  constexpr int64_t kMostTensors = 1'000'000;
  if (const int64_t n = totals(plan).tensors; n > kMostTensors)
    throw Error(ExitCode::kUsage, fmt::format("the hub layout splits this model into {} tensors; at most {} are read and written", n, kMostTensors));
  std::vector<HubTensor> out;
  for (const ParamTable* table : {&plan.embedding, &plan.output})
    for (const Param& p : *table) add(out, p.hf_name.starts_with("lm_head.") ? "" : kBackbone, p.hf_name, "", p.name, p.shape, false);
  for (const LayerPlan& layer : plan.layers) add_layer(out, layer, fmt::format("{}layers.{}.", kBackbone, layer.index));
  if (!plan.head) return out;
  int64_t first = 0;
  for (const HeadSet& set : plan.head->sets) {
    const auto length = static_cast<int64_t>(set.layers.size());
    for (const Param& p : set.params) {
      const bool named = p.hf_name.starts_with("{first}.") || p.hf_name.starts_with("{last}.");
      if (!named) throw Error(ExitCode::kUsage, fmt::format("{}{} has no name in the hub layout", set.prefix, p.name));
      const std::string name = replaced(replaced(p.hf_name, "{first}", fmt::format("{}", first)), "{last}", fmt::format("{}", first + length - 1));
      add(out, "mtp.layers.", name, "", set.prefix + p.name, p.shape, false);
    }
    for (const LayerPlan& layer : set.layers) add_layer(out, layer, fmt::format("mtp.layers.{}.", first + layer.index));
    first += length;
  }
  return out;
}

std::vector<std::string> hub_spellings(const std::string& name) {
  std::vector<std::string> out{name};
  if (name.starts_with(kBackbone)) out.push_back("model." + name.substr(std::string_view(kBackbone).size()));
  return out;
}

}  // namespace tessera
