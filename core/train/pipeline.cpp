#include "train/pipeline.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <deque>
#include <map>

#include "plan/schedule.hpp"

namespace tessera {

namespace {

// What goes from one rank to another, in the order in which it is sent: what a stage gives the next one, and the gradients that go back.
std::vector<PipelineAction> sent(const std::vector<PipelineAction>& actions, int64_t num_ranks, int64_t num_stages, int64_t to) {
  std::vector<PipelineAction> out;
  for (const PipelineAction& a : actions) {
    const int64_t stage = a.forward ? a.stage + 1 : a.stage - 1;
    if (stage >= 0 && stage < num_stages && stage % num_ranks == to) out.push_back(a);
  }
  return out;
}

class PipelineRun {
 public:
  PipelineRun(Model& model, const std::vector<Batch>& micro_batches, const Denominators& over)
      : model_(model), groups_(*model.store().ranks()), num_ranks_(groups_.mesh().pp), num_stages_(model.plan().num_stages), rank_(groups_.place().pp) {
    for (const Batch& batch : micro_batches) micro_.push_back({.passage = model.micro_batch(batch, over, /*training=*/true)});
    schedule_ = pipeline_schedule(num_ranks_, num_stages_, static_cast<int64_t>(micro_batches.size()));
    for (int64_t r = 0; r < num_ranks_; ++r) {
      const auto order = sent(schedule_[static_cast<size_t>(r)], num_ranks_, num_stages_, rank_);
      coming_.emplace_back(order.begin(), order.end());
    }
  }

  void run(const std::function<void(const LossResult&)>& result) {
    for (const PipelineAction& a : schedule_[static_cast<size_t>(rank_)]) a.forward ? forward(a, result) : backward(a);
    if (rank_ != (num_stages_ - 1) % num_ranks_)
      for (const Micro& micro : micro_) result(Model::report(*micro.passage));
    for (const FlightPtr& flight : leaving_) flight->wait();
  }

 private:
  struct Micro {
    MicroBatchPtr passage;
    std::map<int64_t, at::Tensor> in = {}, out = {};  // by stage, between its forward and backward pass
  };
  struct Arriving {
    at::Tensor tensor;
    FlightPtr flight;
  };

  void place(const PipelineAction& a, const char* what) {
    groups_.whereabouts().place = fmt::format("{} {} pass of stage {}, micro-batch {}", what, a.forward ? "the forward" : "the backward", a.stage, a.micro);
  }

  void send(const PipelineAction& a, const at::Tensor& x, int64_t to) {
    if (x.numel() == 0) return;
    place(a, "after");
    leaving_.push_back(groups_.pipe()->start_send(x.detach().contiguous(), to));
  }

  // Receives from a rank in the order in which it sends, until what is asked for is there.
  at::Tensor receive(const PipelineAction& a, int64_t from) {
    const auto key = std::pair{a.forward, std::pair{a.micro, a.stage}};
    auto& queue = coming_[static_cast<size_t>(from)];
    place(a, "waiting for");
    while (!arriving_.contains(key)) {
      const PipelineAction next = queue.front();
      queue.pop_front();
      const MicroBatch& micro = *micro_[static_cast<size_t>(next.micro)].passage;
      Arriving arriving{.tensor = at::empty({micro.tokens.shard().num_tokens(), model_.plan().env.hidden_size}, at::TensorOptions(model_.residual_dtype()).device(model_.store().device()))};
      if (arriving.tensor.numel() > 0) arriving.flight = groups_.pipe()->start_receive(arriving.tensor, from);
      arriving_.emplace(std::pair{next.forward, std::pair{next.micro, next.stage}}, std::move(arriving));
    }
    auto taken = arriving_.extract(key);
    if (taken.mapped().flight) taken.mapped().flight->wait();
    return taken.mapped().tensor;
  }

