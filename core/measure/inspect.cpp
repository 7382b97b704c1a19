#include "measure/inspect.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>

#include <cmath>

namespace tessera {

std::vector<TensorStatistics> tensor_statistics(const SafetensorsFolder& file) {
  std::vector<TensorStatistics> out;
  for (const std::string& name : file.names()) {
    const at::Tensor stored = file.tensor(name);
    TensorStatistics s{.name = name, .dtype = safetensors_dtype(stored.scalar_type()), .shape = stored.sizes().vec()};
    const at::Tensor all = stored.to(at::kDouble).flatten(), finite = all.masked_select(at::isfinite(all));
    s.not_finite = all.numel() - finite.numel();
    if (finite.numel() > 0) {
      s.mean = finite.mean().item<double>();
      s.rms = std::sqrt(finite.square().mean().item<double>());
      s.least = finite.min().item<double>(), s.greatest = finite.max().item<double>();
      s.zeros = finite.eq(0).sum().item<double>() / static_cast<double>(all.numel());
    }
    out.push_back(std::move(s));
  }
  return out;
}

std::vector<LayerStatistics> layer_statistics(Model& model, const std::vector<int64_t>& ids) {
  const at::NoGradGuard no_grad;
  const ModelPlan& plan = model.plan();
  const auto n = static_cast<int64_t>(ids.size());
  const Batch batch{.ids_n = at::tensor(ids, at::kLong).to(model.store().device()), .spans = Spans::documents({n})};
  std::vector<LayerStatistics> out(plan.layers.size());
  const auto rms = [](const at::Tensor& x) { return x.numel() ? std::sqrt(x.to(at::kDouble).square().mean().item<double>()) : 0.0; };

  const auto on_host = [](const at::Tensor& x) {
    const at::Tensor host = x.to(at::kCPU, at::kDouble).flatten().contiguous();
    return std::vector<double>(host.const_data_ptr<double>(), host.const_data_ptr<double>() + host.numel());
  };

  model.set_observing(true);
  DecodeState state(plan, 1, model.store().device(), model.store().compute_dtype());
  model.hidden(batch, &state, [&](int64_t layer, const at::Tensor& x_nd) {
    if (layer >= 0) out[static_cast<size_t>(layer)].residual_rms = rms(x_nd);
  });
  model.set_observing(false);
  const LayerObserved observed = model.take_observed();
  model.take_counts();
  model.loss(batch, denominators(plan, batch), /*training=*/true);  // in which layers count
  const LayerCounts counts = model.take_counts();
  for (const LayerPlan& layer : plan.layers) {
    LayerStatistics& s = out[static_cast<size_t>(layer.index)];
    s.layer = fmt::format("{} ({})", layer.prefix.substr(0, layer.prefix.size() - 1), layer.binding);
    for (const State& row : layer.states) {
      const at::Tensor held = state.layer(layer.index).at(row.name);
      s.state_rms[row.name] = rms(row.per == State::Per::kToken ? held.select(0, 0).narrow(0, 0, n) : held.select(0, 0));
    }
    if (const auto told = observed.find(layer.prefix); told != observed.end())
      for (const auto& [name, values] : told->second) s.observed[name] = on_host(values);
    const auto counted = counts.find(plan.layers[static_cast<size_t>(layer.weights_of)].prefix);
    if (counted == counts.end()) continue;
    for (const auto& [name, count] : counted->second) s.counts[name] = on_host(count);
  }
  return out;
}

}  // namespace tessera
