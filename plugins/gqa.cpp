// Causal softmax attention with grouped key and value heads, no positional encoding unless asked for.
// Letters: N tokens, D hidden, H query heads, K kv heads, P head dim.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "layers/attention.hpp"
#include "layers/linear.hpp"
#include "layers/nearest.hpp"
#include "layers/norm.hpp"
#include "layers/rope.hpp"
#include "tessera/plugin.hpp"

namespace tessera {

class Gqa final : public Block {
 public:
  static constexpr BlockInfo kInfo{.type = "gqa", .symbols = {{"card", '*'}, {"nemotron", '*'}}, .takes_pieces = true, .source = "arXiv:2305.13245"};

  struct Config {
    int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
    bool bias = false;
    double rope_theta = 0;
    bool qk_norm = false;
    int64_t sliding_window = 0;
  };

  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("num_heads", &Config::num_heads, "query heads").required().range(1).hf({"num_attention_heads"});
    s.field("num_kv_heads", &Config::num_kv_heads, "key and value heads, each read by num_heads / num_kv_heads query heads")
        .required().range(1).hf({"num_key_value_heads"});
    s.field("head_dim", &Config::head_dim, "width of a head").required().range(1).hf({"head_dim", "attention_head_dim"});
    s.field("bias", &Config::bias, "adds a bias to the four matrices");
    s.field("rope_theta", &Config::rope_theta, "base of the rotary position embedding; 0: none").range(0).source("arXiv:2104.09864");
    s.field("qk_norm", &Config::qk_norm, "RMSNorm over each query and key head").source("arXiv:2302.05442");
    s.field("sliding_window", &Config::sliding_window, "tokens that a token sees, itself included; 0: all before it").unit("tokens").range(0);
    return s;
  }

  static HfTable hf() {
    return {.layer_words = {"attention", "full_attention"},
            .inert = {"max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"},
            .must_be = {{"attention_bias", false}, {"sliding_window", int64_t{0}}, {"attention_dropout", 0.0}, {"hidden_dropout", 0.0}}};
  }

  static void check(const Config& c, const Env& env, Issues& issues) {
    if (c.num_kv_heads > 0 && c.num_heads % c.num_kv_heads != 0) {
      const auto below = std::max<int64_t>(1, c.num_heads / c.num_kv_heads) * c.num_kv_heads;
      issues.add("num_heads", fmt::format("must be a multiple of num_kv_heads, got {} % {} = {}", c.num_heads, c.num_kv_heads,
                                          c.num_heads % c.num_kv_heads),
                 c.num_heads < c.num_kv_heads ? fmt::format("nearest: {}", below) : fmt::format("nearest: {}, {}", below, below + c.num_kv_heads));
    }
    const int64_t tp = std::max<int64_t>(1, env.mesh.tp), H = c.num_heads, K = std::max<int64_t>(1, c.num_kv_heads);
    const auto shared = [tp](int64_t kv_heads) { return kv_heads % tp == 0 || tp % kv_heads == 0; };
    if (H % tp != 0)
      issues.add("num_heads", fmt::format("must be a multiple of the tensor-parallel degree, got {} % {} = {}", H, tp, H % tp),
                 nearest_legal(H, [&](int64_t heads) { return heads % tp == 0 && heads % K == 0; }));
    if (!shared(K))
      issues.add("num_kv_heads", fmt::format("must be a multiple of the tensor-parallel degree or divide it, got {} % {} = {}", std::max(K, tp), std::min(K, tp),
                                             std::max(K, tp) % std::min(K, tp)),
                 nearest_legal(K, [&](int64_t kv_heads) { return H % kv_heads == 0 && shared(kv_heads); }));
    if (c.rope_theta > 0 && c.head_dim % 2 != 0)
      issues.add("head_dim", fmt::format("must be even with rope_theta, got {}", c.head_dim), fmt::format("nearest: {}, {}", c.head_dim - 1, c.head_dim + 1));
  }

  static ParamTable params(const Config& c, const Env& env) {
    const auto D = env.hidden_size, P = c.head_dim, Q = c.num_heads * P, KV = c.num_kv_heads * P;
    const double out_std = env.init_std / std::sqrt(static_cast<double>(env.num_layers));
    const Init normal = Init::normal(env.init_std);
    const std::vector<Shard> heads{{Axis::kTensor, 0, P}};
    ParamTable table{
        {.name = "q_proj.weight", .shape = {Q, D}, .shards = heads, .init = normal},
        {.name = "k_proj.weight", .shape = {KV, D}, .shards = heads, .init = normal},
        {.name = "v_proj.weight", .shape = {KV, D}, .shards = heads, .init = normal},
        {.name = "o_proj.weight", .shape = {D, Q}, .shards = {{Axis::kTensor, 1, P}}, .init = Init::normal(out_std)},
    };
    if (c.bias) {
      const Init zero = Init::constant(0);
      table.push_back({.name = "q_proj.bias", .shape = {Q}, .shards = heads, .init = zero, .decay = false});
      table.push_back({.name = "k_proj.bias", .shape = {KV}, .shards = heads, .init = zero, .decay = false});
      table.push_back({.name = "v_proj.bias", .shape = {KV}, .shards = heads, .init = zero, .decay = false});
      table.push_back({.name = "o_proj.bias", .shape = {D}, .shards = replicated(), .init = zero, .decay = false});
    }
    if (c.qk_norm) {
      table.push_back({.name = "q_norm.weight", .shape = {P}, .shards = replicated(), .init = Init::constant(1), .decay = false});
      table.push_back({.name = "k_norm.weight", .shape = {P}, .shards = replicated(), .init = Init::constant(1), .decay = false});
    }
    return table;
  }

