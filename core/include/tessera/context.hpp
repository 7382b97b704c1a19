// What a block meets while it runs: the spans of the batch, decode state, once-only decisions, loss and statistics sinks.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/context_cut.hpp"
#include "tessera/env.hpp"
#include "tessera/ranks.hpp"
#include "tessera/spans.hpp"

namespace tessera {

// What a sum is divided by, over the whole global batch: its valid tokens, or its documents that have a valid token.
enum class Per { kToken, kDocument };

struct LossTerm {
  std::string name;
  at::Tensor sum;  // fp32 [], differentiable; coefficient included
  Per per;
};

// Results of `Context::once`, kept from the first forward pass to its recomputation.
using Decisions = std::map<std::string, at::Tensor, std::less<>>;

// What a layer's random numbers depend on, see layers/random.hpp.
struct Draws {
  int64_t seed = 0;
  std::string layer;   // and which pass of it
  at::Tensor token_n;  // int64 [N]: the numbers of x_nd's tokens in training's order
};

// The context of one forward call of one layer. The core makes it; a block only reads it and reports through it.
class Context {
 public:
  explicit Context(const Spans& spans) : spans_(&spans) {}
  virtual ~Context();

  // Of the rows of x_nd. Over several ranks those may be pieces of documents: see cut() and BlockInfo.
  const Spans& spans() const { return *spans_; }
  const Mesh& mesh() const { return mesh_; }

  // The ranks to exchange with; a group of one rank is nullptr.
  const Group* tensor_group() const { return groups_ ? groups_->tensor() : nullptr; }
  const Group* context_group() const { return groups_ ? groups_->context() : nullptr; }
  const Group* sequence_group() const { return groups_ ? groups_->sequence() : nullptr; }
  const Group* expert_group() const { return groups_ ? groups_->experts() : nullptr; }
  const Group* tensor_part(int64_t size) const { return groups_ ? groups_->tensor_part(size) : nullptr; }
  // How the micro-batch lies over the context-parallel ranks; nullptr where x_nd holds all of its tokens.
  const ContextCut* cut() const { return cut_; }
  // Tokens of all tensor-parallel ranks together: the rows of x_nd where the block takes them all, their sum over the ranks where it takes sequence shards.
  int64_t sequence_tokens() const { return sequence_tokens_ < 0 ? spans_->num_tokens() : sequence_tokens_; }
  // True in training's forward passes: auxiliary losses are wanted and statistics count.
  bool training() const { return training_; }
  // bool [N], true where the token is no padding; undefined when all are valid.
  const at::Tensor& valid_n() const { return valid_n_; }

  // Decode state. Without one, spans are whole documents that begin from zero state and leave none.
  bool has_state() const { return states_ != nullptr; }
  // Per-sequence rows: [slots, ...shape]. Per-token rows: [slots, capacity, ...shape], capacity at least start + length of every span.
  // Written in place at the rows of the spans' state slots. Throws Error(kPlugin) when the block declared no such row.
  const at::Tensor& state(std::string_view name) const;

  // The result of `decide` (no gradient flows through it), computed in the first forward pass and replayed in recomputation.
  // For what rounding might make differ between the two, such as a router's choices.
  at::Tensor once(std::string_view name, const std::function<at::Tensor()>& decide);
  // True while this pass repeats an earlier one.
  bool replaying() const { return replaying_; }
  // nullptr outside training. What a block draws, it draws by `uniform` and `dropout` of layers/random.hpp.
  const Draws* draws() const { return draws_ ? &*draws_ : nullptr; }

  // Adds `sum` / (global count of tokens or documents) to the training loss. Ignored outside training. The gradient flows in
  // every pass, the reported value counts once. `sum` is that of the tokens of x_nd: where several ranks have the same ones (a block that takes
  // all tokens, see BlockInfo) they must add the same, which enters once; where each has its own, the ranks' sums add up.
  void add_loss(std::string name, at::Tensor sum, Per per);
  // Adds `counts` (fp32, any shape, no gradient) to the statistic `name` of this layer over the global batch. Ignored in a replay and outside training.
  // Over several ranks as in add_loss.
  void count(std::string_view name, const at::Tensor& counts);
  // Offers a statistic of what the block computes here, small and floating point, such as one number a head: `tessera inspect` shows it.
  // `compute` is called only while the layer is inspected, which happens in a single process and without gradients.
  void observe(std::string_view name, const std::function<at::Tensor()>& compute);
  // int64 [N], a number for each token of x_nd, where a measurement wants even choices instead of a router's own (even_experts of
  // layers/routing.hpp); undefined everywhere else.
  const at::Tensor& balanced_routing() const { return balanced_routing_n_; }

  // Set by the core.
  void set_training(bool on) { training_ = on; }
  void set_mesh(const Mesh& mesh) { mesh_ = mesh; }
  void set_groups(const BlockGroups* groups) { groups_ = groups; }
  void set_cut(const ContextCut* cut) { cut_ = cut; }
  void set_sequence_tokens(int64_t tokens) { sequence_tokens_ = tokens; }
  void set_valid(at::Tensor valid_n) { valid_n_ = std::move(valid_n); }
  void set_states(const std::map<std::string, at::Tensor, std::less<>>* states) { states_ = states; }
  void set_decisions(Decisions* decisions, bool replaying) { decisions_ = decisions, replaying_ = replaying; }
  void set_draws(Draws draws) { draws_ = std::move(draws); }
  void set_observing(bool on) { observing_ = on; }
  void set_balanced_routing(at::Tensor number_n) { balanced_routing_n_ = std::move(number_n); }
  const std::vector<LossTerm>& losses() const { return losses_; }
  const std::map<std::string, at::Tensor, std::less<>>& counts() const { return counts_; }
  const std::map<std::string, at::Tensor, std::less<>>& observed() const { return observed_; }

 private:
  const Spans* spans_;
  Mesh mesh_;
  const BlockGroups* groups_ = nullptr;
  const ContextCut* cut_ = nullptr;
  int64_t sequence_tokens_ = -1;
  bool training_ = false, replaying_ = false, observing_ = false;
  at::Tensor valid_n_, balanced_routing_n_;
  const std::map<std::string, at::Tensor, std::less<>>* states_ = nullptr;
  Decisions* decisions_ = nullptr;
  std::optional<Draws> draws_;
  std::vector<LossTerm> losses_;
  std::map<std::string, at::Tensor, std::less<>> counts_, observed_;
};

}  // namespace tessera
