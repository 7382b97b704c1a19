#include "model/model.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>

#include "layers/collectives.hpp"
#include "layers/cross_entropy.hpp"
#include "layers/embedding.hpp"
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

// "layers.3 (mamba2)".
std::string layer_label(const LayerPlan& plan) { return fmt::format("{} ({})", plan.prefix.substr(0, plan.prefix.size() - 1), plan.binding); }

// What a plugin throws gets the block type, layer and phase in front.
template <class F>
auto guarded(const LayerPlan& plan, const char* phase, F run) {
  try {
    return run();
  } catch (const Error& error) {
    if (error.code() == ExitCode::kCollective) throw;  // says where
    throw Error(error.code(), fmt::format("layer {}, {}: {}", layer_label(plan), phase, error.message()), error.help());
  } catch (const std::exception& error) {
    std::string what = error.what();
    throw Error(ExitCode::kPlugin, fmt::format("layer {}, {}: {}", layer_label(plan), phase, what.substr(0, what.find('\n'))));
  }
}

}  // namespace

struct Model::Layer {
  const LayerPlan* plan;
  std::string weights;         // the unit whose weights it uses
  std::unique_ptr<Block> block;
  bool recompute;
  std::string next, previous;  // the units that forward and backward passes need after this one
};

// One run of a stack over a micro-batch: of the main one, or of the head's.
struct Model::Pass {
  int64_t number = 0;              // 0: the main stack's
  double token = 0, document = 0;  // what the sums of auxiliary losses are multiplied with
  at::Tensor valid_n;  // of the whole micro-batch
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

Model::Model(const ModelPlan& plan, Store& store, std::vector<std::string> recompute, int64_t seed) : plan_(&plan), store_(&store), seed_(seed) {
  auto recomputed = [&](const LayerPlan& layer) {
    return std::any_of(recompute.begin(), recompute.end(), [&](const std::string& name) { return name == "*" || name == layer.binding; });
  };
  auto build = [&](const std::vector<LayerPlan>& layers) {
    std::vector<std::unique_ptr<Layer>> out;
    const auto unit = [&](size_t i) { return layers[static_cast<size_t>(layers[i].weights_of)].prefix; };
    for (size_t i = 0; i < layers.size(); ++i) {
      const LayerPlan& layer = layers[i];
      if (!store.holds(unit(i))) {
        out.push_back(nullptr);  // of another pipeline stage
        continue;
      }
      out.push_back(std::make_unique<Layer>(Layer{&layer, unit(i), guarded(layer, "construction", [&] { return layer.type->make(layer.config, plan.env); }), recomputed(layer),
                                                  i + 1 < layers.size() ? unit(i + 1) : "", i > 0 ? unit(i - 1) : ""}));
    }
    return out;
  };
  layers_ = build(plan.layers);
  if (plan.head && store.holds(kOutputUnit)) {
    for (const HeadSet& set : plan.head->sets) head_layers_.push_back(build(set.layers));
    head_ = plan.head->type->make(plan.head->config, plan.env);
  }
}

Model::~Model() = default;

at::ScalarType Model::residual_dtype() const { return plan_->model.residual_in_fp32 ? at::kFloat : store_->compute_dtype(); }

MicroBatchPtr Model::micro_batch(const Batch& batch, const Denominators& over, bool training) const {
  const MicroBatchPtr micro = std::make_shared<MicroBatch>(MicroBatch{.batch = &batch, .tokens = TokenLayout(batch.spans, store_->ranks()), .over = over, .training = training});
  if (training) micro->token_n = at::arange(batch.first_token, batch.first_token + batch.spans.num_tokens(), batch.ids_n.options());
  else if (balanced_routing_) micro->token_n = batch.spans.positions_n(batch.ids_n.device()) * batch.spans.size() + batch.spans.span_index_n(batch.ids_n.device());
  return micro;
}

// Every tensor rank finds the ids of its part of the vocabulary; the sum is in the table's fp32, of one value and zeros.
at::Tensor Model::embed_ids(const MicroBatch& micro, const at::Tensor& ids_n) {
  if (store_->ranks()) store_->ranks()->whereabouts().place = "the embedding";
  std::vector<LeasePtr> leases;
  const Weights weights = store_->gather(kEmbeddingUnit, &leases);
  const at::Tensor x_nd = micro.tokens.sum_shard(embedding(micro.tokens.pieces_of(ids_n), weights["embedding.weight"].tensor(), tensor_group()));
  store_->give_back(leases);
  return x_nd.to(residual_dtype());
}

at::Tensor Model::embed(const MicroBatchPtr& micro) {
  enter("embedding");
  return mark(embed_ids(*micro, micro->batch->ids_n), "embedding");
}

// A tied head reads the embedding, which is stored in fp32, in the compute dtype.
at::Tensor Model::lm_head(const Weights& output) {
  const Weight& own = output.find("lm_head.weight");
  return (own.defined() ? own.tensor() : store_->gather(kEmbeddingUnit)["embedding.weight"].tensor()).to(store_->compute_dtype());
}

at::Tensor Model::final_norm(const Weights& output, const at::Tensor& x_nd) const {
  return rms_norm(x_nd, output["final_norm.weight"].tensor(), plan_->env.norm_eps, store_->compute_dtype());
}

// One call of a layer's block on this rank's tokens: gathers and reductions at its edges as its info says.
at::Tensor Model::run_block(const Layer& layer, const at::Tensor& x, MicroBatch& micro, const Pass& pass, Decisions* decisions, bool replaying) {
  const MeshGroups* ranks = store_->ranks();
  const BlockInfo& info = layer.plan->type->info();
  const TokenLayout& tokens = micro.tokens;
  const std::string where = ranks ? layer_label(*layer.plan) : "";
  if (ranks) ranks->whereabouts().place = where + (replaying ? ", recomputation" : ", forward");
  std::vector<LeasePtr> leases;
  const Weights weights = store_->gather(layer.weights, &leases);
  if (ranks) store_->prefetch(replaying ? layer.previous : layer.next);

  // A block that takes no pieces gets all tokens, on every context rank, and this rank keeps its part of the result.
  const bool whole = tokens.cut() && !info.takes_pieces, shards = info.input == Layout::kSequenceShard;
  const int64_t tp = plan_->env.mesh.tp, tensor_rank = ranks ? ranks->place().tp : 0;
  const Range whole_shard = whole && shards ? sequence_range(tokens.whole().num_tokens(), tp, tensor_rank) : Range{};
  const Spans whole_shard_spans = whole && shards ? spans_between(tokens.whole(), whole_shard.begin, whole_shard.end) : Spans();
  at::Tensor in = info.pre_norm ? rms_norm(x, weights["pre_norm.weight"].tensor(), plan_->env.norm_eps, store_->compute_dtype()) : x.to(store_->compute_dtype());
  if (whole) in = tokens.gather_whole(in);
  if (whole && shards) in = in.narrow(0, whole_shard.begin, whole_shard.end - whole_shard.begin);
  if (!whole && !shards) in = tokens.gather_pieces(in);

  Context ctx(whole ? shards ? whole_shard_spans : tokens.whole() : shards ? tokens.shard() : tokens.pieces());
  ctx.set_mesh(plan_->env.mesh);
  ctx.set_groups(ranks);
  if (!whole) ctx.set_cut(tokens.cut());
  ctx.set_sequence_tokens(whole ? tokens.whole().num_tokens() : tokens.pieces().num_tokens());
  ctx.set_training(micro.training);
  const auto own_rows = [&](const at::Tensor& whole_n) {
    if (!whole_n.defined() || (whole && !shards)) return whole_n;
    return whole ? whole_n.narrow(0, whole_shard.begin, whole_shard.end - whole_shard.begin) : shards ? tokens.shard_of(whole_n) : tokens.pieces_of(whole_n);
  };
  ctx.set_valid(own_rows(pass.valid_n));
  if (micro.training) ctx.set_draws({.seed = seed_, .layer = fmt::format("{}{}", layer.weights, pass.number), .token_n = own_rows(micro.token_n)});
  if (balanced_routing_) ctx.set_balanced_routing(own_rows(micro.token_n));
  ctx.set_observing(observing_);
  ctx.set_decisions(decisions, replaying);
  if (micro.state) ctx.set_states(&micro.state->layer(layer.plan->index));
  at::Tensor y = layer.block->forward(in, weights, ctx);
  if (y.sizes() != in.sizes())
    throw Error(ExitCode::kPlugin, fmt::format("the output must have the input's shape [{}, {}], got {}", in.size(0), in.size(1), fmt::join(y.sizes(), " x ")));

  // What several ranks computed alike counts on the first of them.
  const bool counts = !ranks || ((shards || ranks->place().tp == 0) && (!whole || ranks->place().cp == 0));
  for (const LossTerm& term : ctx.losses()) {
    const double factor = counts ? term.per == Per::kToken ? pass.token : pass.document : 0;
    if (at::GradMode::is_enabled()) y = AttachLoss::apply(y, term.sum, factor);
    if (replaying) continue;
    const at::Tensor value = term.sum.detach() * factor;
    auto [place, added] = micro.aux.emplace(term.name, value);
    if (!added) place->second = place->second + value;
  }
  for (const auto& [name, values] : ctx.counts()) {
    const at::Tensor here = counts ? values : at::zeros_like(values);
    auto [place, added] = counts_[layer.weights].emplace(name, here);
    if (!added) place->second = place->second + here;
  }
  for (const auto& [name, values] : ctx.observed()) observed_[layer.plan->prefix].insert_or_assign(name, values);

  if (whole && info.output == Layout::kSequenceShard) y = tokens.gather_whole_shards(y);
  if (whole) y = tokens.keep_pieces(y);
  if (info.output == Layout::kPartialSum) y = tokens.sum_shard(y);
  else if (whole || info.output == Layout::kFull) y = tokens.keep_shard(y);
  const at::Tensor out = info.residual ? at::add(x, y) : y.to(x.scalar_type());
  return ranks && at::GradMode::is_enabled() && !replaying ? store_->release(out, std::move(leases), where) : out;
}

at::Tensor Model::run_layer(const Layer& layer, const at::Tensor& x_nd, const MicroBatchPtr& micro, const Pass& pass) {
  const std::string label = layer_label(*layer.plan);
  auto run = [this, &layer, micro, pass, label](const at::Tensor& x, Decisions* decisions, bool replaying) {
    enter(layer.plan->binding, replaying ? StepClock::kRecompute : StepClock::kForward, label);
    const at::Tensor y = guarded(*layer.plan, replaying ? "recomputation" : "forward", [&] { return run_block(layer, x, *micro, pass, decisions, replaying); });
    if (replaying) enter(layer.plan->binding, StepClock::kBackward, label);
    return y;
  };
  if (!at::GradMode::is_enabled()) return run(x_nd, nullptr, false);
  if (!layer.recompute) return mark(run(x_nd, nullptr, false), layer.plan->binding, label);
  auto call = c10::make_intrusive<LayerCall>();
  call->run = run;
  const at::Tensor anchor = at::empty({0}, x_nd.options().dtype(at::kFloat)).set_requires_grad(true);
  return mark(RecomputeFunction::apply(x_nd, anchor, call), layer.plan->binding, label);
}

at::Tensor Model::run_stage(const MicroBatchPtr& micro, int64_t stage, at::Tensor x_nd, const Observer& observer) {
  const Denominators& over = micro->over;
  Pass pass{.valid_n = micro->batch->valid_n};
  if (!over.tokens.empty()) pass.token = share(over.tokens[0]), pass.document = share(over.documents[0]);
  for (const auto& layer : layers_) {
    if (!layer || layer->plan->stage != stage) continue;
    x_nd = run_layer(*layer, x_nd, micro, pass);
    if (observer) observer(layer->plan->index, micro->tokens.gather_whole(x_nd));
  }
  return x_nd;
}

// Runs the head's passes one after another; `use` gets the pass's number and what lm_head reads, of this rank's tokens.
void Model::run_head(const MicroBatchPtr& micro, at::Tensor hidden_nd, const std::function<void(size_t, const at::Tensor&)>& use) {
  const Batch& batch = *micro->batch;
  const auto& passes = plan_->head->passes;
  for (size_t i = 0; i < passes.size(); ++i) {
    const auto set = static_cast<size_t>(passes[i].weight_set);
    const Weights own = store_->gather(plan_->head->sets[set].prefix);
    enter(plan_->head->name);
    Context ctx(micro->tokens.shard());
    ctx.set_mesh(plan_->env.mesh);
    ctx.set_groups(store_->ranks());
    ctx.set_cut(micro->tokens.cut());
    ctx.set_sequence_tokens(micro->tokens.pieces().num_tokens());
    ctx.set_training(micro->training);
    if (micro->training) ctx.set_draws({.seed = seed_, .layer = fmt::format("{}{}", plan_->head->sets[set].prefix, i + 1), .token_n = micro->tokens.shard_of(micro->token_n)});
    const at::Tensor embedded = embed_ids(*micro, shift_ids(batch.ids_n, batch.spans, passes[i].shift, 0)).to(store_->compute_dtype());
    Pass pass{.number = static_cast<int64_t>(i) + 1, .valid_n = valid_after_shift(batch.valid_n, batch.spans, passes[i].shift, batch.ids_n.device())};
    if (const Denominators& over = micro->over; !over.tokens.empty())
      pass.token = passes[i].aux_weight * share(over.tokens[i + 1]), pass.document = passes[i].aux_weight * share(over.documents[i + 1]);
    at::Tensor x_nd = mark(head_->before(hidden_nd, embedded, own, ctx).to(residual_dtype()), plan_->head->name);
    for (const auto& layer : head_layers_[set]) x_nd = run_layer(*layer, x_nd, micro, pass);
    enter(plan_->head->name);
    hidden_nd = mark(head_->after(x_nd, own, ctx).to(store_->compute_dtype()), plan_->head->name);
    enter("lm_head");
    use(i, hidden_nd);
  }
}

LossResult Model::report(const MicroBatch& micro) {
  LossResult result;
  for (const auto& [name, value] : micro.aux) {
    result.parts[name] = value;
    result.value = result.value.defined() ? result.value + value : value;
  }
  return result;
}

LossResult Model::predict(const MicroBatchPtr& micro, const at::Tensor& x_nd) {
  enter("lm_head");
  if (store_->ranks()) store_->ranks()->whereabouts().place = "the output";
  const Weights output = store_->gather(kOutputUnit);
  const at::Tensor hidden_nd = mark(final_norm(output, x_nd), "lm_head"), lm_head_vd = lm_head(output);
  const auto loss_of = [&](const at::Tensor& h_nd, int64_t shift, int64_t offset, double over) {
    const at::Tensor targets_n = micro->tokens.pieces_of(pass_inputs(*micro->batch, shift, offset).targets_n);
    return linear_cross_entropy(micro->tokens.gather_pieces(h_nd), lm_head_vd, targets_n, tensor_group()) * share(over);
  };
  LossResult result;
  result.total = loss_of(hidden_nd, 0, 1, micro->over.targets[0]);
  result.main = result.total.detach();
  if (plan_->head)
    run_head(micro, hidden_nd, [&](size_t i, const at::Tensor& head_nd) {
      const HeadPass& p = plan_->head->passes[i];
      const at::Tensor part = loss_of(head_nd, p.shift, p.offset, micro->over.targets[i + 1]);
      result.parts[p.name] = part.detach();
      result.total = result.total + part * p.loss_weight;
    });
  result.value = result.total.detach();
  for (const auto& [name, value] : micro->aux) {
    result.parts[name] = value;
    result.value = result.value + value;
  }
  return result;
}

LossResult Model::loss(const Batch& batch, const Denominators& over, bool training) {
  const MicroBatchPtr micro = micro_batch(batch, over, training);
  at::Tensor x_nd = embed(micro);
  for (int64_t stage = 0; stage < plan_->num_stages; ++stage) x_nd = run_stage(micro, stage, x_nd);
  return predict(micro, x_nd);
}

at::Tensor Model::hidden(const MicroBatchPtr& micro, const at::Tensor& x_nd) {
  enter("lm_head");
  return micro->tokens.gather_whole(final_norm(store_->gather(kOutputUnit), x_nd));
}

at::Tensor Model::hidden(const Batch& batch, DecodeState* state, const Observer& observer) {
  const MicroBatchPtr micro = micro_batch(batch, {}, false);
  micro->state = state;
  if (state) state->reserve(batch.spans);
  at::Tensor x_nd = embed(micro);
  if (observer) observer(-1, micro->tokens.gather_whole(x_nd));
  for (int64_t stage = 0; stage < plan_->num_stages; ++stage) x_nd = run_stage(micro, stage, x_nd, observer);
  return hidden(micro, x_nd);
}

at::Tensor Model::logits(const at::Tensor& hidden_nd) {
  const at::Tensor part_nv = tessera::linear(hidden_nd, lm_head(store_->gather(kOutputUnit))).to(at::kFloat);
  const Group* tensor = tensor_group();
  if (!tensor) return part_nv;
  return gather_rows(part_nv.t().contiguous(), std::vector<int64_t>(static_cast<size_t>(tensor->size()), part_nv.size(1)), tensor).t();
}

std::vector<at::Tensor> Model::head_logits(const Batch& batch, const at::Tensor& hidden_nd) {
  std::vector<at::Tensor> out;
  const MicroBatchPtr micro = micro_batch(batch, {}, false);
  if (plan_->head) run_head(micro, micro->tokens.shard_of(hidden_nd), [&](size_t, const at::Tensor& h_nd) { out.push_back(logits(micro->tokens.gather_whole(h_nd))); });
  return out;
}

TokenScores Model::token_scores(const MicroBatchPtr& micro, const at::Tensor& x_nd, bool hits) {
  const Weights output = store_->gather(kOutputUnit);
  const at::Tensor targets_n = micro->tokens.pieces_of(pass_inputs(*micro->batch, 0, 1).targets_n);
  const at::Tensor hidden_nd = micro->tokens.gather_pieces(final_norm(output, x_nd)), lm_head_vd = lm_head(output);
  TokenScores scores{.losses_n = cross_entropy_per_token(hidden_nd, lm_head_vd, targets_n, tensor_group())};
  if (hits) scores.hits_n = top_word_is(hidden_nd, lm_head_vd, targets_n, tensor_group());
  return scores;
}

at::Tensor Model::token_losses(const Batch& batch) {
  at::NoGradGuard no_grad;
  const MicroBatchPtr micro = micro_batch(batch, {}, false);
  at::Tensor x_nd = embed(micro);
  for (int64_t stage = 0; stage < plan_->num_stages; ++stage) x_nd = run_stage(micro, stage, x_nd);
  return token_scores(micro, x_nd, /*hits=*/false).losses_n;
}

LayerCounts Model::take_counts() { return std::exchange(counts_, {}); }

LayerObserved Model::take_observed() { return std::exchange(observed_, {}); }

void Model::after_step(const LayerCounts& counts) {
  at::NoGradGuard no_grad;
  auto update = [&](const std::vector<std::unique_ptr<Layer>>& layers) {
    for (const auto& layer : layers) {
      if (!layer) continue;
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

}  // namespace tessera
