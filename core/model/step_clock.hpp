// Where the time of a training step goes, or the memory: by part (a binding's layers, embedding, lm_head, a head, the optimizer) and phase.
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

  // Of the tensors made in a part, bytes: what all of its forward stretches left behind for the backward pass, and the most that one stretch of any phase held at
  // once beside what was there when it began.
  struct Memory {
    int64_t kept = 0, most = 0;
  };
  // What is measured. kScopes: nothing, and each stretch of a part is a scope of the profiler's trace, "layers.3 (mamba2), backward".
  enum Measure { kSeconds, kMemory, kScopes };

  explicit StepClock(at::Device device, Measure measure = kSeconds);
  ~StepClock();

  // From now on time and memory belong to `part`; for kSeconds, what runs on the device is waited for first. `label`: which of it, in a trace.
  void enter(const std::string& part, Phase phase, const std::string& label = "");
  // Ends the last part. What was measured since the last call, by part.
  std::map<std::string, Seconds> stop();
  std::map<std::string, Memory> stop_memory();

  // x itself; in the backward pass, what comes after its gradient is there belongs to `part`.
  at::Tensor mark(const at::Tensor& x, const std::string& part, const std::string& label = "");

 private:
  struct Scope;
  void enter_memory(const std::string& part, Phase phase);
  at::Device device_;
  Measure measure_;
  std::unique_ptr<Scope> scope_;
  std::chrono::steady_clock::time_point since_;
  double* open_ = nullptr;
  std::map<std::string, Seconds> seconds_;
  std::map<std::string, Memory> memory_;
  Memory* held_by_ = nullptr;  // the part that is open, and what was held when it began
  int64_t held_before_ = 0;
  Phase phase_ = kForward;
};

}  // namespace tessera
