// Moves tokens to their experts and back: rows sorted by expert, each expert's rows in token order.
// Letters: N tokens, k experts per token, M = N k sorted rows, D width, E experts.
// Every pass gathers (a row is written by one thread, in one order), so results do not depend on scheduling.
#pragma once
#include <ATen/core/Tensor.h>

namespace tessera {

// Where every choice of an expert goes. Slot n k + j is choice j of token n.
struct Dispatch {
  at::Tensor counts_e;  // int64 [E] on the host: rows of every expert
  at::Tensor slot_m;    // int64 [M]: the slot of a sorted row
  at::Tensor token_m;   // int64 [M]: its token, slot / k
  at::Tensor row_nk;    // int64 [N, k]: the sorted row of a slot, the inverse of slot_m
};

// indices_nk int64 [N, k], the experts of every token. Throws Error(kRuntime) when one is outside [0, E).
Dispatch dispatch(const at::Tensor& indices_nk, int64_t num_experts);
// By a stable sort, on any device.
Dispatch dispatch_ref(const at::Tensor& indices_nk, int64_t num_experts);

// x_nd [N, D] -> [M, D], row m a copy of token_m's; the gradient of a token is summed in fp32 and rounded once.
at::Tensor permute_tokens(const at::Tensor& x_nd, const Dispatch& dispatch);
at::Tensor permute_tokens_ref(const at::Tensor& x_nd, const Dispatch& dispatch);

// out[n] = sum_j weights[n, j] y[row[n, j]]: y_md [M, D], weights_nk [N, k] fp32 -> [N, D] in y's dtype, summed in fp32 (fp64 for
// fp64) and rounded once. Gradients for y_md and weights_nk.
at::Tensor combine_tokens(const at::Tensor& y_md, const at::Tensor& weights_nk, const Dispatch& dispatch);
at::Tensor combine_tokens_ref(const at::Tensor& y_md, const at::Tensor& weights_nk, const Dispatch& dispatch);

}  // namespace tessera
