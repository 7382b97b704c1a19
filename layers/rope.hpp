// Rotary position embedding.
// Letters: N tokens, H heads, P head dim (even).
#pragma once
#include <ATen/core/Tensor.h>

namespace tessera {

// Turns the pair (x[p], x[p + P/2]) of every head by the angle position * theta^(-2p/P): x_nhp [N, H, P], positions_n int64 [N] -> [N, H, P].
// fp32 inside (fp64 for fp64), rounded once. Throws Error(kRuntime) for an odd P or another number of positions.
// Su et al., arXiv:2104.09864, eq. 34, with the pairs laid as halves (GPT-NeoX) where the paper interleaves them.
at::Tensor rope(const at::Tensor& x_nhp, const at::Tensor& positions_n, double theta);

}  // namespace tessera
