// Tensors of a hub folder for a plan.
#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <vector>

#include "checkpoint/checkpoint.hpp"
#include "hf/hf_names.hpp"

namespace tessera {

// A hub folder against the plan's tensors, under either prefix, experts split or packed.
class HubFolder {
 public:
  // `map` holds "from=to" prefixes applied to the file's names, the first that fits.
  // Throws Error(kRuntime) that lists the missing, unexpected and misshapen tensors unless `partial`, and always when a stored lm_head
  // differs from a tied embedding.
  HubFolder(const std::filesystem::path& folder, const ModelPlan& plan, bool partial = false, const std::vector<std::string>& map = {});
  const std::vector<HubTensor>& tensors() const { return tensors_; }
  bool has(size_t i) const { return !stored_[i].name.empty(); }  // always, unless partial
  at::ScalarType dtype(size_t i) const { return file_.find(stored_[i].name)->dtype; }
  // tensors()[i] as stored: a view on the file, valid while this lives.
  at::Tensor tensor(size_t i) const;
  // True when a model with tied embeddings stores lm_head.weight too.
  bool stores_tied_lm_head() const { return stores_tied_lm_head_; }
  const LoadReport& report() const { return report_; }

 private:
  struct Stored {
    std::string name;    // in the file; empty when there is none that fits
    int64_t index = -1;  // of a packed tensor
  };
  void find_all(const std::map<std::string, std::string>& names);
  SafetensorsFolder file_;
  std::vector<HubTensor> tensors_;
  std::vector<Stored> stored_;
  LoadReport report_;
  bool stores_tied_lm_head_ = false;
};

}  // namespace tessera
