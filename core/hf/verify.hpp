// A hub checkpoint run through everything that a reference file can speak of, and compared with whatever it holds.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint/safetensors.hpp"
#include "config/config.hpp"
#include "parallel/mesh_groups.hpp"

namespace tessera {

// RMS(got - want) / RMS(want) that fp32 against another fp32 implementation may reach; tokens must be equal.
inline constexpr double kForwardLimit = 2e-5;   // hidden states, logits
inline constexpr double kGradientLimit = 2e-4;
inline constexpr double kLossLimit = 1e-4;      // losses and gradient norms

struct VerifyOptions {
  std::vector<std::string> waived;  // keys of config.json
  std::vector<std::string> sets;    // `a.b=c`: activation_checkpoint, training.local_batch_size and block keys take effect
};

struct VerifyTensor {
  std::string name;    // of the reference file: "hidden.3", "grad.backbone.norm_f.weight"
  std::string where;   // "layer 2 (mlp)", "embedding", ...
  at::Tensor value;    // what was computed, CPU
  bool compared = false;  // the file holds it
  bool ok = true;
  double error = 0, limit = 0;
  std::string problem;    // why there is no error: another shape, not finite
};

struct VerifyRank {
  int64_t parameter_bytes = 0;  // fp32 masters that the rank holds
  // In the backward passes and training, by axis: dp_replicate, dp_shard, pp, cp, tp, ep (etp included). A group over several axes counts for the first of
  // them; sums of counts and losses do not count.
  std::vector<std::pair<std::string, int64_t>> sent_bytes;
};

struct VerifyReport {
  std::vector<VerifyTensor> tensors;     // forward, losses, generation, gradients from the last layer to the first, training
  std::vector<std::string> not_computed; // in the file, and nothing that is computed here: they count as failed
  std::string first_difference;          // where the first failed comparison lies; empty when there is none
  std::string pattern;
  std::vector<VerifyRank> ranks;
  std::vector<std::string> notes;
  int64_t num_compared() const;
  int64_t num_failed() const;
  const VerifyTensor* find(const std::string& name) const;
};

// Inputs in `reference`: input_ids [B, T]; optional document_lengths [B, n], zero-padded, and generate.prompt [1, P] (else the first tokens
// of the first document). Everything else in it is compared. fp32 on the CPU unless `sets` say otherwise.
// Passes of a head: as many as mtp.K.logits of the file, unless `sets` give their number.
// Over several ranks all must call it, and all get the whole report: each data rank takes its rows of the batch, as even as they go, and what is compared is
// gathered. Over context-parallel ranks, where generation does not run with a state, every token is computed from all before it.
VerifyReport verify_hf(const std::filesystem::path& folder, const std::filesystem::path& reference, const Registry& registry,
                       const VerifyOptions& options = {}, const MeshGroups* ranks = nullptr);

// Every computed tensor and the inputs under their names.
void dump_report(const VerifyReport& report, const std::filesystem::path& file);
nlohmann::json report_json(const VerifyReport& report);
std::string report_text(const VerifyReport& report);

}  // namespace tessera
