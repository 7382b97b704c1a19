// The sigmoid router of a mixture of experts: choice, weights, auxiliary losses, load statistics and bias update.
// Letters: N tokens, D hidden, E experts, k experts per token, G groups of E/G experts.
// Scores and logits are fp32 (fp64 where the block runs in fp64). Shapes that do not fit throw Error(kRuntime).
// Source: HF transformers models/nemotron_h (choice, weights); Megatron-LM core/transformer/moe (losses, bias update), from which we
// differ in two points: a group's rank is the sum of its two best scores whatever k is, and documents of a pack count one by one.
#pragma once
#include <ATen/core/Tensor.h>

#include "tessera/context.hpp"
#include "tessera/ranks.hpp"
#include "tessera/spans.hpp"
#include "tessera/weights.hpp"

namespace tessera {

// x_nd [N, D] in any dtype, gate [E, D] from a row that stays fp32 -> [N, E], the product in the gate's dtype.
at::Tensor router_logits(Context& ctx, const at::Tensor& x_nd, const Weight& gate_ed);

// The k best experts of every token by scores_ne [N, E] + bias_e [E] (undefined: none) -> int64 [N, k], ascending in a row, no gradient.
// Ties go to the lower index, among groups too. With num_groups > 1 only experts of the topk_group groups with the greatest sum of
// two best biased scores compete; needs E % G == 0, E/G >= 2, topk_group * E/G >= k.
at::Tensor choose_experts(const at::Tensor& scores_ne, const at::Tensor& bias_e, int64_t k, int64_t num_groups = 1, int64_t topk_group = 1);
// By stable sorts, on any device.
at::Tensor choose_experts_ref(const at::Tensor& scores_ne, const at::Tensor& bias_e, int64_t k, int64_t num_groups = 1, int64_t topk_group = 1);

// Choices for measurements, as even as can be: token i of number_n, int64 [N], goes to the experts (i * k + j) mod E, j in [0, k) -> int64 [N, k], ascending in
// a row. Over tokens of consecutive numbers the loads of any two experts differ by one at most, on whatever rank the tokens are.
at::Tensor even_experts(const at::Tensor& number_n, int64_t k, int64_t num_experts);

// Weights of the chosen experts from the unbiased scores, s / (sum of the chosen s + 1e-20) where normed, times `scaling` -> [N, k].
at::Tensor expert_weights(const at::Tensor& scores_ne, const at::Tensor& indices_nk, bool norm_topk_prob, double scaling);

// The scores sigmoid(logits) of a router's experts, or, where kernels take them, the logits that they make them of.
struct RouterScores {
  at::Tensor logits_ne;
  at::Tensor scores_ne;  // undefined there
};
RouterScores router_scores(const at::Tensor& logits_ne);
// As above; a token's experts are distinct.
at::Tensor choose_experts(const RouterScores& scores, const at::Tensor& bias_e, int64_t k, int64_t num_groups = 1, int64_t topk_group = 1);
at::Tensor expert_weights(const RouterScores& scores, const at::Tensor& indices_nk, bool norm_topk_prob, double scaling);

// Sum over the documents that have a valid token of E/(k T^2) sum_e P_e c_e -> []: T valid tokens of the document, P_e their sum of
// s_e / (sum(s) + 1e-20), c_e how many have e in the plain top-k of s = sigmoid(logits): no bias, no groups. Differentiable.
// A document is every span of one document number; valid_n bool [N], undefined: all. Source: DeepSeek-V3, arXiv:2412.19437, eq. 17-20.
// With a group, whose ranks hold tokens of the same documents under the same numbers: T and c are over the documents' tokens on all ranks, P over this
// rank's, so that the ranks' results add up to the loss and each counts its own tokens. Exchanges a table of [greatest number + 1, E + 1].
at::Tensor seq_aux_loss(const at::Tensor& logits_ne, const Spans& spans, const at::Tensor& valid_n, int64_t k, const Group* sequence = nullptr);
// The same, document by document as the formula is written.
at::Tensor seq_aux_loss_ref(const at::Tensor& logits_ne, const Spans& spans, const at::Tensor& valid_n, int64_t k);

// Sum over valid tokens of logsumexp(logits)^2 -> []. Differentiable. Source: ST-MoE, arXiv:2202.08906, eq. 5.
at::Tensor router_z_loss(const at::Tensor& logits_ne, const at::Tensor& valid_n);

// How often the valid tokens chose each expert -> fp32 [E]. Exact up to 2^24 choices.
at::Tensor expert_counts(const at::Tensor& indices_nk, const at::Tensor& valid_n, int64_t num_experts);

// bias_e += rate * sign(mean(counts) - counts) in place, sign(0) = 0. Source: Wang et al., arXiv:2408.15664.
void update_router_bias(at::Tensor& bias_e, const at::Tensor& counts_e, double rate);

}  // namespace tessera
