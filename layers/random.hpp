// What a block draws at random in training. A number depends on training.seed, the layer, a name, the token and the column alone: it is the same on any layout of
// ranks, in any micro-batch, in recomputation, and after a resumption. A token is known by its number in training's order, of all global batches end to end.
// Letters: N tokens, W columns.
// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
#pragma once
#include <ATen/core/Tensor.h>

#include <string_view>

#include "tessera/context.hpp"

namespace tessera {

// fp32 [N, W] in [0, 1), multiples of 2^-24: of each token its columns [first, first + W) under `name`. A tensor rank that holds the columns behind those of
// other ranks says by `first` where its own begin. Throws Error(kPlugin) outside of training, and where `first` or W is negative.
at::Tensor uniform(const Context& ctx, std::string_view name, int64_t width, int64_t first = 0);

// The same by plain tensor operations on any device.
at::Tensor uniform_ref(const Context& ctx, std::string_view name, int64_t width, int64_t first = 0);

// x [N, W], differentiable: every element 0 with probability p, else divided by 1 - p; outside of training x itself. Keeps nothing for the backward pass, which
// draws again. `name` and `first` as above. Throws Error(kPlugin) where p is not in [0, 1). Dropout: Srivastava et al., JMLR 15, 2014.
at::Tensor dropout(const Context& ctx, const at::Tensor& x_nw, double p, std::string_view name, int64_t first = 0);

}  // namespace tessera
