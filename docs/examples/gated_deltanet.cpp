// GatedDeltaNet: a state that forgets by a gate alpha and is corrected along each key by a rate beta.
//   S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,   o_t = S_t q_t,   y = out_proj(norm(o) * silu(g))
// Letters: N tokens, D hidden, H heads with K key and V value channels, C = H (2 K + V) convolved channels; S spans,
// chunks of Q tokens, B pairs of chunk and head.
#include <ATen/ops/cat.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "layers/chunks.hpp"
#include "layers/conv.hpp"
#include "layers/linear.hpp"
#include "layers/norm.hpp"
#include "tessera/plugin.hpp"

namespace {

using namespace tessera;

class GatedDeltaNet final : public Block {
 public:
  static constexpr BlockInfo kInfo{.type = "gated_deltanet", .symbols = {{"card", 'G'}}, .source = "arXiv:2412.06464"};

  struct Config {
    int64_t num_heads = 0, key_dim = 64, value_dim = 64, conv_width = 4, chunk = 64;
  };

  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("num_heads", &Config::num_heads, "heads, each with a state of its own").required().range(1);
    s.field("key_dim", &Config::key_dim, "channels of a head's queries and keys").range(1);
    s.field("value_dim", &Config::value_dim, "channels of a head's values").range(1);
    s.field("conv_width", &Config::conv_width, "tokens that the convolution sees").unit("tokens").range(2);
    s.field("chunk", &Config::chunk, "tokens handled at once; changes speed and rounding only").unit("tokens").range(1, 4096);
    return s;
  }

  static void check(const Config& c, const Env& env, Issues& issues) {
    if (c.num_heads % env.mesh.tp != 0)
      issues.add("num_heads", fmt::format("must be a multiple of the tensor-parallel degree, got {} % {} = {}", c.num_heads, env.mesh.tp,
                                          c.num_heads % env.mesh.tp));
  }

  static ParamTable params(const Config& c, const Env& env) {
    const int64_t D = env.hidden_size, H = c.num_heads, K = c.key_dim, V = c.value_dim, C = H * (2 * K + V);
    const Segment q{"q", H * K, K}, k{"k", H * K, K}, v{"v", H * V, V};
    const std::vector<Shard> rows{{Axis::kTensor, 0}};
    const double out_std = env.init_std / std::sqrt(static_cast<double>(env.num_layers)), reach = 1 / std::sqrt(static_cast<double>(c.conv_width));
    const auto log = [](double a) { return std::log(a); };
    const auto dt_bias = [](double log_dt) { return std::log(std::expm1(std::exp(log_dt))); };  // softplus of it is dt
    return {
        {.name = "in_proj.weight", .shape = {C + H * V + 2 * H, D}, .shards = rows, .segments = {q, k, v, {"g", H * V, V}, {"beta", H}, {"dt", H}},
         .init = Init::normal(env.init_std)},
        {.name = "conv1d.weight", .shape = {C, 1, c.conv_width}, .shards = rows, .segments = {q, k, v}, .init = Init::uniform(-reach, reach)},
        {.name = "dt_bias", .shape = {H}, .shards = rows, .init = Init::uniform(std::log(1e-3), std::log(1e-1), dt_bias), .decay = false, .fp32 = true},
        {.name = "A_log", .shape = {H}, .shards = rows, .init = Init::uniform(1, 16, log), .decay = false, .fp32 = true},
        {.name = "norm.weight", .shape = {V}, .shards = replicated(), .init = Init::constant(1), .decay = false},
        {.name = "out_proj.weight", .shape = {D, H * V}, .shards = {{Axis::kTensor, 1, V}}, .init = Init::normal(out_std)},
    };
  }

  static StateTable state(const Config& c, const Env&) {
    return {{.name = "memory", .shape = {c.num_heads, c.key_dim, c.value_dim}, .fp32 = true, .shards = {{Axis::kTensor, 0}}},
            {.name = "conv", .shape = {c.num_heads * (2 * c.key_dim + c.value_dim), c.conv_width - 1}, .shards = {{Axis::kTensor, 0}}}};
  }

