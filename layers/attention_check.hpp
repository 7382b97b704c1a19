// What the inputs of `attention` must be.
#pragma once
#include <ATen/core/Tensor.h>

#include "tessera/spans.hpp"

namespace tessera {

// Throws Error(kRuntime) with the shapes, see attention.hpp.
void check_attention(const at::Tensor& q_nhp, const at::Tensor& k_nkp, const at::Tensor& v_nkp, const Spans& spans, int64_t window, const at::Tensor& k_cache_slkp,
                     const at::Tensor& v_cache_slkp);

}  // namespace tessera
