// The stack: embedding, layers, final norm, predictions; forward for training, evaluation, prefill and decoding.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "data/batch.hpp"
#include "model/step_clock.hpp"
#include "plan/plan.hpp"
#include "store/store.hpp"
#include "tessera/spans.hpp"

namespace tessera {

// What sums are divided by, over the global batch. Index 0 is the main prediction, i > 0 the head's pass i - 1.
struct Denominators {
  std::vector<double> targets, tokens, documents;
  Denominators& operator+=(const Denominators& other);
};
Denominators denominators(const ModelPlan& plan, const Batch& batch);

struct LossResult {
  at::Tensor total;                       // fp32 [], differentiable: its backward pass gives all gradients, those of auxiliary losses included
  at::Tensor value;                       // fp32 [], no gradient: this batch's share of the total loss, auxiliary losses included
  at::Tensor main;                        // fp32 [], no gradient: this batch's share of the main next-token mean
  std::map<std::string, at::Tensor> parts;  // "mtp.1", "seq_aux", "z", ...: shares of their means as they enter the total, no gradient
};

// Statistics that blocks counted (Context::count), by layer prefix and name; summed over micro-batches until taken.
using LayerCounts = std::map<std::string, Counts>;

// Decode state of all layers of the main stack for `slots` sequences.
class DecodeState {
 public:
  DecodeState(const ModelPlan& plan, int64_t slots, at::Device device, at::ScalarType compute_dtype);
  // Makes room for `capacity` tokens a sequence (per-token rows grow by doubling; per-sequence rows do not change).
  void reserve(int64_t capacity);
  // A copy that later steps do not change, and the way back to it.
  DecodeState snapshot() const;
  const std::map<std::string, at::Tensor, std::less<>>& layer(int64_t index) const { return layers_[static_cast<size_t>(index)]; }
  int64_t bytes() const;

 private:
  const ModelPlan* plan_;
  at::Device device_;
  at::ScalarType compute_dtype_;
  int64_t slots_, capacity_ = 0;
  std::vector<std::map<std::string, at::Tensor, std::less<>>> layers_;
};

// Called after the embedding (layer -1) and after every layer of the main stack with the residual stream [N, D].
using Observer = std::function<void(int64_t layer, const at::Tensor& x_nd)>;

class Model {
 public:
  // `recompute` holds the bindings whose layers are recomputed in the backward pass; {"*"} means all.
  Model(const ModelPlan& plan, Store& store, std::vector<std::string> recompute = {});
  ~Model();

  // Training (grad mode on): the loss whose backward pass fills the store's gradients; `batch` must outlive that pass, which recomputes from it.
  // Evaluation: the same sums without statistics.
  LossResult loss(const Batch& batch, const Denominators& over, bool training);

  // Hidden states after the final norm [N, D], compute dtype. With `state`, spans continue from it and it is advanced.
  at::Tensor hidden(const Batch& batch, DecodeState* state = nullptr, const Observer& observer = {});
  // Main logits [N, V] fp32 of hidden states.
  at::Tensor logits(const at::Tensor& hidden_nd);
  // Logits of the head's passes for whole documents, fp32 [N, V] each. Grad mode as the caller's.
  std::vector<at::Tensor> head_logits(const Batch& batch, const at::Tensor& hidden_nd);
  // Cross-entropy of every position's next token, fp32 [N], 0 where it has no target.
  at::Tensor token_losses(const Batch& batch);

  // What was counted since the last call.
  LayerCounts take_counts();
  // Runs every block's after_step with counts over the global batch.
  void after_step(const LayerCounts& counts);

  // Label of the first place where a forward pass over `batch` gives a value that is not finite; "" when all are finite.
  std::string first_nonfinite(const Batch& batch);
  // RMS of the residual stream after the embedding and after each layer.
  std::vector<double> residual_norms(const Batch& batch);

  // Training steps tell `clock` what they do; null: nobody. Parts: binding names, "embedding", "lm_head" (with the final norm and the loss),
  // the head's type.
  void set_clock(StepClock* clock) { clock_ = clock; }
  StepClock* clock() const { return clock_; }

  const ModelPlan& plan() const { return *plan_; }
  Store& store() { return *store_; }

 private:
  struct Layer;
  struct Pass;
  at::ScalarType residual_dtype() const;
  void enter(const std::string& part, StepClock::Phase phase = StepClock::kForward) {
    if (clock_) clock_->enter(part, phase);
  }
  at::Tensor mark(const at::Tensor& x, const std::string& part) { return clock_ ? clock_->mark(x, part) : x; }
  at::Tensor embed(const Weights& stem, const at::Tensor& ids_n);
  const Weight& lm_head(const Weights& stem) const;
  at::Tensor lm_head_compute(const Weights& stem) const;
  at::Tensor run_layer(const Layer& layer, const at::Tensor& x_nd, const Pass& pass);
  at::Tensor run_stack(const std::vector<std::unique_ptr<Layer>>& layers, at::Tensor x_nd, const Pass& pass, const Observer& observer);
  at::Tensor main_hidden(const Weights& stem, const Pass& pass, const Observer& observer);
  void run_head(const Weights& stem, at::Tensor hidden_nd, const Batch& batch, const Denominators* over, bool training,
                const std::function<void(size_t, const at::Tensor&)>& use);

  const ModelPlan* plan_;
  Store* store_;
  StepClock* clock_ = nullptr;
  std::vector<std::unique_ptr<Layer>> layers_;
  std::vector<std::vector<std::unique_ptr<Layer>>> head_layers_;  // by weight set
  std::unique_ptr<Head> head_;
  LayerCounts counts_;
  std::map<std::string, at::Tensor> aux_;  // values of auxiliary losses of the running forward pass
};

}  // namespace tessera