  void forward(const PipelineAction& a, const std::function<void(const LossResult&)>& result) {
    Micro& micro = micro_[static_cast<size_t>(a.micro)];
    const at::AutoGradMode grad_mode(true);
    at::Tensor x_nd;
    if (a.stage > 0) {
      x_nd = receive({.forward = true, .micro = a.micro, .stage = a.stage - 1}, (a.stage - 1) % num_ranks_);
      micro.in[a.stage] = x_nd.set_requires_grad(true);
    } else {
      x_nd = model_.embed(micro.passage);
    }
    x_nd = model_.run_stage(micro.passage, a.stage, x_nd);
    if (a.stage < num_stages_ - 1) {
      micro.out[a.stage] = x_nd;
      return send(a, x_nd, (a.stage + 1) % num_ranks_);
    }
    const LossResult losses = model_.predict(micro.passage, x_nd);
    micro.out[a.stage] = losses.total;
    result(losses);
  }

  void backward(const PipelineAction& a) {
    Micro& micro = micro_[static_cast<size_t>(a.micro)];
    const bool last = a.stage == num_stages_ - 1;
    const at::Tensor gradient = last ? at::Tensor() : receive({.forward = false, .micro = a.micro, .stage = a.stage + 1}, (a.stage + 1) % num_ranks_);
    const at::Tensor out = micro.out.extract(a.stage).mapped();
    if (out.requires_grad()) torch::autograd::backward({out}, last ? std::vector<at::Tensor>{} : std::vector<at::Tensor>{gradient});
    if (a.stage > 0) send(a, micro.in.extract(a.stage).mapped().grad(), (a.stage - 1) % num_ranks_);
  }

  Model& model_;
  const MeshGroups& groups_;
  int64_t num_ranks_, num_stages_, rank_;
  std::vector<Micro> micro_;
  std::vector<std::vector<PipelineAction>> schedule_;
  std::vector<std::deque<PipelineAction>> coming_;  // from each rank, not yet asked for
  std::map<std::pair<bool, std::pair<int64_t, int64_t>>, Arriving> arriving_;
  std::vector<FlightPtr> leaving_;
};

// What the last stage gives of this rank's tokens, where it lies; undefined on the others.
at::Tensor run_stages(Model& model, const MicroBatchPtr& micro, const Observer& observer) {
  const MeshGroups* ranks = model.store().ranks();
  const int64_t stages = model.plan().num_stages, num_ranks = ranks ? ranks->mesh().pp : 1, rank = ranks ? ranks->place().pp : 0;
  const int64_t n = micro->tokens.shard().num_tokens();
  at::Tensor x_nd;
  FlightPtr leaving;
  for (int64_t stage = 0; stage < stages; ++stage) {
    if (stage % num_ranks != rank) continue;
    if (stage == 0) {
      x_nd = model.embed(micro);
      if (observer) observer(-1, micro->tokens.gather_whole(x_nd));
    } else if (num_ranks > 1) {
      x_nd = at::empty({n, model.plan().env.hidden_size}, at::TensorOptions(model.residual_dtype()).device(model.store().device()));
      if (n > 0) ranks->pipe()->start_receive(x_nd, (stage - 1) % num_ranks)->wait();
    }
    x_nd = model.run_stage(micro, stage, x_nd, observer).contiguous();
    if (leaving) leaving->wait();
    if (stage == stages - 1) return x_nd;
    if (num_ranks > 1 && n > 0) leaving = ranks->pipe()->start_send(x_nd, (stage + 1) % num_ranks);
  }
  if (leaving) leaving->wait();
  return {};
}

}  // namespace

TokenScores scores_by_stage(Model& model, const MicroBatchPtr& micro, bool hits) {
  const at::NoGradGuard no_grad;
  const at::Tensor x_nd = run_stages(model, micro, {});
  return x_nd.defined() ? model.token_scores(micro, x_nd, hits) : TokenScores{};
}

at::Tensor hidden_by_stage(Model& model, const Batch& batch, DecodeState* state, const Observer& observer) {
  const at::NoGradGuard no_grad;
  const MicroBatchPtr micro = model.micro_batch(batch, {}, /*training=*/false);
  micro->state = state;
  if (state) state->reserve(batch.spans);
  const at::Tensor x_nd = run_stages(model, micro, observer);
  return x_nd.defined() ? model.hidden(micro, x_nd) : x_nd;
}

void run_pipeline(Model& model, const std::vector<Batch>& micro_batches, const Denominators& over, const std::function<void(const LossResult&)>& result) {
  PipelineRun(model, micro_batches, over).run(result);
}

}  // namespace tessera
