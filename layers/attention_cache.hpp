// Attention of a few new tokens to a cache on the CPU.
#pragma once
#include <ATen/core/Tensor.h>

#include "tessera/spans.hpp"

namespace tessera {

// out [N, H, P], contiguous, of q [N, H, P] and caches [S, L, K, P], one dtype, fp32 or bf16, as `attention` defines it. Keys are read once
// for all heads that share them and all tokens of a span, in blocks that threads take side by side; the blocks' softmax sums are joined in order.
void attend_cache_cpu(const at::Tensor& q_nhp, const Spans& spans, double scale, int64_t window, const at::Tensor& k_cache_slkp,
                      const at::Tensor& v_cache_slkp, const at::Tensor& out_nhp);

}  // namespace tessera
