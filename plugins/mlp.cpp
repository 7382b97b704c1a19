// The squared-ReLU feed-forward block: y = down_proj(relu(up_proj(x))^2), no gate.
// Letters: N tokens, D hidden, F intermediate width.
#include <cmath>

#include "layers/activation.hpp"
#include "layers/linear.hpp"
#include "tessera/plugin.hpp"

namespace tessera {

class Mlp final : public Block {
 public:
  static constexpr BlockInfo kInfo{
      .type = "mlp", .symbols = {{"card", 'E'}, {"nemotron", '-'}}, .takes_pieces = true, .source = "arXiv:2109.08668 (squared ReLU); arXiv:2504.03624 (Nemotron-H)"};

  struct Config {
    int64_t intermediate_size = 0;
    bool bias = false;
  };

  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("intermediate_size", &Config::intermediate_size, "width between the two matrices").required().range(1).hf({"intermediate_size"});
    s.field("bias", &Config::bias, "adds a bias to both matrices").hf({"mlp_bias"});
    return s;
  }

  static HfTable hf() { return {.layer_words = {"mlp"}, .must_be = {{"mlp_hidden_act", std::string("relu2")}}}; }

  static void check(const Config&, const Env&, Issues&) {}

  static ParamTable params(const Config& c, const Env& env) {
    const auto D = env.hidden_size, F = c.intermediate_size;
    const double out_std = env.init_std / std::sqrt(static_cast<double>(env.num_layers));
    ParamTable table{
        {.name = "up_proj.weight", .shape = {F, D}, .shards = {{Axis::kTensor, 0}}, .init = Init::normal(env.init_std)},
        {.name = "down_proj.weight", .shape = {D, F}, .shards = {{Axis::kTensor, 1}}, .init = Init::normal(out_std)},
    };
    if (c.bias) {
      table.push_back({.name = "up_proj.bias", .shape = {F}, .shards = {{Axis::kTensor, 0}}, .init = Init::constant(0), .decay = false});
      table.push_back({.name = "down_proj.bias", .shape = {D}, .shards = replicated(), .init = Init::constant(0), .decay = false});
    }
    return table;
  }

  static Cost cost(const Config& c, const Env& env, const Documents& documents) {
    const double N = num_tokens(documents), D = env.hidden_size, F = c.intermediate_size;
    return {.matmul = 4 * N * D * F, .elementwise = 2 * N * F, .bytes = N * (2 * D + 4 * F), .activations = N * (D + 2 * F)};
  }

  Mlp(const Config&, const Env&) {}

  at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const override {
    const auto h_nf = relu2(linear(ctx, x_nd, w["up_proj.weight"], w.find("up_proj.bias")));
    return partial_sum_linear(ctx, h_nf, w["down_proj.weight"], w.find("down_proj.bias"));
  }
};

}  // namespace tessera

TESSERA_PLUGIN(tessera::Mlp)
