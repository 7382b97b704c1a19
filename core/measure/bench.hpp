// Throughput of whole training steps and of decoding, on random tokens.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "config/config.hpp"
#include "measure/prediction.hpp"
#include "parallel/mesh_groups.hpp"

namespace tessera {

struct BenchOptions {
  int64_t steps = 5;             // timed training steps of each configuration, one a round; 0: none
  int64_t decode_batch = 1;      // sequences
  int64_t decode_context = 64;   // tokens before the first timed one
  int64_t decode_tokens = 32;    // timed tokens a sequence; 0: none
  std::vector<int64_t> contexts; // lengths at which prefill and decoding of one sequence are measured
  std::string routing = "natural";  // or "balanced": tokens go to experts evenly, whatever the router scores
  bool check = true;             // the blocks against fp64 before anything is timed
  bool peaks = true;             // measures what the machine does at best
};

// Figures of several rounds.
struct Samples {
  std::vector<double> values;  // in the order of the rounds
  double median() const { return quantile(0.5); }
  double quantile(double q) const;  // linear between neighbours; 0 where there are none
};

// A sequence of this length.
struct ContextPoint {
  int64_t context = 0;
  double prefill_tokens_per_s = 0, decode_tokens_per_s = 0;
  int64_t state_bytes = 0;  // that it keeps for its next token
};

// Time and memory of one part of a training step: a binding's layers together, embedding, lm_head, a head, the optimizer, and "input", the reading of the batch.
struct PartTime {
  std::string name;
  int64_t num_layers = 0;
  // Means over ranks: masters, gradients, moments and copies in the compute dtype; what a micro-batch leaves for its backward pass; and the most that one layer
  // holds at once beside what was there before it.
  double state_bytes = 0, kept_bytes = 0, working_bytes = 0;
  double forward_s = 0, recompute_s = 0, backward_s = 0;  // medians over steps, means over ranks
  double flops = 0, bytes = 0;                            // of a step: declared forward, and twice that backward
  double seconds() const { return forward_s + recompute_s + backward_s; }
};

// Where a rank's time of a training step goes, medians over steps: its own work, and waiting in collectives and for neighbouring pipeline stages (0 on a GPU,
// where streams wait).
struct RankTime {
  std::string place;  // "rank 1 (tp 1)"
  double compute_s = 0, wait_s = 0, pipeline_wait_s = 0;
  int64_t peak_bytes = 0;
  std::map<std::string, int64_t> sent_bytes, planned_bytes;  // of a step, by axis: counted, and from the plan's rows
};

struct BenchResult {
  std::string config, dtype, device, routing;
  int64_t params = 0, peak_bytes = 0;  // of the rank that takes most
  int64_t warm_up_steps = 0;           // until a step took no less than those before
  Samples step_s;                      // of training, input included
  double train_tokens_per_s = 0, train_step_s = 0, train_flops_per_s = 0;  // medians
  double prefill_tokens_per_s = 0, decode_tokens_per_s = 0;                // medians
  double matrix_peak = 0, memory_peak = 0;  // FLOP/s and bytes/s of all ranks at once, measured
  std::vector<PartTime> parts;  // the slowest first
  std::vector<RankTime> ranks;  // none in a single process
  std::vector<ContextPoint> contexts;
  std::optional<Prediction> predicted;  // of a training step
  std::vector<std::string> unchecked;  // blocks too large to be checked against fp64
  std::string no_input;                // why the reading of the batch was not measured; empty: it was
};

// Over several ranks (`ranks` not nullptr) all call it and get the same result, but decoding rates, which are rank 0's; context-parallel ranks do not decode.
// Several configurations take turns, a step each, so that a noisy machine harms all alike. Throws what check_blocks throws.
std::vector<BenchResult> bench(const std::vector<Config>& configs, const BenchOptions& options, const MeshGroups* ranks = nullptr);

}  // namespace tessera