  static StateTable state(const Config& c, const Env&) {
    const std::vector<int64_t> shape{c.num_kv_heads, c.head_dim};
    return {{.name = "k", .shape = shape, .per = State::Per::kToken, .shards = {{Axis::kTensor, 0}}},
            {.name = "v", .shape = shape, .per = State::Per::kToken, .shards = {{Axis::kTensor, 0}}}};
  }

  static ExchangeTable exchanges(const Config& c, const Env& env) {
    if (env.mesh.cp == 1) return {};
    const int64_t kv_heads = std::max<int64_t>(1, c.num_kv_heads / env.mesh.tp);
    return {{.name = "keys and values", .over = Exchange::Over::kContext, .form = Exchange::Form::kGather, .elements = 2 * kv_heads * c.head_dim,
             .reach = c.sliding_window > 0 ? c.sliding_window - 1 : -1}};
  }

  // Mixing counts the scores that causality keeps, T (T + 1) / 2 a document: the useful work. The reference composition forms the full
  // square of T^2 and masks it. A window w < T keeps w (w + 1) / 2 + (T - w) w.
  static Cost cost(const Config& c, const Env& env, const Documents& documents) {
    const double N = num_tokens(documents), D = env.hidden_size, P = c.head_dim, Q = c.num_heads * P, KV = c.num_kv_heads * P;
    double pairs = 0;
    for (const auto& run : documents) {
      const double T = run.length, w = c.sliding_window > 0 ? std::min<double>(c.sliding_window, T) : T;
      pairs += run.count * (w * (w + 1) / 2 + (T - w) * w);
    }
    return {.matmul = 2 * N * D * (2 * Q + 2 * KV),
            .mixing = 4 * Q * pairs,
            .elementwise = 5 * c.num_heads * pairs,
            .bytes = N * (4 * D + 4 * Q + 4 * KV),
            .activations = N * (D + 2 * Q + 2 * KV + c.num_heads)};
  }

  Gqa(const Config& c, const Env& env) : c_(c), eps_(env.norm_eps) {}

  at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const override {
    const auto P = c_.head_dim;
    const auto project = [&](const char* weight, const char* bias) {
      const auto y = linear(ctx, x_nd, w[weight], w.find(bias));
      return y.unflatten(1, {y.size(1) / P, P});  // the heads of this rank
    };
    auto q_nhp = project("q_proj.weight", "q_proj.bias"), k_nkp = project("k_proj.weight", "k_proj.bias");
    const auto v_nkp = project("v_proj.weight", "v_proj.bias");
    if (c_.qk_norm) {
      const auto norm = [&](const at::Tensor& t, const char* name) {
        return rms_norm(t.flatten(0, 1), w[name].tensor(), eps_, t.scalar_type()).view(t.sizes());
      };
      q_nhp = norm(q_nhp, "q_norm.weight"), k_nkp = norm(k_nkp, "k_norm.weight");
    }
    if (c_.rope_theta > 0) {
      const auto& positions_n = ctx.spans().positions_n(x_nd.device());
      q_nhp = rope(q_nhp, positions_n, c_.rope_theta), k_nkp = rope(k_nkp, positions_n, c_.rope_theta);
    }
    const auto k_cache = ctx.has_state() ? ctx.state("k") : at::Tensor(), v_cache = ctx.has_state() ? ctx.state("v") : at::Tensor();
    const double scale = 1 / std::sqrt(static_cast<double>(P));
    const auto y_nhp = attention(ctx, q_nhp, k_nkp, v_nkp, scale, c_.sliding_window, k_cache, v_cache);
    ctx.observe("attention_entropy", [&] { return attention_entropy(q_nhp, k_nkp, ctx.spans(), scale, c_.sliding_window, k_cache); });
    return partial_sum_linear(ctx, y_nhp.flatten(1), w["o_proj.weight"], w.find("o_proj.bias"));
  }

 private:
  Config c_;
  double eps_;
};

}  // namespace tessera

TESSERA_PLUGIN(tessera::Gqa)
