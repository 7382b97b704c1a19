#include "model/model.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>

#include <ATen/ops/logical_and.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/roll.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>

#include "layers/cross_entropy.hpp"
#include "layers/linear.hpp"
#include "layers/norm.hpp"
#include "layers/shift.hpp"

namespace tessera {

namespace {

// Adds scale * d(sum) to the backward pass without touching the activation: auxiliary losses ride on the layer's output, so that
// they reach the router in recomputation and on every pipeline stage alike.
struct AttachLoss : public torch::autograd::Function<AttachLoss> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& sum, double scale) {
    ctx->saved_data["scale"] = scale;
    return x.view_as(x);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    return {grads[0], at::full({}, ctx->saved_data["scale"].toDouble(), at::TensorOptions(at::kFloat).device(grads[0].device())), at::Tensor()};
  }
};

double share(double over) { return over > 0 ? 1 / over : 0; }

// What a plugin throws gets the block type, layer and phase in front.
template <class F>
auto guarded(const LayerPlan& plan, const char* phase, F run) {
  try {
    return run();
  } catch (const Error& error) {
    throw Error(error.code(), fmt::format("layer {} ({}), {}: {}", plan.prefix.substr(0, plan.prefix.size() - 1), plan.binding, phase, error.message()), error.help());
  } catch (const std::exception& error) {
    std::string what = error.what();
    throw Error(ExitCode::kPlugin, fmt::format("layer {} ({}), {}: {}", plan.prefix.substr(0, plan.prefix.size() - 1), plan.binding, phase, what.substr(0, what.find('\n'))));
  }
}

}  // namespace

Denominators& Denominators::operator+=(const Denominators& other) {
  auto add = [](std::vector<double>& into, const std::vector<double>& from) {
    into.resize(std::max(into.size(), from.size()));
    for (size_t i = 0; i < from.size(); ++i) into[i] += from[i];
  };
  add(targets, other.targets), add(tokens, other.tokens), add(documents, other.documents);
  return *this;
}

namespace {

struct PassInputs {
  at::Tensor targets_n, valid_n;
};

// What a prediction `offset` ahead, whose inner stack embeds ids `shift` ahead, may use.
PassInputs pass_inputs(const Batch& batch, int64_t shift, int64_t offset) {
  PassInputs in;
  in.targets_n = next_targets(batch.ids_n, batch.loss_mask_n.defined() ? at::logical_not(batch.loss_mask_n) : at::Tensor(), batch.spans, offset);
  if (batch.valid_n.defined()) {  // padding predicts nothing and is no target
    at::Tensor ahead = at::roll(batch.valid_n, {-offset}, {0});
    in.targets_n = at::where(at::logical_and(batch.valid_n, ahead), in.targets_n, at::scalar_tensor(-1, in.targets_n.options()));
  }
  in.valid_n = shift ? valid_after_shift(batch.valid_n, batch.spans, shift, batch.ids_n.device()) : batch.valid_n;
  return in;
}

}  // namespace

Denominators denominators(const ModelPlan& plan, const Batch& batch) {
  Denominators sums;
  auto add = [&](int64_t shift, int64_t offset) {
    PassInputs in = pass_inputs(batch, shift, offset);
    sums.targets.push_back(in.targets_n.ge(0).sum().item<double>());
    if (!in.valid_n.defined()) {
      sums.tokens.push_back(static_cast<double>(batch.spans.num_tokens()));
      sums.documents.push_back(static_cast<double>(batch.spans.size()));
      return;
    }
    at::Tensor valid = in.valid_n.to(at::kCPU).contiguous();
    const bool* data = valid.const_data_ptr<bool>();
    double tokens = 0, documents = 0;
    for (int64_t s = 0; s < batch.spans.size(); ++s) {
      const int64_t begin = batch.spans.rows()[static_cast<size_t>(s)], end = batch.spans.rows()[static_cast<size_t>(s) + 1];
      const auto n = std::count(data + begin, data + end, true);
      tokens += static_cast<double>(n);
      documents += n > 0;
    }
    sums.tokens.push_back(tokens);
    sums.documents.push_back(documents);
  };
  add(0, 1);
  if (plan.head)
    for (const HeadPass& pass : plan.head->passes) add(pass.shift, pass.offset);
  return sums;
}

