// The language-model head and its loss in one operator, so that logits exist for a chunk of tokens only.
// Letters: N tokens, D hidden, V words: the vocabulary, or a rank's part of it.
#pragma once
#include <ATen/core/Tensor.h>

#include "tessera/ranks.hpp"
#include "tessera/weights.hpp"

namespace tessera {

// Sum over the valid targets of -log softmax(h W^T)[target], in nats: h_nd [N, D], lm_head_vd [V, D], targets_n int64 [N], -1 where
// there is none -> fp32 [] (fp64 for fp64 weights). Products in the weight's dtype, to which h is cast; log-sum-exp in fp32.
// Gradients are formed in this forward pass, dW in fp32 over the chunks, and scaled in the backward pass, which may run once.
// Memory: chunk_tokens * V logits, besides the gradients; chunk_tokens = 0 bounds them by kLogitBytes whatever N is.
// With a group, lm_head_vd is words [rank V, (rank + 1) V) and the vocabulary size() V; h and the targets, whose ids are the vocabulary's, are the
// same on every rank. Rank 0 returns the sum and the others 0, so that it enters the model's loss once; every rank must use its result alike, for
// the gradients: h's is this rank's summand, the weight's is whole. A chunk's maximum and sums are exchanged: 12 bytes a token (24 in fp64).
// Throws Error(kRuntime) when shapes do not fit or a target lies beyond the vocabulary.
inline constexpr int64_t kLogitBytes = int64_t{256} << 20;
at::Tensor linear_cross_entropy(const at::Tensor& h_nd, const at::Tensor& lm_head_vd, const at::Tensor& targets_n, const Group* tensor = nullptr,
                                int64_t chunk_tokens = 0);
at::Tensor linear_cross_entropy(const at::Tensor& h_nd, const Weight& lm_head_vd, const at::Tensor& targets_n, const Group* tensor = nullptr,
                                int64_t chunk_tokens = 0);

// The same loss token by token, without gradients -> fp32 [N], 0 where there is no target; on every rank of a group.
at::Tensor cross_entropy_per_token(const at::Tensor& h_nd, const at::Tensor& lm_head_vd, const at::Tensor& targets_n, const Group* tensor = nullptr,
                                   int64_t chunk_tokens = 0);

// Whether the target's logit is greater than every other word's -> bool [N], false where there is no target; on every rank of a group. No gradients.
at::Tensor top_word_is(const at::Tensor& h_nd, const at::Tensor& lm_head_vd, const at::Tensor& targets_n, const Group* tensor = nullptr,
                       int64_t chunk_tokens = 0);

// The plain composition of linear_cross_entropy over all [N, V] logits, differentiable in any dtype.
at::Tensor linear_cross_entropy_ref(const at::Tensor& h_nd, const at::Tensor& lm_head_vd, const at::Tensor& targets_n);

}  // namespace tessera
