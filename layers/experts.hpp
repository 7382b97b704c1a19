// Moves tokens to their experts and back: rows sorted by expert, each expert's rows in token order.
// Letters: N tokens, k experts per token, M = N k sorted rows, D width, E experts.
// Every pass gathers (a row is written by one thread, in one order), so results do not depend on scheduling.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "tessera/ranks.hpp"

namespace tessera {

// Where every choice of an expert goes, on the choices' device. Slot n k + j is choice j of token n.
struct Dispatch {
  at::Tensor counts_e;  // int64 [E]: rows of every expert
  at::Tensor slot_m;    // int64 [M]: the slot of a sorted row
  at::Tensor token_m;   // int64 [M]: its token, slot / k
  at::Tensor row_nk;    // int64 [N, k]: the sorted row of a slot, the inverse of slot_m
};

// indices_nk int64 [N, k], the experts of every token. Throws Error(kRuntime) when one on the CPU is outside [0, E); on a GPU nothing waits to find out.
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

// Experts on other ranks. A group of ep x etp ranks holds them in parts of E / ep: part i lies on ranks [i * etp, (i + 1) * etp), each of which has its
// share of an expert's inner width, and a row goes to all etp of them. No capacity: every row arrives, and a rank may send or receive none.

// The experts as their copies on ranks, numbered rank by rank: copy (i * etp + t) * E / ep + l is expert l of part i on its rank t.
// indices_nk of experts -> int64 [N, k * etp] of copies, the etp of one choice side by side.
at::Tensor copies_of_experts(const at::Tensor& indices_nk, int64_t num_experts, const Group& group, int64_t etp);

// The way of a rank's rows, sorted by copy, to the ranks that hold them.
struct ExpertRoute {
  std::vector<int64_t> sent, received;  // rows to and from every rank of the group
  Dispatch arrived;                     // of the received rows, as tokens with one choice, among this rank's experts
};
// Reads both on the host. arriving_e int64 [ranks * E / ep]: rows that arrive for every expert of this rank, source by source.
ExpertRoute expert_route(const at::Tensor& counts_e, const at::Tensor& arriving_e, const Group& group, at::Device device);
// What arrives from whom: every rank's part of `counts_e`, the rows of every copy. Reached by all ranks of the group together.
at::Tensor exchange_counts(const at::Tensor& counts_e, const Group& group, at::Device device);
// Rows sorted by copy [M, D] -> the rows of this rank's experts, sorted by expert, each expert's by source ...
at::Tensor rows_to_experts(const at::Tensor& x_md, const ExpertRoute& route, const Group& group);
// ... and their results back, sorted by copy again.
at::Tensor rows_from_experts(const at::Tensor& y_md, const ExpertRoute& route, const Group& group);

}  // namespace tessera
