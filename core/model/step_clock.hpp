// Where the time of a training step goes: by part (a binding's layers, embedding, lm_head, a head, the optimizer) and phase.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <chrono>
#include <map>
#include <memory>
#include <string>

namespace tessera {

class StepClock {
 public:
  enum Phase { kForward, kRecompute, kBackward };
  using Seconds = std::array<double, 3>;  // by phase

  // `scopes`: instead of seconds, each stretch of a part is a scope of the profiler's trace, "layers.3 (mamba2), backward", and nothing is waited for.
  explicit StepClock(at::Device device, bool scopes = false);
  ~StepClock();

  // From now on time belongs to `part`; what runs on the device is waited for first. `label`: which of it, in a trace.
  void enter(const std::string& part, Phase phase, const std::string& label = "");
  // Ends the last part. What was measured since the last call.
  std::map<std::string, Seconds> stop();

  // x itself; in the backward pass, what comes after its gradient is there belongs to `part`.
  at::Tensor mark(const at::Tensor& x, const std::string& part, const std::string& label = "");

 private:
  struct Scope;
  at::Device device_;
  bool scopes_;
  std::unique_ptr<Scope> scope_;
  std::chrono::steady_clock::time_point since_;
  double* open_ = nullptr;
  std::map<std::string, Seconds> seconds_;
};

}  // namespace tessera