DecodeState::DecodeState(const ModelPlan& plan, int64_t slots, at::Device device, at::ScalarType compute_dtype)
    : plan_(&plan), device_(device), compute_dtype_(compute_dtype), slots_(slots), layers_(plan.layers.size()) {
  for (const LayerPlan& layer : plan.layers)
    for (const State& state : layer.states) {
      if (state.per == State::Per::kToken) continue;
      std::vector<int64_t> shape{slots};
      shape.insert(shape.end(), state.shape.begin(), state.shape.end());
      layers_[static_cast<size_t>(layer.index)][state.name] = at::zeros(shape, at::TensorOptions(state.fp32 ? at::kFloat : compute_dtype).device(device));
    }
}

void DecodeState::reserve(int64_t capacity) {
  if (capacity <= capacity_) return;
  const int64_t grown = std::max(capacity, 2 * capacity_);
  for (const LayerPlan& layer : plan_->layers)
    for (const State& state : layer.states) {
      if (state.per != State::Per::kToken) continue;
      std::vector<int64_t> shape{slots_, grown};
      shape.insert(shape.end(), state.shape.begin(), state.shape.end());
      at::Tensor& rows = layers_[static_cast<size_t>(layer.index)][state.name];
      at::Tensor larger = at::zeros(shape, at::TensorOptions(state.fp32 ? at::kFloat : compute_dtype_).device(device_));
      if (rows.defined()) larger.narrow(1, 0, capacity_).copy_(rows);
      rows = larger;
    }
  capacity_ = grown;
}

DecodeState DecodeState::snapshot() const {
  DecodeState copy = *this;
  for (auto& layer : copy.layers_)
    for (auto& [name, tensor] : layer) tensor = tensor.clone();
  return copy;
}

int64_t DecodeState::bytes() const {
  int64_t total = 0;
  for (const auto& layer : layers_)
    for (const auto& [name, tensor] : layer) total += static_cast<int64_t>(tensor.nbytes());
  return total;
}

struct Model::Layer {
  const LayerPlan* plan;
  std::string weights;  // prefix of the unit whose weights it uses
  std::unique_ptr<Block> block;
  bool recompute;
};

// What one pass through a stack has in common.
struct Model::Pass {
  const Batch* batch;
  at::Tensor valid_n;
  double token_scale = 0, document_scale = 0;
  bool training = false;
  const DecodeState* state = nullptr;
};

