// SwigluMlp: the gated feed-forward block, y = down_proj(silu(gate x) * (up x)); gate and up are one matrix.
// Letters: N tokens, D hidden, F intermediate width.
#include <ATen/ops/silu.h>

#include <cmath>

#include "layers/linear.hpp"
#include "tessera/plugin.hpp"

namespace {

using namespace tessera;

class SwigluMlp final : public Block {
 public:
  static constexpr BlockInfo kInfo{.type = "swiglu_mlp", .symbols = {{"card", 'U'}}, .source = "arXiv:2002.05202"};

  struct Config {
    int64_t intermediate_size = 0;
  };

  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("intermediate_size", &Config::intermediate_size, "width of the gate and of what it gates").required().range(1);
    return s;
  }

  static void check(const Config&, const Env&, Issues&) {}

  static ParamTable params(const Config& c, const Env& env) {
    const int64_t D = env.hidden_size, F = c.intermediate_size;
    const double out_std = env.init_std / std::sqrt(static_cast<double>(env.num_layers));
    return {
        {.name = "gate_up_proj.weight", .shape = {2 * F, D}, .shards = {{Axis::kTensor, 0}}, .segments = {{"gate", F}, {"up", F}},
         .init = Init::normal(env.init_std)},
        {.name = "down_proj.weight", .shape = {D, F}, .shards = {{Axis::kTensor, 1}}, .init = Init::normal(out_std)},
    };
  }

  static Cost cost(const Config& c, const Env& env, const Documents& documents) {
    const double N = num_tokens(documents), D = env.hidden_size, F = c.intermediate_size;
    return {.matmul = 6 * N * D * F, .elementwise = 6 * N * F, .bytes = N * (2 * D + 8 * F), .activations = N * (D + 4 * F)};
  }

  SwigluMlp(const Config&, const Env&) {}

  at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const override {
    const auto gate_up = linear(ctx, x_nd, w["gate_up_proj.weight"]).chunk(2, 1);  // [N, F] each, this rank's share of F
    return partial_sum_linear(ctx, at::silu(gate_up[0]).mul(gate_up[1]), w["down_proj.weight"]);
  }
};

}  // namespace

TESSERA_PLUGIN(SwigluMlp)