  static Cost cost(const Config& c, const Env& env, const Documents& documents) {
    const double N = num_tokens(documents), D = env.hidden_size, H = c.num_heads, K = c.key_dim, V = c.value_dim, C = H * (2 * K + V);
    int64_t longest = 1, chunks = 0;
    for (const auto& run : documents) longest = std::max(longest, run.length);
    const int64_t per_chunk = std::min(c.chunk, longest);
    for (const auto& run : documents) chunks += run.count * ((run.length + per_chunk - 1) / per_chunk);
    const double B = chunks * H, Q = per_chunk;
    return {.matmul = 2 * N * D * (C + 2 * H * V + 2 * H),
            .mixing = B * (Q * Q * (4 * K + 2 * V) + 6 * Q * K * V),
            .elementwise = N * (C * (2 * c.conv_width + 5) + H * (16 * K + 12 * V)) + B * Q * Q * (8 + K + V),  // the last two: the triangular solve
            .bytes = N * (2 * D + 6 * C + H * (16 * K + 16 * V)) + B * (8 * Q * Q + 6 * K * V),
            .activations = N * (D + 3 * C + H * (6 * K + 8 * V)) + B * (6 * Q * Q + 2 * K * V)};
  }

  GatedDeltaNet(const Config& c, const Env& env) : c_(c), eps_(env.norm_eps) {}

  at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const override {
    const at::ScalarType wide = c10::promoteTypes(x_nd.scalar_type(), at::kFloat);
    const at::Tensor A_log_h = w["A_log"].tensor().to(wide), dt_bias_h = w["dt_bias"].tensor().to(wide);
    const int64_t N = x_nd.size(0), H = A_log_h.size(0), K = c_.key_dim, V = c_.value_dim;  // the heads of this rank
    const auto in = linear(ctx, x_nd, w["in_proj.weight"]).split_with_sizes({H * (2 * K + V), H * V, H, H}, 1);  // q k v, g, beta, dt
    const auto qkv = causal_conv1d(in[0], w["conv1d.weight"].tensor(), {}, ctx.spans(), /*silu=*/true, ctx.has_state() ? ctx.state("conv") : at::Tensor())
                         .to(wide).split_with_sizes({H * K, H * K, H * V}, 1);
    const auto unit = [](const at::Tensor& x) { return x.mul(x.square().sum(-1, /*keepdim=*/true).add(1e-6).rsqrt()); };
    const at::Tensor log_alpha_nh = at::softplus(in[3].to(wide).add(dt_bias_h)).mul(A_log_h.exp().neg());
    const at::Tensor o_nhv = delta_rule(unit(qkv[0].view({N, H, K})), unit(qkv[1].view({N, H, K})), qkv[2].view({N, H, V}), log_alpha_nh.unsqueeze(2),
                                        in[2].to(wide).sigmoid().unsqueeze(2), ctx);
    const at::Tensor normed_ni = rms_norm(o_nhv.view({N * H, V}), w["norm.weight"].tensor(), eps_, x_nd.scalar_type()).view({N, H * V});
    return partial_sum_linear(ctx, normed_ni.mul(at::silu(in[1])), w["out_proj.weight"]);
  }

