// The stack: embedding, layers, final norm, predictions; forward for training, evaluation, prefill and decoding. Over several ranks it is this
// rank's part: the layers of its pipeline stages, on its tokens of each micro-batch.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "data/batch.hpp"
#include "model/decode_state.hpp"
#include "model/denominators.hpp"
#include "model/step_clock.hpp"
#include "model/token_layout.hpp"
#include "plan/plan.hpp"
#include "store/store.hpp"
#include "tessera/spans.hpp"

namespace tessera {

// Sums over ranks give the batch's.
struct LossResult {
  at::Tensor total;                       // fp32 [], differentiable: its backward pass gives all gradients, those of auxiliary losses included
  at::Tensor value;                       // fp32 [], no gradient: this batch's share of the total loss, auxiliary losses included
  at::Tensor main;                        // fp32 [], no gradient: this batch's share of the main next-token mean
  std::map<std::string, at::Tensor> parts;  // "mtp.1", "seq_aux", "z", ...: shares of their means as they enter the total, no gradient
};

// Statistics that blocks counted (Context::count), by layer prefix and name; summed over micro-batches until taken.
using LayerCounts = std::map<std::string, Counts>;
// What blocks offered of their latest pass (Context::observe), by the prefix of the layer itself, also where it shares weights, and name.
using LayerObserved = std::map<std::string, std::map<std::string, at::Tensor, std::less<>>>;

// Of tokens, without gradients.
struct TokenScores {
  at::Tensor losses_n;  // fp32 [N]: cross-entropy of what is to be predicted, 0 where nothing is
  at::Tensor hits_n;    // bool [N]: it has the greatest logit, no other word as great; undefined where not asked for
};

// One micro-batch on its way through this rank's stages.
struct MicroBatch {
  const Batch* batch;              // whole, also where this rank works on a part of its tokens; outlives the backward pass
  TokenLayout tokens;
  Denominators over;               // over the global batch
  bool training = false;
  const DecodeState* state = nullptr;
  at::Tensor token_n = {};         // int64 [N], in training: the tokens' numbers in training's order; else only where routing is balanced: numbers that fill a range
  std::map<std::string, at::Tensor> aux = {};  // values of auxiliary losses, shares of the total
};
using MicroBatchPtr = std::shared_ptr<MicroBatch>;

// Called after the embedding (layer -1) and after every layer of the main stack with the residual stream [N, D] of the whole micro-batch.
using Observer = std::function<void(int64_t layer, const at::Tensor& x_nd)>;

class Model {
 public:
  // `recompute` holds the bindings whose layers are recomputed in the backward pass; {"*"} means all. `seed` is that of what blocks draw in training.
  Model(const ModelPlan& plan, Store& store, std::vector<std::string> recompute = {}, int64_t seed = 0);
  ~Model();

  // The parts of `loss`, for pipelines. Between them goes the residual stream of this rank's tokens [n, D], in residual_dtype.
  MicroBatchPtr micro_batch(const Batch& batch, const Denominators& over, bool training) const;
  at::Tensor embed(const MicroBatchPtr& micro);
  at::Tensor run_stage(const MicroBatchPtr& micro, int64_t stage, at::Tensor x_nd, const Observer& observer = {});
  LossResult predict(const MicroBatchPtr& micro, const at::Tensor& x_nd);
  // What a stage that predicts nothing reports: its auxiliary losses.
  static LossResult report(const MicroBatch& micro);
  at::ScalarType residual_dtype() const;

  // Training (grad mode on): the loss whose backward pass fills the store's gradients; `batch` must outlive that pass, which recomputes from it.
  // Evaluation: the same sums without statistics.
  LossResult loss(const Batch& batch, const Denominators& over, bool training);

  // Hidden states after the final norm [N, D], compute dtype. With `state`, spans continue from it and it is advanced.
  at::Tensor hidden(const Batch& batch, DecodeState* state = nullptr, const Observer& observer = {});
  // Main logits [N, V] fp32 of hidden states.
  at::Tensor logits(const at::Tensor& hidden_nd);
  // Logits of the head's passes for whole documents, fp32 [N, V] each. Grad mode as the caller's.
  std::vector<at::Tensor> head_logits(const Batch& batch, const at::Tensor& hidden_nd);
  // TokenScores::losses_n.
  at::Tensor token_losses(const Batch& batch);

  // From what the last stage gives: scores of this rank's pieces, hidden states of the whole micro-batch.
  TokenScores token_scores(const MicroBatchPtr& micro, const at::Tensor& x_nd, bool hits);
  at::Tensor hidden(const MicroBatchPtr& micro, const at::Tensor& x_nd);

  // What was counted since the last call.
  LayerCounts take_counts();
  // Runs every block's after_step with counts over the global batch.
  void after_step(const LayerCounts& counts);

  // Training steps tell `clock` what they do; null: nobody. Parts: binding names, "embedding", "lm_head" (with the final norm and the loss),
  // the head's type.
  void set_clock(StepClock* clock) { clock_ = clock; }
  StepClock* clock() const { return clock_; }

  // Where `on`, blocks tell what they offer of a pass; in a single process.
  void set_observing(bool on) { observing_ = on; }
  // What they told since the last call.
  LayerObserved take_observed();

  // For measurements: experts are chosen evenly, see Context::balanced_routing.
  void set_balanced_routing(bool on) { balanced_routing_ = on; }

  const ModelPlan& plan() const { return *plan_; }
  Store& store() { return *store_; }

 private:
  struct Layer;
  struct Pass;
  const Group* tensor_group() const { return store_->ranks() ? store_->ranks()->tensor() : nullptr; }
  void enter(const std::string& part, StepClock::Phase phase = StepClock::kForward, const std::string& label = "") {
    if (clock_) clock_->enter(part, phase, label);
  }
  at::Tensor mark(const at::Tensor& x, const std::string& part, const std::string& label = "") { return clock_ ? clock_->mark(x, part, label) : x; }
  at::Tensor embed_ids(const MicroBatch& micro, const at::Tensor& ids_n);
  at::Tensor lm_head(const Weights& output);
  at::Tensor final_norm(const Weights& output, const at::Tensor& x_nd) const;
  at::Tensor run_layer(const Layer& layer, const at::Tensor& x_nd, const MicroBatchPtr& micro, const Pass& pass);
  at::Tensor run_block(const Layer& layer, const at::Tensor& x_nd, MicroBatch& micro, const Pass& pass, Decisions* decisions, bool replaying);
  void run_head(const MicroBatchPtr& micro, at::Tensor hidden_nd, const std::function<void(size_t, const at::Tensor&)>& use);

  const ModelPlan* plan_;
  Store* store_;
  int64_t seed_;
  StepClock* clock_ = nullptr;
  bool observing_ = false, balanced_routing_ = false;
  std::vector<std::unique_ptr<Layer>> layers_;
  std::vector<std::vector<std::unique_ptr<Layer>>> head_layers_;  // by weight set
  std::unique_ptr<Head> head_;
  LayerCounts counts_;
  LayerObserved observed_;
};

}  // namespace tessera
