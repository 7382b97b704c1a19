// Kernels of the router, on plain pointers. N tokens, E experts, k of them a token, in num_groups groups.
#pragma once
#include "layers/cuda/types.hpp"

namespace tessera::gpu {

constexpr int64_t kMostExperts = 8192;  // a token's scores must fit into shared memory

struct Choices {
  int64_t N, E, k, num_groups, topk_group;
};
// scores fp32 [N, E] (or logits, whose sigmoid is meant) + bias fp32 [E] or null -> chosen int64 [N, k], ascending in a row.
Status choose_experts(const Choices& c, const float* scores, bool of_logits, const float* bias, int64_t* chosen, Stream stream);

// Rows of `partials`, fp32 [rows, E], that add up to how often the tokens chose each expert. valid: a byte a token, or null.
int64_t count_parts(const Choices& c);
Status count_experts(const Choices& c, const int64_t* chosen, const bool* valid, float* partials, Stream stream);

// weights fp32 [N, k] of sigmoid(logits) at the chosen experts, which are distinct: times scaling, and normed, by their sum + 1e-20.
Status routed_weights(const Choices& c, const float* logits, const int64_t* chosen, bool normed, float scaling, float* weights, Stream stream);
// dlogits fp32 [N, E].
Status routed_weights_backward(const Choices& c, const float* logits, const int64_t* chosen, bool normed, float scaling, const float* dweights, float* dlogits, Stream stream);

}  // namespace tessera::gpu
