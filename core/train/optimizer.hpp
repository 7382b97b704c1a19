// AdamW over the store's flat buffers, gradient clipping, and the learning-rate schedule.
#pragma once
#include <ATen/core/Tensor.h>

#include "config/config.hpp"
#include "store/store.hpp"

namespace tessera {

// Learning rate of step `step` (counted from 0) of `steps`: linear warm-up to `lr`, a constant stretch, then the decay that the
// table names. decay_ratio -1 decays from the end of the warm-up on (cosine, linear); a share below 1 gives warmup-stable-decay.
double learning_rate(const OptimizerConfig& optimizer, const LrSchedulerConfig& scheduler, int64_t step, int64_t steps);

class Optimizer {
 public:
  Optimizer(Store& store, const OptimizerConfig& config);

  // L2 norm over all trained parameters' gradients, fp32 [] on the store's device; no host synchronisation.
  // To be called after the last backward pass of the step; completes the flat gradients.
  at::Tensor grad_norm();

  // One AdamW step (decoupled weight decay on the rows that declare it) with gradients scaled so that their norm is at most
  // max_norm (0: as they are), as clip_grad_norm_ does: factor min(1, max_norm / (norm + 1e-6)). Then clears the gradients.
  void step(double lr, double max_norm, const at::Tensor& grad_norm);

  int64_t steps_taken() const { return steps_taken_; }
  // Moments by slot name, "exp_avg" or "exp_avg_sq": of a flat buffer, for Store's functions; allocated when first asked for.
  Flat slot(const std::string& name);
  // Moments of a parameter that lies whole on this rank, as fp32 views.
  at::Tensor moment(const std::string& slot, const std::string& parameter);
  static const std::vector<std::string>& slots();
  void set_steps_taken(int64_t steps) { steps_taken_ = steps; }

 private:
  void allocate();
  void step_on_gpu(double lr, double max_norm, const at::Tensor& grad_norm);  // everything in one pass; nothing happens where the norm is not finite

  Store* store_;
  OptimizerConfig config_;
  int64_t steps_taken_ = 0;
};

}  // namespace tessera
