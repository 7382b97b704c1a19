// Generation: prefill, then decoding one token at a time from constant-size state.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "model/model.hpp"

namespace tessera {

struct GenerateOptions {
  int64_t max_new_tokens = 64;
  double temperature = 0;   // 0: greedy
  double top_p = 1;         // smallest set of ids whose probability reaches it
  uint64_t seed = 0;
  int64_t stop_id = -1;     // ends a sequence after this id; -1: none
  int64_t prefill_chunk = 0;  // tokens of a prompt run at once; 0: the whole prompt
};

// Continues each prompt (at least one id, each in [0, vocab_size); lengths may differ). Returns the new ids of each. `on_token(sequence, id)` is called as they come.
// What a prompt gives does not depend on the others, up to the rounding of differently shaped products. Over several ranks all must call it, with the
// same prompts, and all get the same ids. Throws Error(kUsage) for context-parallel ranks.
std::vector<std::vector<int64_t>> generate(Model& model, const std::vector<std::vector<int64_t>>& prompts, const GenerateOptions& options,
                                           const std::function<void(size_t, int64_t)>& on_token = {});

// The ids of one rank of the last pipeline stage, on all ranks: they go on with the same ones.
at::Tensor from_last_stage(const MeshGroups& ranks, const at::Tensor& ids);

}  // namespace tessera
