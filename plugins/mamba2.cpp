// Mamba2: packed projection, short convolution, chunked state space scan, gated norm, projection.
// Letters: N tokens, D hidden, H heads of P channels (inner width I = H P), G groups of state size S, C = I + 2 G S convolved channels.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "layers/conv.hpp"
#include "layers/linear.hpp"
#include "layers/nearest.hpp"
#include "layers/norm.hpp"
#include "layers/ssd_scan.hpp"
#include "tessera/plugin.hpp"

namespace tessera {

class Mamba2 final : public Block {
 public:
  static constexpr BlockInfo kInfo{.type = "mamba2", .symbols = {{"card", 'M'}, {"nemotron", 'M'}}, .takes_pieces = true, .source = "arXiv:2405.21060"};

  struct Config {
    int64_t num_heads = 0, head_dim = 64, state_size = 128, num_groups = 8, conv_width = 4, chunk = 64;
    std::vector<double> dt_limit{0, std::numeric_limits<double>::infinity()};
    bool bias = false, conv_bias = true;
    double dt_min = 1e-3, dt_max = 1e-1, dt_init_floor = 1e-4;
  };

  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("num_heads", &Config::num_heads, "heads of the scan").required().range(1).hf({"mamba_num_heads"});
    s.field("head_dim", &Config::head_dim, "channels of a head").range(1).hf({"mamba_head_dim"});
    s.field("state_size", &Config::state_size, "state of a channel").range(1).hf({"ssm_state_size"});
    s.field("num_groups", &Config::num_groups, "groups of heads that share B and C, and groups of the output norm").range(1).hf({"n_groups", "mamba_n_groups"});
    s.field("conv_width", &Config::conv_width, "tokens that the convolution sees").unit("tokens").range(1).hf({"conv_kernel", "mamba_d_conv"});
    s.field("chunk", &Config::chunk, "tokens that the scan handles at once; changes speed and rounding only").unit("tokens").range(1, 65536);
    s.field("dt_limit", &Config::dt_limit, "lower and upper limit of the time step").length(2).range(0).may_be_infinite().hf({"time_step_limit", "mamba_dt_limit"});
    s.field("bias", &Config::bias, "adds a bias to in_proj and out_proj").hf({"use_bias"});
    s.field("conv_bias", &Config::conv_bias, "adds a bias to the convolution").hf({"use_conv_bias", "mamba_conv_bias"});
    s.field("dt_min", &Config::dt_min, "initial time steps: smallest").above(0).hf({"time_step_min", "mamba_dt_min"});
    s.field("dt_max", &Config::dt_max, "initial time steps: largest").above(0).hf({"time_step_max", "mamba_dt_max"});
    s.field("dt_init_floor", &Config::dt_init_floor, "initial time steps: raised to at least this").above(0).hf({"time_step_floor", "mamba_dt_init_floor"});
    return s;
  }

  static HfTable hf() {
    return {.layer_words = {"mamba", "linear_attention"},
            .inert = {"expand", "mamba_expand", "mamba_proj_bias", "chunk_size", "mamba_chunk_size", "mamba_ssm_cache_dtype"},
            .must_be = {{"mamba_hidden_act", std::string("silu")}},
            .unsaid = {"chunk"}};
  }

  static void check(const Config& c, const Env& env, Issues& issues) {
    const int64_t H = c.num_heads, G = std::max<int64_t>(1, c.num_groups), tp = std::max<int64_t>(1, env.mesh.tp);
    const auto multiple = [&](const char* key, int64_t value, const char* of, int64_t unit, auto legal) {
      if (value % unit != 0) issues.add(key, fmt::format("must be a multiple of {}, got {} % {} = {}", of, value, unit, value % unit), nearest_legal(value, legal));
    };
    // Ranks have whole groups or share one: see Shard.
    const auto fits = [](int64_t heads, int64_t groups, int64_t ranks) {
      return heads % groups == 0 && heads % ranks == 0 && (groups % ranks == 0 || ranks % groups == 0);
    };
    multiple("num_heads", H, "num_groups", G, [&](int64_t heads) { return heads % G == 0 && heads % tp == 0; });
    if (H % G == 0) multiple("num_heads", H, "the tensor-parallel degree", tp, [&](int64_t heads) { return heads % G == 0 && heads % tp == 0; });
    if (tp <= G) multiple("num_groups", G, "the tensor-parallel degree", tp, [&](int64_t groups) { return fits(H, groups, tp); });
    else multiple("parallelism.tensor_parallel_degree", tp, "num_groups where it exceeds it", G, [&](int64_t ranks) { return fits(H, G, ranks); });
    if (c.dt_limit[0] > c.dt_limit[1])
      issues.add("dt_limit", fmt::format("must be [lower, upper] with lower <= upper, got [{}, {}]", c.dt_limit[0], c.dt_limit[1]));
    if (c.dt_min > c.dt_max) issues.add("dt_min", fmt::format("must be at most dt_max = {}, got {}", c.dt_max, c.dt_min));
  }

