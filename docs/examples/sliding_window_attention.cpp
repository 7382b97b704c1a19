// SlidingWindowAttention: causal attention over the last `window` tokens, grouped key and value heads, rotary positions.
//   y = out_proj(softmax(q k^T / sqrt(P)) v), q and k turned by their position; token t sees tokens t - window + 1 to t of its document.
// Letters: N tokens, D hidden, H query heads, K key and value heads, P channels of a head.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "layers/attention.hpp"
#include "layers/linear.hpp"
#include "layers/rope.hpp"
#include "tessera/plugin.hpp"

namespace {

using namespace tessera;

class SlidingWindowAttention final : public Block {
 public:
  static constexpr BlockInfo kInfo{
      .type = "sliding_window_attention", .symbols = {{"card", 'W'}}, .source = "arXiv:2004.05150 (window); arXiv:2310.06825 (with grouped heads)"};

  struct Config {
    int64_t num_heads = 0, num_kv_heads = 0, head_dim = 64, window = 0;
    double rope_theta = 1e4;
  };

  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("num_heads", &Config::num_heads, "query heads").required().range(1);
    s.field("num_kv_heads", &Config::num_kv_heads, "key and value heads, each read by num_heads / num_kv_heads query heads").required().range(1);
    s.field("head_dim", &Config::head_dim, "channels of a head").range(2);
    s.field("window", &Config::window, "tokens that a token sees, itself included").unit("tokens").required().range(1);
    s.field("rope_theta", &Config::rope_theta, "base of the rotary position embedding").above(0).source("arXiv:2104.09864");
    return s;
  }

  static void check(const Config& c, const Env& env, Issues& issues) {
    const auto multiple = [&](const char* key, int64_t value, const char* of, int64_t unit) {
      if (unit > 0 && value % unit != 0) issues.add(key, fmt::format("must be a multiple of {}, got {} % {} = {}", of, value, unit, value % unit));
    };
    multiple("num_heads", c.num_heads, "num_kv_heads", c.num_kv_heads);
    multiple("num_heads", c.num_heads, "the tensor-parallel degree", env.mesh.tp);
    multiple("head_dim", c.head_dim, "two, the channels that are turned together", 2);
  }

  // A rank holds whole heads. Ranks beyond the number of key and value heads share one.
  static ParamTable params(const Config& c, const Env& env) {
    const int64_t D = env.hidden_size, P = c.head_dim, Q = c.num_heads * P, KV = c.num_kv_heads * P;
    const double out_std = env.init_std / std::sqrt(static_cast<double>(env.num_layers));
    return {
        {.name = "q_proj.weight", .shape = {Q, D}, .shards = {{Axis::kTensor, 0, P}}, .init = Init::normal(env.init_std)},
        {.name = "kv_proj.weight", .shape = {2 * KV, D}, .shards = {{Axis::kTensor, 0}}, .segments = {{"k", KV, P}, {"v", KV, P}},
         .init = Init::normal(env.init_std)},
        {.name = "out_proj.weight", .shape = {D, Q}, .shards = {{Axis::kTensor, 1, P}}, .init = Init::normal(out_std)},
    };
  }

  static StateTable state(const Config& c, const Env&) {
    const std::vector<int64_t> shape{c.num_kv_heads, c.head_dim};
    return {{.name = "k", .shape = shape, .per = State::Per::kToken, .shards = {{Axis::kTensor, 0}}},
            {.name = "v", .shape = shape, .per = State::Per::kToken, .shards = {{Axis::kTensor, 0}}}};
  }

  static Cost cost(const Config& c, const Env& env, const Documents& documents) {
    const double N = num_tokens(documents), D = env.hidden_size, H = c.num_heads, P = c.head_dim, KV = c.num_kv_heads * P;
    double pairs = 0;  // of a token and one that it sees: t for the first tokens of a document, then the window
    for (const auto& run : documents) {
      const double T = run.length, w = std::min<double>(c.window, T);
      pairs += run.count * (w * (w + 1) / 2 + (T - w) * w);
    }
    return {.matmul = 2 * N * D * (2 * H * P + 2 * KV),
            .mixing = 4 * H * P * pairs,
            .elementwise = 5 * H * pairs + 6 * N * (H * P + KV),
            .bytes = N * (2 * D + 8 * (H * P + KV)),
            .activations = N * (D + 2 * (H * P + KV) + H)};
  }

  SlidingWindowAttention(const Config& c, const Env&) : c_(c) {}

  at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const override {
    const int64_t N = x_nd.size(0), P = c_.head_dim;
    const at::Tensor &positions_n = ctx.spans().positions_n(x_nd.device()), none;
    const auto kv = linear(ctx, x_nd, w["kv_proj.weight"]).chunk(2, 1);
    const at::Tensor q_nhp = rope(linear(ctx, x_nd, w["q_proj.weight"]).view({N, -1, P}), positions_n, c_.rope_theta);  // the heads of this rank
    const at::Tensor k_nkp = rope(kv[0].view({N, -1, P}), positions_n, c_.rope_theta), v_nkp = kv[1].view({N, -1, P});
    const at::Tensor y_nhp = attention(q_nhp, k_nkp, v_nkp, ctx.spans(), 1 / std::sqrt(static_cast<double>(P)), c_.window,
                                       ctx.has_state() ? ctx.state("k") : none, ctx.has_state() ? ctx.state("v") : none);
    return partial_sum_linear(ctx, y_nhp.flatten(1), w["out_proj.weight"]);
  }

 private:
  Config c_;
};

}  // namespace

TESSERA_PLUGIN(SlidingWindowAttention)
