// What the blocks with routed experts share: configuration, rows, cost and wiring. `moe` routes and computes on the hidden width,
// `latent_moe` computes on a latent width and may route on it.
// Letters: N tokens, D hidden, R width of the router's input, W width of an expert's input and output, E experts, k experts per token,
// F an expert's inner width.
// Over ranks each has tokens of its own, which it routes itself; gate and latent projections are replicated. Experts are cut by ep and etp, and rows go
// to them over the expert group; the shared experts are cut by tp, and tokens are gathered for them.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>

#include "tessera/block.hpp"

namespace tessera {

// Config of a block derives from it and adds its own keys.
struct MoeConfig {
  int64_t num_experts = 0, top_k = 0, intermediate_size = 0, shared_intermediate_size = 0;
  double scaling = 1;
  bool norm_topk_prob = true;
  int64_t num_groups = 1, topk_group = 1;
  bool bias = false;
  double aux_loss_coeff = 0, z_loss_coeff = 0, bias_update_rate = 1e-3;
};

template <class Config>
void add_moe_fields(Schema<Config>& s) {
  const auto integer = [&s](const char* key, int64_t Config::*member, const char* doc) -> Field& { return s.field(key, member, doc); };
  const auto number = [&s](const char* key, double Config::*member, const char* doc) -> Field& { return s.field(key, member, doc); };
  const auto boolean = [&s](const char* key, bool Config::*member, const char* doc) -> Field& { return s.field(key, member, doc); };
  integer("num_experts", &Config::num_experts, "routed experts").required().range(1).hf({"n_routed_experts", "num_local_experts"});
  integer("top_k", &Config::top_k, "experts that a token is sent to").required().range(1).hf({"num_experts_per_tok"});
  integer("intermediate_size", &Config::intermediate_size, "width between the two matrices of a routed expert").required().range(1)
      .hf({"moe_intermediate_size"});
  integer("shared_intermediate_size", &Config::shared_intermediate_size,
          "width between the two matrices of the shared experts, which every token passes; 0: none").range(0)
      .hf({"moe_shared_expert_intermediate_size"});
  number("scaling", &Config::scaling, "factor on the weights of the chosen experts").above(0).hf({"routed_scaling_factor"});
  boolean("norm_topk_prob", &Config::norm_topk_prob, "divides the weights of a token's experts by their sum").hf({"norm_topk_prob"});
  integer("num_groups", &Config::num_groups, "groups that the experts are chosen by; 1: all compete").range(1).hf({"n_group"})
      .source("DeepSeek-V3, arXiv:2412.19437");
  integer("topk_group", &Config::topk_group, "groups kept for a token, by the sum of their two best scores").range(1).hf({"topk_group"});
  boolean("bias", &Config::bias, "adds a bias to the matrices outside the routed experts").hf({"mlp_bias"});
  number("aux_loss_coeff", &Config::aux_loss_coeff, "coefficient of the balance loss within a document; 0: off").range(0)
      .source("DeepSeek-V3, arXiv:2412.19437, eq. 17-20");
  number("z_loss_coeff", &Config::z_loss_coeff, "coefficient of the squared log-sum-exp of the router's logits; 0: off").range(0)
      .source("ST-MoE, arXiv:2202.08906, eq. 5");
  number("bias_update_rate", &Config::bias_update_rate, "step of the router's bias after each optimizer step; 0 freezes it").range(0)
      .source("arXiv:2408.15664");
}

HfTable moe_hf();
void check_moe(const MoeConfig& config, const Env& env, Issues& issues);
ParamTable moe_params(const MoeConfig& config, const Env& env, int64_t router_width, int64_t expert_width);
BufferTable moe_buffers(const MoeConfig& config);
ExchangeTable moe_exchanges(const MoeConfig& config, const Env& env, int64_t expert_width);
Cost moe_cost(const MoeConfig& config, const Env& env, double num_tokens, int64_t router_width, int64_t expert_width);
// Moves the router's bias towards balance by the global batch's "expert_load".
void moe_after_step(const MoeConfig& config, Buffers& buffers, const Counts& counts);

// sum_k w_k expert_k(x): router_input_nr [N, R], x_nw [N, W] -> [N, W]. Chooses once, reports losses and "expert_load" of its own tokens in training.
// Exchanges over the expert group, and for the balance loss over the sequence group, also where N = 0.
at::Tensor routed_experts(Context& ctx, const at::Tensor& router_input_nr, const at::Tensor& x_nw, const Weights& w, const MoeConfig& config);
// routed_nd + shared_experts(x_nd), or routed_nd where there are none: [N, D].
at::Tensor add_shared_experts(Context& ctx, const at::Tensor& routed_nd, const at::Tensor& x_nd, const Weights& w, const MoeConfig& config);

// The divisors of `value` up to `limit` on either side of `wanted`, as a help text: "nearest: 4, 6".
std::string nearest_divisors(int64_t value, int64_t wanted, int64_t limit);

}  // namespace tessera