  static ParamTable params(const Config& c, const Env& env) {
    const int64_t D = env.hidden_size, H = c.num_heads, P = c.head_dim, S = c.state_size, I = H * P, GS = c.num_groups * S, C = I + 2 * GS;
    const Segment x{"x", I, P}, B{"B", GS, S}, BC{"C", GS, S};
    const std::vector<Segment> packed{{"z", I, P}, x, B, BC, {"dt", H, 1}}, convolved{x, B, BC};
    const std::vector<Shard> rows{{Axis::kTensor, 0}}, heads{{Axis::kTensor, 0, P}};
    const double out_std = env.init_std / std::sqrt(static_cast<double>(env.num_layers)), reach = 1 / std::sqrt(static_cast<double>(c.conv_width));
    const auto dt_bias = [floor = c.dt_init_floor](double log_dt) {
      const double dt = std::max(std::exp(log_dt), floor);
      return dt + std::log(-std::expm1(-dt));  // softplus of this is dt
    };
    const Init zero = Init::constant(0), one = Init::constant(1);
    ParamTable table{
        {.name = "in_proj.weight", .shape = {I + C + H, D}, .shards = rows, .segments = packed, .init = Init::normal(env.init_std)},
        {.name = "conv1d.weight", .shape = {C, 1, c.conv_width}, .shards = rows, .segments = convolved, .init = Init::uniform(-reach, reach)},
        {.name = "dt_bias", .shape = {H}, .shards = rows, .init = Init::uniform(std::log(c.dt_min), std::log(c.dt_max), dt_bias), .decay = false, .fp32 = true},
        {.name = "A_log", .shape = {H}, .shards = rows, .init = Init::uniform(1, 16, [](double a) { return std::log(a); }), .decay = false, .fp32 = true},
        {.name = "D", .shape = {H}, .shards = rows, .init = one, .decay = false, .fp32 = true},
        {.name = "norm.weight", .shape = {I}, .shards = heads, .init = one, .decay = false},
        {.name = "out_proj.weight", .shape = {D, I}, .shards = {{Axis::kTensor, 1, P}}, .init = Init::normal(out_std)},
    };
    if (c.conv_bias)
      table.push_back({.name = "conv1d.bias", .shape = {C}, .shards = rows, .segments = convolved, .init = Init::uniform(-reach, reach), .decay = false});
    if (c.bias) {
      table.push_back({.name = "in_proj.bias", .shape = {I + C + H}, .shards = rows, .segments = packed, .init = zero, .decay = false});
      table.push_back({.name = "out_proj.bias", .shape = {D}, .shards = replicated(), .init = zero, .decay = false});
    }
    return table;
  }

  // A group that several tensor-parallel ranks share is kept by each of them.
  static StateTable state(const Config& c, const Env& env) {
    const int64_t C = c.num_heads * c.head_dim + 2 * std::max(c.num_groups, env.mesh.tp) * c.state_size;
    StateTable table{{.name = "ssm", .shape = {c.num_heads, c.head_dim, c.state_size}, .fp32 = true, .shards = {{Axis::kTensor, 0}}}};
    if (c.conv_width > 1) table.push_back({.name = "conv", .shape = {C, c.conv_width - 1}, .shards = {{Axis::kTensor, 0}}});
    return table;
  }