 private:
  // With c_t the sum of log alpha in a chunk up to t, and Z = S^T [K, V] as it enters, token t writes k_t u_t^T, where
  // u_t = beta_t (v_t - e^{c_t} Z^T k_t - sum_{i<t} e^{c_t - c_i} (k_t . k_i) u_i): a unit triangular system, (I + A) U = beta (v - e^c k Z). Its
  // solutions for v and for e^c k need no Z, so all chunks are solved at once; by substitution, since powers of A reach 1e17 where keys are alike.
  // q, k, v, log alpha, beta: [N, H, K], [N, H, K], [N, H, V], [N, H, 1], [N, H, 1] -> [N, H, V].
  at::Tensor delta_rule(const at::Tensor& q_nhk, const at::Tensor& k_nhk, const at::Tensor& v_nhv, const at::Tensor& log_alpha, const at::Tensor& rate,
                        Context& ctx) const {
    const Chunks chunks(ctx.spans(), c_.chunk, q_nhk.device());
    const int64_t H = q_nhk.size(1), K = q_nhk.size(2), V = v_nhv.size(2), Q = chunks.length(), S = ctx.spans().size();
    const auto chunked = [&](const at::Tensor& x_nhp) { return chunks.split(x_nhp).transpose(1, 2).reshape({-1, Q, x_nhp.size(2)}); };  // [B, Q, P]
    const at::Tensor q = chunked(q_nhk), k = chunked(k_nhk), beta = chunked(rate), c = chunked(log_alpha).cumsum(1), last = c.narrow(1, Q - 1, 1);
    const at::Tensor above = c.new_ones({Q, Q}, at::kBool).triu(1);
    const at::Tensor decay = c.sub(c.transpose(1, 2)).masked_fill(above, -INFINITY).exp();  // [B, Q, Q]: e^{c_t - c_i}, 0 above the diagonal
    const at::Tensor A = k.bmm(k.transpose(1, 2)).mul(decay).mul(beta).tril(-1), right = at::cat({chunked(v_nhv), k.mul(c.exp())}, 2).mul(beta);
    const auto solved = at::linalg_solve_triangular(A, right, /*upper=*/false, /*left=*/true, /*unitriangular=*/true).split_with_sizes({V, K}, 2);

    std::vector<int64_t> sizes;  // of the batch at each place. Splits, no slices: the gradient of a slice is as long as the whole
    for (const int64_t n : chunks.at_place()) sizes.push_back(n * H);
    const auto from_v = solved[0].split_with_sizes(sizes), from_k = solved[1].split_with_sizes(sizes), through = last.exp().split_with_sizes(sizes);
    const auto keys = k.mul(last.sub(c).exp()).transpose(1, 2).split_with_sizes(sizes);
    const at::Tensor spans_s5 = ctx.spans().table(c.device()).to(at::kLong).index_select(0, at::tensor(chunks.order(), at::kLong).to(c.device()));
    const at::Tensor slot_s = spans_s5.select(1, 4), begins_s111 = spans_s5.select(1, 1).eq(0).view({S, 1, 1, 1});
    const at::Tensor memory = ctx.has_state() ? ctx.state("memory") : at::Tensor();  // [slots, H, K, V]
    at::Tensor Z = c.new_zeros({S * H, K, V});
    if (memory.defined()) Z = memory.index_select(0, slot_s).masked_fill(begins_s111, 0).flatten(0, 1).to(c.scalar_type());
    std::vector<at::Tensor> entering, written;
    for (size_t i = 0; i < sizes.size(); ++i) {
      entering.push_back(Z.narrow(0, 0, sizes[i]));
      written.push_back(from_v[i].baddbmm(from_k[i], entering[i], 1, -1));
      Z = entering[i].mul(through[i]).baddbmm(keys[i], written[i]);
      const int64_t here = sizes[i] / H, next = i + 1 < sizes.size() ? sizes[i + 1] / H : 0;  // the spans between the two end here
      const at::Tensor ended = Z.view({here, H, K, V}).narrow(0, next, here - next);
      if (memory.defined()) memory.index_copy_(0, slot_s.narrow(0, next, here - next), ended.to(memory.scalar_type()));
    }
    const at::Tensor o = q.mul(c.exp()).bmm(at::cat(entering)).baddbmm(q.bmm(k.transpose(1, 2)).mul(decay), at::cat(written));  // [B, Q, V]
    return chunks.join(o.view({-1, H, Q, V}).transpose(1, 2));
  }

  Config c_;
  double eps_;
};

}  // namespace

TESSERA_PLUGIN(GatedDeltaNet)
