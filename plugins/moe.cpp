// Mixture of experts: a sigmoid router sends every token to k of E squared-ReLU experts; shared experts see every token.
// Letters: N tokens, D hidden.
#include "layers/moe_common.hpp"
#include "tessera/plugin.hpp"

namespace tessera {

class Moe final : public Block {
 public:
  static constexpr BlockInfo kInfo{
      .type = "moe",
      .symbols = {{"card", 'O'}, {"nemotron", 'E'}},
      .input = Layout::kSequenceShard,
      .output = Layout::kSequenceShard,
      .takes_pieces = true,
      .source = "arXiv:2412.19437 (DeepSeek-V3); HF models/nemotron_h"};

  struct Config : MoeConfig {};

  static Schema<Config> schema() {
    Schema<Config> s;
    add_moe_fields(s);
    return s;
  }

  static HfTable hf() {
    auto table = moe_hf();
    table.inert.push_back("moe_latent_size");  // null wherever this block is meant
    return table;
  }

  static void check(const Config& c, const Env& env, Issues& issues) { check_moe(c, env, issues); }
  static ParamTable params(const Config& c, const Env& env) { return moe_params(c, env, env.hidden_size, env.hidden_size); }
  static BufferTable buffers(const Config& c, const Env&) { return moe_buffers(c); }
  static ExchangeTable exchanges(const Config& c, const Env& env) { return moe_exchanges(c, env, env.hidden_size); }
  static Cost cost(const Config& c, const Env& env, const Documents& documents) {
    return moe_cost(c, env, static_cast<double>(num_tokens(documents)), env.hidden_size, env.hidden_size);
  }
  static void after_step(const Config& c, Buffers& buffers, const Counts& counts) { moe_after_step(c, buffers, counts); }

  Moe(const Config& config, const Env&) : config_(config) {}

  at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const override {
    return add_shared_experts(ctx, routed_experts(ctx, x_nd, x_nd, w, config_), x_nd, w, config_);
  }

 private:
  MoeConfig config_;
};

}  // namespace tessera

TESSERA_PLUGIN(tessera::Moe)