  // Over context ranks the ends of pieces and their states; over the ranks that share a group of the output norm its sum of squares.
  static ExchangeTable exchanges(const Config& c, const Env& env) {
    const int64_t tp = env.mesh.tp, H = c.num_heads / tp, G = std::max<int64_t>(1, c.num_groups / tp), I = H * c.head_dim, S = c.state_size;
    using X = Exchange;
    ExchangeTable table;
    if (env.mesh.cp > 1) {
      if (c.conv_width > 1) table.push_back({.name = "convolution halo", .over = X::Over::kContext, .form = X::Form::kGather, .elements = I + 2 * G * S, .reach = c.conv_width - 1});
      table.push_back({.name = "scan summaries", .over = X::Over::kContext, .form = X::Form::kGather, .per = X::Per::kCall, .elements = 2 * (I * S + H), .bytes = 4});
    }
    if (tp > c.num_groups) table.push_back({.name = "gated norm", .over = X::Over::kTensorPart, .form = X::Form::kSum, .elements = 1, .bytes = 4, .part = tp / c.num_groups});
    return table;
  }

  // Mixing is what the reference scan's products take: chunks of min(chunk, longest document), the last of a document padded.
  static Cost cost(const Config& c, const Env& env, const Documents& documents) {
    const double N = num_tokens(documents), D = env.hidden_size, H = c.num_heads, I = H * c.head_dim, GS = c.num_groups * c.state_size, C = I + 2 * GS;
    int64_t longest = 1, chunks = 0;
    for (const auto& run : documents) longest = std::max(longest, run.length);
    const int64_t Q = std::min(c.chunk, longest);
    for (const auto& run : documents) chunks += run.count * ((run.length + Q - 1) / Q);
    const double kept = D + (I + C + H) + C + 2 * I + c.num_groups;  // x, packed projection, convolved, scan and norm outputs, statistics
    return {.matmul = 2 * N * D * (2 * I + C + H),
            .mixing = chunks * ssd_scan_ref_flops(sizes(c, c.num_heads, c.num_groups), Q),
            .elementwise = N * (C * (2.0 * c.conv_width + 5) + 5 * H * Q + 12 * I),
            .bytes = 2 * N * kept,
            .activations = N * kept};
  }

  Mamba2(const Config& c, const Env& env) : c_(c), eps_(env.norm_eps) {}

  at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const override {
    const at::Tensor &A_log_h = w["A_log"].tensor(), &kernel_c1w = w["conv1d.weight"].tensor();
    const int64_t H = A_log_h.size(0), I = H * c_.head_dim, C = kernel_c1w.size(0);  // of this rank
    const SsdSizes scan = sizes(c_, H, (C - I) / (2 * c_.state_size));
    const bool with_state = ctx.has_state();

    const auto packed = linear(ctx, x_nd, w["in_proj.weight"], w.find("in_proj.bias")).split_with_sizes({I, C, H}, 1);
    const auto xbc_nc = causal_conv1d(ctx, packed[1], kernel_c1w, w.find("conv1d.bias").tensor(), /*silu=*/true,
                                      with_state && c_.conv_width > 1 ? ctx.state("conv") : at::Tensor());
    const auto y_ni = ssd_scan(ctx, xbc_nc, packed[2], w["dt_bias"].tensor(), A_log_h, w["D"].tensor(), scan,
                               with_state ? ctx.state("ssm") : at::Tensor());
    const int64_t group_size = c_.num_heads * c_.head_dim / c_.num_groups, ranks = std::max<int64_t>(1, ctx.mesh().tp / c_.num_groups);  // that share a group
    const auto normed_ni = gated_rms_norm(y_ni, packed[0], w["norm.weight"].tensor(), group_size, eps_, x_nd.scalar_type(), ctx.tensor_part(ranks));
    return partial_sum_linear(ctx, normed_ni, w["out_proj.weight"], w.find("out_proj.bias"));
  }

 private:
  static SsdSizes sizes(const Config& c, int64_t num_heads, int64_t num_groups) {
    return {num_heads, c.head_dim, num_groups, c.state_size, c.chunk, c.dt_limit[0], c.dt_limit[1]};
  }

  Config c_;
  double eps_;
};

}  // namespace tessera

TESSERA_PLUGIN(tessera::Mamba2)
