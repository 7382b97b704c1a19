// Time and memory of a training step before it runs: the costs that the blocks declare, times what a unit of each took on this machine when it was calibrated.
#pragma once
#include <array>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "plan/plan.hpp"

namespace tessera {

// What time is spent on: calls (one a layer and micro-batch), FLOPs of the three kinds that Cost tells apart, elements moved, and elements of the weights.
enum Term { kCalls, kMatmul, kMixing, kElementwise, kMoved, kWeights, kNumTerms };
using Work = std::array<double, kNumTerms>;

// One part of a training step of one process, as StepClock names it: a binding, "embedding", "lm_head", a head, "optimizer", "input", and "rest", which belongs to none of them.
struct PartWork {
  std::string part;
  std::string kind;         // block or head type, the source of the input, else the part itself
  bool recomputed = false;  // its forward pass runs twice
  Work work{};              // of the forward pass; the backward pass is measured against the same
  double size() const { return (work[kMatmul] + work[kMixing] + work[kMoved] + work[kWeights]) / work[kCalls]; }
};
std::vector<PartWork> step_work(const ModelPlan& plan, const Config& config);

// What one kind of part takes.
struct PartRate {
  Work forward{}, backward{};   // seconds a unit
  double least = 0, most = 0;   // sizes that were measured
};

// What a training process takes memory for: itself; planned bytes of parameters, gradients, moments and copies; of activations; of those the share by which kinds of
// layers differ, since freed blocks of one kind wait while another's are made; elements of logits; of the largest layer elements moved and elementwise FLOPs, for its scratch.
using MemoryTerms = std::array<double, 7>;
MemoryTerms memory_terms(const ModelPlan& plan, const Config& config);

// One machine's, for one dtype and number of threads.
struct Calibration {
  std::string machine, device, dtype;
  int64_t threads = 0;
  std::string date;                       // UTC
  std::map<std::string, PartRate> parts;  // by kind; "" stands for block types that were not measured
  MemoryTerms memory{};                   // bytes of the process for each unit of memory_terms
};

struct Prediction {
  double step_s = 0, peak_bytes = 0;
  std::map<std::string, double> parts;  // seconds, forward and backward together
  std::vector<std::string> notes;       // what makes it uncertain
};
Prediction predict(const Calibration& calibration, const ModelPlan& plan, const Config& config);

// $XDG_CACHE_HOME/tessera/calibration.json, or ~/.cache/...; empty where neither is set.
std::filesystem::path default_calibration_file();
// Of the file, that of this machine for what `config` trains with; none where it has none or there is no file. Throws Error(kUsage) where the file cannot be read as one.
std::optional<Calibration> find_calibration(const std::filesystem::path& file, const Config& config);
// In place of an older one for the same machine, device, dtype and threads.
void keep_calibration(const std::filesystem::path& file, const Calibration& calibration);

}  // namespace tessera
