// Multi-token prediction: pass n joins the previous pass's result with the embeddings n tokens ahead, runs an inner stack and predicts
// the token n + 1 ahead through the shared lm_head.
// Letters: N tokens, D hidden.
#include <ATen/ops/cat.h>
#include <fmt/format.h>

#include "layers/linear.hpp"
#include "layers/norm.hpp"
#include "tessera/plugin.hpp"

namespace tessera {

class Mtp final : public Head {
 public:
  static constexpr HeadInfo kInfo{.type = "mtp", .source = "arXiv:2412.19437 (DeepSeek-V3); Megatron-LM multi_token_prediction"};

  struct Config {
    int64_t depths = 1;
    bool repeated = true;
    double loss_scale = 0.1;
  };

  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("depths", &Config::depths, "passes, each of which looks one token further").unit("tokens").range(1, 1024);
    s.field("repeated", &Config::repeated, "one set of weights for all passes").hf({"mtp_use_repeated_layer"});
    s.field("loss_scale", &Config::loss_scale, "factor on the mean over the passes of their losses").range(0).hf({"mtp_loss_scaling_factor"});
    return s;
  }

  // 0.3 is what the published models were trained with; HF's file says neither it nor, with one set of weights, the number of passes.
  static HfTable hf() { return {.set = {{"loss_scale", 0.3}}, .unsaid = {"depths"}}; }

  static void check(const Config&, const Env&, Issues&) {}

  // Of one set of weights.
  static ParamTable params(const Config&, const Env& env) {
    const auto D = env.hidden_size;
    const auto norm = [D](const char* name, const char* hf_name) {
      return Param{.name = name, .shape = {D}, .shards = replicated(), .init = Init::constant(1), .decay = false, .hf_name = hf_name};
    };
    return {
        norm("enorm.weight", "{first}.enorm.weight"),
        norm("hnorm.weight", "{first}.hnorm.weight"),
        {.name = "eh_proj.weight", .shape = {D, 2 * D}, .shards = replicated(), .init = Init::normal(env.init_std),
         .hf_name = "{first}.eh_proj.weight"},
        norm("final_layernorm.weight", "{last}.final_layernorm.weight"),
    };
  }

  // Of one pass, without its inner stack and lm_head.
  static Cost cost(const Config&, const Env& env, const Documents& documents) {
    const double N = static_cast<double>(num_tokens(documents)), D = env.hidden_size;
    return {.matmul = 4 * N * D * D, .elementwise = 12 * N * D, .bytes = 9 * N * D, .activations = 5 * N * D};
  }

  static std::vector<HeadPass> passes(const Config& c) {
    std::vector<HeadPass> list;
    const double share = 1.0 / static_cast<double>(c.depths);
    for (int64_t n = 1; n <= c.depths; ++n)
      list.push_back({.shift = n, .offset = n + 1, .weight_set = c.repeated ? 0 : n - 1, .loss_weight = c.loss_scale * share,
                      .aux_weight = c.repeated ? share : 1.0, .name = fmt::format("mtp.{}", n)});
    return list;
  }

  Mtp(const Config&, const Env& env) : eps_(env.norm_eps) {}

  at::Tensor before(const at::Tensor& hidden_nd, const at::Tensor& embedded_nd, const Weights& w, Context& ctx) const override {
    const auto& eh_proj = w["eh_proj.weight"];
    const auto dtype = eh_proj.tensor().scalar_type();
    const auto joined_n2d = at::cat({rms_norm(embedded_nd, w["enorm.weight"].tensor(), eps_, dtype),
                                     rms_norm(hidden_nd, w["hnorm.weight"].tensor(), eps_, dtype)}, 1);
    return linear(ctx, joined_n2d, eh_proj);
  }

  at::Tensor after(const at::Tensor& x_nd, const Weights& w, Context&) const override {
    return rms_norm(x_nd, w["final_layernorm.weight"].tensor(), eps_, w["eh_proj.weight"].tensor().scalar_type());
  }

 private:
  double eps_;
};

}  // namespace tessera

TESSERA_PLUGIN(tessera::Mtp)