namespace {

// One call of one layer, kept from its forward pass to its recomputation.
struct LayerCall : torch::CustomClassHolder {
  std::function<at::Tensor(const at::Tensor& x_nd, Decisions* decisions, bool replaying)> run;
  Decisions decisions;
};

struct RecomputeFunction : public torch::autograd::Function<RecomputeFunction> {
  // `anchor` always requires a gradient: without it the parameters' gradients would be lost where x needs none.
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x_nd, const at::Tensor& anchor, const c10::intrusive_ptr<LayerCall>& call) {
    ctx->save_for_backward({x_nd});
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    at::NoGradGuard no_grad;
    return call->run(x_nd, &call->decisions, false);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    auto call = c10::static_intrusive_pointer_cast<LayerCall>(ctx->saved_data["call"].toCapsule());
    at::Tensor x_nd = ctx->get_saved_variables()[0].detach();
    at::AutoGradMode grad_mode(true);
    x_nd.set_requires_grad(true);
    at::Tensor y_nd = call->run(x_nd, &call->decisions, true);
    torch::autograd::backward({y_nd}, {grads[0]});
    return {x_nd.grad(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

Model::Model(const ModelPlan& plan, Store& store, std::vector<std::string> recompute) : plan_(&plan), store_(&store) {
  auto recomputed = [&](const LayerPlan& layer) {
    return std::any_of(recompute.begin(), recompute.end(), [&](const std::string& name) { return name == "*" || name == layer.binding; });
  };
  auto build = [&](const std::vector<LayerPlan>& layers) {
    std::vector<std::unique_ptr<Layer>> out;
    for (const LayerPlan& layer : layers)
      out.push_back(std::make_unique<Layer>(Layer{&layer, layers[static_cast<size_t>(layer.weights_of)].prefix,
                                                  guarded(layer, "construction", [&] { return layer.type->make(layer.config, plan.env); }), recomputed(layer)}));
    return out;
  };
  layers_ = build(plan.layers);
  if (plan.head) {
    for (const HeadSet& set : plan.head->sets) head_layers_.push_back(build(set.layers));
    head_ = plan.head->type->make(plan.head->config, plan.env);
  }
}

Model::~Model() = default;

at::ScalarType Model::residual_dtype() const { return plan_->model.residual_in_fp32 ? at::kFloat : store_->compute_dtype(); }

at::Tensor Model::embed(const Weights& stem, const at::Tensor& ids_n) { return at::embedding(stem["embedding.weight"].tensor(), ids_n).to(residual_dtype()); }

const Weight& Model::lm_head(const Weights& stem) const {
  const Weight& own = stem.find("lm_head.weight");
  return own.defined() ? own : stem["embedding.weight"];
}

at::Tensor Model::run_layer(const Layer& layer, const at::Tensor& x_nd, const Pass& pass) {
  auto run = [this, &layer, pass](const at::Tensor& x, Decisions* decisions, bool replaying) {
    enter(layer.plan->binding, replaying ? StepClock::kRecompute : StepClock::kForward);
    return guarded(*layer.plan, replaying ? "recomputation" : "forward", [&] {
      const Weights weights = store_->gather(layer.weights);
      Context ctx(pass.batch->spans);
      ctx.set_mesh(plan_->env.mesh);
      ctx.set_training(pass.training);
      ctx.set_valid(pass.valid_n);
      ctx.set_decisions(decisions, replaying);
      if (pass.state) ctx.set_states(&pass.state->layer(layer.plan->index));
      const BlockInfo& info = layer.plan->type->info();
      const at::Tensor in = info.pre_norm ? rms_norm(x, weights["pre_norm.weight"].tensor(), plan_->env.norm_eps, store_->compute_dtype()) : x.to(store_->compute_dtype());
      at::Tensor y = layer.block->forward(in, weights, ctx);
      if (y.sizes() != in.sizes())
        throw Error(ExitCode::kPlugin, fmt::format("the output must have the input's shape [{}, {}], got {}", in.size(0), in.size(1), fmt::join(y.sizes(), " x ")));
      for (const LossTerm& term : ctx.losses()) {
        const double scale = term.per == Per::kToken ? pass.token_scale : pass.document_scale;
        if (at::GradMode::is_enabled()) y = AttachLoss::apply(y, term.sum, scale);
        if (!replaying) {
          at::Tensor value = term.sum.detach() * scale;
          auto [place, added] = aux_.emplace(term.name, value);
          if (!added) place->second = place->second + value;
        }
      }
      for (const auto& [name, counts] : ctx.counts()) {
        auto [place, added] = counts_[layer.weights].emplace(name, counts);
        if (!added) place->second = place->second + counts;
      }
      if (replaying) enter(layer.plan->binding, StepClock::kBackward);
      return info.residual ? at::add(x, y) : y.to(x.scalar_type());
    });
  };
  if (!at::GradMode::is_enabled()) return run(x_nd, nullptr, false);
  if (!layer.recompute) return mark(run(x_nd, nullptr, false), layer.plan->binding);
  auto call = c10::make_intrusive<LayerCall>();
  call->run = run;
  const at::Tensor anchor = at::empty({0}, x_nd.options().dtype(at::kFloat)).set_requires_grad(true);
  return mark(RecomputeFunction::apply(x_nd, anchor, call), layer.plan->binding);
}

at::Tensor Model::run_stack(const std::vector<std::unique_ptr<Layer>>& layers, at::Tensor x_nd, const Pass& pass, const Observer& observer) {
  if (observer) observer(-1, x_nd);
  for (const auto& layer : layers) {
    x_nd = run_layer(*layer, x_nd, pass);
    if (observer) observer(layer->plan->index, x_nd);
  }
  return x_nd;
}

at::Tensor Model::main_hidden(const Weights& stem, const Pass& pass, const Observer& observer) {
  enter("embedding");
  const at::Tensor x_nd = run_stack(layers_, mark(embed(stem, pass.batch->ids_n), "embedding"), pass, observer);
  enter("lm_head");
  return rms_norm(x_nd, stem["final_norm.weight"].tensor(), plan_->env.norm_eps, store_->compute_dtype());
}

// Runs the head's passes one after another; `use` gets the pass's number and what lm_head reads.
void Model::run_head(const Weights& stem, at::Tensor hidden_nd, const Batch& batch, const Denominators* over, bool training,
                     const std::function<void(size_t, const at::Tensor&)>& use) {
  const auto& passes = plan_->head->passes;
  for (size_t i = 0; i < passes.size(); ++i) {
    const auto set = static_cast<size_t>(passes[i].weight_set);
    const Weights own = store_->gather(plan_->head->sets[set].prefix);
    enter(plan_->head->name);
    Context ctx(batch.spans);
    ctx.set_mesh(plan_->env.mesh);
    ctx.set_training(training);
    const at::Tensor embedded = embed(stem, shift_ids(batch.ids_n, batch.spans, passes[i].shift, 0)).to(store_->compute_dtype());
    Pass pass{.batch = &batch, .valid_n = valid_after_shift(batch.valid_n, batch.spans, passes[i].shift, batch.ids_n.device()), .training = training};
    if (over) pass.token_scale = passes[i].aux_weight * share(over->tokens[i + 1]), pass.document_scale = passes[i].aux_weight * share(over->documents[i + 1]);
    at::Tensor x_nd = mark(head_->before(hidden_nd, embedded, own, ctx).to(residual_dtype()), plan_->head->name);
    x_nd = run_stack(head_layers_[set], x_nd, pass, {});
    enter(plan_->head->name);
    hidden_nd = mark(head_->after(x_nd, own, ctx).to(store_->compute_dtype()), plan_->head->name);
    enter("lm_head");
    use(i, hidden_nd);
  }
}

LossResult Model::loss(const Batch& batch, const Denominators& over, bool training) {
  aux_.clear();
  const Weights stem = store_->gather("");
  Pass pass{.batch = &batch, .valid_n = batch.valid_n, .token_scale = share(over.tokens[0]), .document_scale = share(over.documents[0]), .training = training};
  const at::Tensor hidden_nd = mark(main_hidden(stem, pass, {}), "lm_head");
  LossResult result;
  result.total = linear_cross_entropy(hidden_nd, lm_head_compute(stem), pass_inputs(batch, 0, 1).targets_n) * share(over.targets[0]);
  result.main = result.total.detach();
  if (plan_->head)
    run_head(stem, hidden_nd, batch, &over, training, [&](size_t i, const at::Tensor& head_nd) {
      const HeadPass& p = plan_->head->passes[i];
      const at::Tensor part = linear_cross_entropy(head_nd, lm_head_compute(stem), pass_inputs(batch, p.shift, p.offset).targets_n) * share(over.targets[i + 1]);
      result.parts[p.name] = part.detach();
      result.total = result.total + part * p.loss_weight;
    });
  result.value = result.total.detach();
  for (const auto& [name, value] : aux_) {
    result.parts[name] = value;
    result.value = result.value + value;
  }
  return result;
}

at::Tensor Model::hidden(const Batch& batch, DecodeState* state, const Observer& observer) {
  const Pass pass{.batch = &batch, .valid_n = batch.valid_n, .state = state};
  if (state) {
    int64_t needed = 0;
    for (const Span& span : batch.spans.list()) needed = std::max(needed, span.start + span.length);
    state->reserve(needed);
  }
  return main_hidden(store_->gather(""), pass, observer);
}

// A tied head reads the embedding, which is stored in fp32, in the compute dtype.
at::Tensor Model::lm_head_compute(const Weights& stem) const { return lm_head(stem).tensor().to(store_->compute_dtype()); }

at::Tensor Model::logits(const at::Tensor& hidden_nd) { return tessera::linear(hidden_nd, lm_head_compute(store_->gather(""))).to(at::kFloat); }

std::vector<at::Tensor> Model::head_logits(const Batch& batch, const at::Tensor& hidden_nd) {
  std::vector<at::Tensor> out;
  const Weights stem = store_->gather("");
  if (plan_->head) run_head(stem, hidden_nd, batch, nullptr, false, [&](size_t, const at::Tensor& h) { out.push_back(tessera::linear(h, lm_head_compute(stem)).to(at::kFloat)); });
  return out;
}

at::Tensor Model::token_losses(const Batch& batch) {
  at::NoGradGuard no_grad;
  const Weights stem = store_->gather("");
  const Pass pass{.batch = &batch, .valid_n = batch.valid_n};
  return cross_entropy_per_token(main_hidden(stem, pass, {}), lm_head_compute(stem), pass_inputs(batch, 0, 1).targets_n);
}

LayerCounts Model::take_counts() { return std::exchange(counts_, {}); }

void Model::after_step(const LayerCounts& counts) {
  at::NoGradGuard no_grad;
  auto update = [&](const std::vector<std::unique_ptr<Layer>>& layers) {
    for (const auto& layer : layers) {
      auto found = counts.find(layer->plan->prefix);
      if (found == counts.end() || !layer->plan->type->has_after_step()) continue;
      guarded(*layer->plan, "after_step", [&] {
        layer->plan->type->after_step(layer->plan->config, store_->buffers(layer->plan->prefix), found->second);
        return 0;
      });
    }
  };
  update(layers_);
  for (const auto& set : head_layers_) update(set);
}

std::string Model::first_nonfinite(const Batch& batch) {
  at::NoGradGuard no_grad;
  std::string place;
  auto look = [&](const std::string& where, const at::Tensor& x) {
    if (place.empty() && !at::isfinite(x).all().item<bool>()) place = where;
  };
  const at::Tensor hidden_nd = hidden(batch, nullptr, [&](int64_t layer, const at::Tensor& x_nd) {
    look(layer < 0 ? "embedding" : fmt::format("layers.{} ({})", layer, plan_->layers[static_cast<size_t>(layer)].binding), x_nd);
  });
  look("final_norm", hidden_nd);
  if (place.empty() && plan_->head)
    run_head(store_->gather(""), hidden_nd, batch, nullptr, false, [&](size_t i, const at::Tensor& h) { look("heads." + plan_->head->passes[i].name, h); });
  return place;
}

std::vector<double> Model::residual_norms(const Batch& batch) {
  at::NoGradGuard no_grad;
  std::vector<at::Tensor> squares;
  hidden(batch, nullptr, [&](int64_t, const at::Tensor& x_nd) { squares.push_back(x_nd.to(at::kFloat).square().mean().to(at::kDouble)); });
  std::vector<double> norms;
  for (const at::Tensor& square : squares) norms.push_back(std::sqrt(square.item<double>()));
  return norms;
}

}  // namespace tessera
