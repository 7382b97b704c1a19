// Where the time of a training step goes: by part (a binding's layers, embedding, lm_head, a head, the optimizer) and phase.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <chrono>
#include <map>
#include <string>

namespace tessera {

class StepClock {
 public:
  enum Phase { kForward, kRecompute, kBackward };
  using Seconds = std::array<double, 3>;  // by phase

  explicit StepClock(at::Device device) : device_(device) {}

  // From now on time belongs to `part`; what runs on the device is waited for first.
  void enter(const std::string& part, Phase phase);
  // Ends the last part. What was measured since the last call.
  std::map<std::string, Seconds> stop();

  // x itself; in the backward pass, what comes after its gradient is there belongs to `part`.
  at::Tensor mark(const at::Tensor& x, const std::string& part);

 private:
  at::Device device_;
  std::chrono::steady_clock::time_point since_;
  double* open_ = nullptr;
  std::map<std::string, Seconds> seconds_;
};

}  // namespace tessera
