// Causal softmax attention over the spans of a batch.
// Letters: N tokens, H query heads, K kv heads (H % K == 0, head h reads kv head floor(h / (H/K))), P head dim, S state slots, L capacity.
#pragma once
#include <ATen/core/Tensor.h>

#include "tessera/context.hpp"
#include "tessera/spans.hpp"

namespace tessera {

// softmax(scale * q k^T) v, each token over itself and the tokens before it in its document: q_nhp [N, H, P], k_nkp, v_nkp [N, K, P],
// strided or not -> [N, H, P]. `window`: how many tokens are seen, itself included; 0 means all. Softmax in fp32 (fp64 for fp64).
// Decoding: k_cache_slkp, v_cache_slkp [S, L, K, P], contiguous, finite, are written in place at [slot, start : start + length] and read
// from 0; no gradient. Training: both undefined; every span then begins at position 0.
// Rows of one document depend on the tokens of no other, bit for bit.
// Throws Error(kRuntime) with the shapes when they do not fit, and when a span begins beyond 0 without a cache.
at::Tensor attention(const at::Tensor& q_nhp, const at::Tensor& k_nkp, const at::Tensor& v_nkp, const Spans& spans, double scale,
                     int64_t window = 0, const at::Tensor& k_cache_slkp = {}, const at::Tensor& v_cache_slkp = {});

// Over the rows of ctx. Where they are pieces of documents, the earlier keys and values of these come from the context-parallel ranks that hold them,
// no more than the window reaches, and their gradients go back. Throws as above, and Error(kCollective).
at::Tensor attention(Context& ctx, const at::Tensor& q_nhp, const at::Tensor& k_nkp, const at::Tensor& v_nkp, double scale, int64_t window = 0,
                     const at::Tensor& k_cache_slkp = {}, const at::Tensor& v_cache_slkp = {});

// The plain composition: for each span the full square of scores, masked. Differentiable in any dtype.
at::Tensor attention_ref(const at::Tensor& q_nhp, const at::Tensor& k_nkp, const at::Tensor& v_nkp, const Spans& spans, double scale,
                         int64_t window = 0, const at::Tensor& k_cache_slkp = {}, const at::Tensor& v_cache_slkp = {});

// How far each head's attention is spread -> fp64 [H]: the mean over the N tokens (0 where there are none) of the entropy in nats of the weights softmax(scale * q k^T) that
// `attention` gives to what a token sees; between 0, one key alone, and the logarithm of the number of keys seen, all alike. k_cache_slkp holds the keys before each
// span's start; it is only read. Scores in fp32 (fp64 for fp64), of a block of queries at a time. No gradient. Throws as `attention` does.
at::Tensor attention_entropy(const at::Tensor& q_nhp, const at::Tensor& k_nkp, const Spans& spans, double scale, int64_t window = 0, const at::Tensor& k_cache_slkp = {});

}  // namespace tessera
