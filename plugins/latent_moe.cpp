// Mixture of experts in a latent space: tokens are projected to width L, experts work there, and the weighted sum is projected back.
// Dispatch traffic and the experts' weights shrink by D / L; the shared experts stay on the full width.
// Letters: N tokens, D hidden, L latent.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "layers/linear.hpp"
#include "layers/moe_common.hpp"
#include "tessera/plugin.hpp"

namespace tessera {

class LatentMoe final : public Block {
 public:
  static constexpr BlockInfo kInfo{.type = "latent_moe",
                                   .symbols = {{"card", 'L'}, {"nemotron", 'E', "moe_latent_size"}},
                                   .input = Layout::kSequenceShard,
                                   .output = Layout::kSequenceShard,
                                   .takes_pieces = true,
                                   .source = "arXiv:2601.18089 (LatentMoE); HF models/nemotron_h"};

  struct Config : MoeConfig {
    int64_t latent_size = 0;
    std::string router_input = "latent";
    std::string match;
  };

  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("latent_size", &Config::latent_size, "width of the space that the experts work in").required().range(1).hf({"moe_latent_size"});
    s.field("router_input", &Config::router_input, "what the router reads: the latent or the block's whole input").choices({"latent", "hidden"});
    s.field("match", &Config::match,
            "\"moe\": num_experts and top_k are those of a moe of equal traffic, and are multiplied by hidden_size / latent_size")
        .choices({"", "moe"});
    add_moe_fields(s);
    return s;
  }

  static HfTable hf() {
    auto table = moe_hf();
    table.set = {{"router_input", std::string("hidden")}, {"match", std::string()}};
    return table;
  }

  static void check(const Config& c, const Env& env, Issues& issues) {
    const auto D = env.hidden_size, L = c.latent_size;
    if (c.match == "moe" && D % L)
      issues.add("latent_size", fmt::format("must divide hidden_size where match = \"moe\", got {} % {} = {}", D, L, D % L), nearest_divisors(D, L, D));
    check_moe(matched(c, env), env, issues);
  }

  static ParamTable params(const Config& c, const Env& env) {
    const auto D = env.hidden_size, L = c.latent_size;
    auto table = moe_params(matched(c, env), env, router_width(c, env), L);
    const double out_std = env.init_std / std::sqrt(static_cast<double>(env.num_layers));
    table.push_back({.name = "fc1_latent_proj.weight", .shape = {L, D}, .shards = replicated(), .init = Init::normal(env.init_std)});
    table.push_back({.name = "fc2_latent_proj.weight", .shape = {D, L}, .shards = replicated(), .init = Init::normal(out_std)});
    if (c.bias) {
      table.push_back({.name = "fc1_latent_proj.bias", .shape = {L}, .shards = replicated(), .init = Init::constant(0), .decay = false});
      table.push_back({.name = "fc2_latent_proj.bias", .shape = {D}, .shards = replicated(), .init = Init::constant(0), .decay = false});
    }
    return table;
  }

  static BufferTable buffers(const Config& c, const Env& env) { return moe_buffers(matched(c, env)); }

  static ExchangeTable exchanges(const Config& c, const Env& env) { return moe_exchanges(matched(c, env), env, c.latent_size); }

  static Cost cost(const Config& c, const Env& env, const Documents& documents) {
    const double N = static_cast<double>(num_tokens(documents)), D = env.hidden_size, L = c.latent_size;
    auto cost = moe_cost(matched(c, env), env, N, router_width(c, env), c.latent_size);
    cost += {.matmul = 4 * N * D * L, .bytes = N * (2 * D + 4 * L), .activations = N * L};
    return cost;
  }

  static void after_step(const Config& c, Buffers& buffers, const Counts& counts) { moe_after_step(c, buffers, counts); }

  LatentMoe(const Config& config, const Env& env) : config_(matched(config, env)), routes_on_latent_(config.router_input == "latent") {}

  at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const override {
    const auto z_nl = linear(ctx, x_nd, w["fc1_latent_proj.weight"], w.find("fc1_latent_proj.bias"));
    const auto routed_nl = routed_experts(ctx, routes_on_latent_ ? z_nl : x_nd, z_nl, w, config_);
    const auto routed_nd = linear(ctx, routed_nl, w["fc2_latent_proj.weight"], w.find("fc2_latent_proj.bias"));
    return add_shared_experts(ctx, routed_nd, x_nd, w, config_);
  }

 private:
  static int64_t router_width(const Config& c, const Env& env) { return c.router_input == "latent" ? c.latent_size : env.hidden_size; }

  static MoeConfig matched(const Config& c, const Env& env) {
    MoeConfig result = c;
    if (c.match != "moe") return result;
    const auto ratio = std::max<int64_t>(1, env.hidden_size / c.latent_size);
    result.num_experts *= ratio, result.top_k *= ratio;
    return result;
  }

  MoeConfig config_;
  bool routes_on_latent_;
};

}  // namespace tessera

TESSERA_PLUGIN(tessera::LatentMoe)
