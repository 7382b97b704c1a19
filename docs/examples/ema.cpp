// Ema: gated exponential moving averages over the tokens, y = out_proj(m * silu(g)) with m_t = a m_{t-1} + (1 - a) v_t, a learned per channel.
// Letters: N tokens, D hidden, I channels, S spans.
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "layers/collectives.hpp"
#include "layers/linear.hpp"
#include "tessera/plugin.hpp"

namespace {

using namespace tessera;

class Ema final : public Block {
 public:
  static constexpr BlockInfo kInfo{.type = "ema", .version = 1, .symbols = {{"card", 'A'}}, .source = "arXiv:2209.10655, without its damping"};

  struct Config {
    int64_t width = 0;
    double min_memory = 1, max_memory = 256, statistics_rate = 0.01;
  };

  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("width", &Config::width, "channels that are averaged").required().range(1);
    s.field("min_memory", &Config::min_memory, "shortest time constant that a channel starts with").unit("tokens").above(0);
    s.field("max_memory", &Config::max_memory, "longest time constant that a channel starts with").unit("tokens").above(0);
    s.field("statistics_rate", &Config::statistics_rate, "weight of a step in the running mean of the gates").range(0, 1);
    return s;
  }

  static void check(const Config& c, const Env&, Issues& issues) {
    if (c.min_memory > c.max_memory)
      issues.add("min_memory", fmt::format("must be at most max_memory = {}, got {}", c.max_memory, c.min_memory));
  }

  static ParamTable params(const Config& c, const Env& env) {
    const int64_t I = c.width, D = env.hidden_size;
    const double out_std = env.init_std / std::sqrt(static_cast<double>(env.num_layers));
    const auto to_decay = [](double log_memory) { return -std::log(std::expm1(std::exp(-log_memory))); };  // its sigmoid is exp(-1 / memory)
    return {
        {.name = "in_proj.weight", .shape = {2 * I, D}, .shards = {{Axis::kTensor, 0}}, .segments = {{"v", I}, {"g", I}},
         .init = Init::normal(env.init_std)},
        {.name = "decay", .shape = {I}, .shards = {{Axis::kTensor, 0}},
         .init = Init::uniform(std::log(c.min_memory), std::log(c.max_memory), to_decay), .decay = false, .fp32 = true},
        {.name = "out_proj.weight", .shape = {D, I}, .shards = {{Axis::kTensor, 1}}, .init = Init::normal(out_std)},
    };
  }

  static BufferTable buffers(const Config&, const Env&) { return {{.name = "gate_mean", .shape = {1}, .init = 0.5}}; }

  static StateTable state(const Config& c, const Env&) {
    return {{.name = "average", .shape = {c.width}, .fp32 = true, .shards = {{Axis::kTensor, 0}}}};
  }

  static Cost cost(const Config& c, const Env& env, const Documents& documents) {
    const double N = static_cast<double>(num_tokens(documents)), D = static_cast<double>(env.hidden_size), I = static_cast<double>(c.width);
    double passes = 0;  // over the tokens, each an addcmul that keeps its shifted input
    for (const auto& run : documents) passes = std::max(passes, std::ceil(std::log2(static_cast<double>(run.length))));
    return {.matmul = 6 * N * D * I,
            .elementwise = N * I * (3 * passes + 6),
            .bytes = N * (2 * D + I * (3 * passes + 8)),
            .activations = N * (D + I * (passes + 5))};
  }

  Ema(const Config&, const Env&) {}

  at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const override {
    const at::ScalarType wide = c10::promoteTypes(x_nd.scalar_type(), at::kFloat);
    const at::Tensor decay_i = w["decay"].tensor().to(wide);
    const int64_t I = decay_i.size(0);  // of this rank
    const at::Tensor packed = linear(ctx, x_nd, w["in_proj.weight"]);
    const at::Tensor v_ni = packed.narrow(1, 0, I), g_ni = packed.narrow(1, I, I);
    if (ctx.training()) count_gates(g_ni, ctx);
    const at::Tensor m_ni = average(v_ni.to(wide), decay_i, ctx).to(x_nd.scalar_type());
    return partial_sum_linear(ctx, m_ni.mul(at::silu(g_ni)), w["out_proj.weight"]);
  }

  static void after_step(const Config& c, Buffers& buffers, const Counts& counts) {
    const at::Tensor& sums = counts.at("gates");
    buffers.at("gate_mean").lerp_(sums[0].div(sums[1].clamp_min(1)), c.statistics_rate);
  }

 private:
  // m_t = a m_{t-1} + (1 - a) v_t within each span, a = sigmoid(decay). Before the pass of step s a token holds the sum over the s tokens up
  // to itself; the pass adds the sum over the s tokens before those, times a^s. Only powers of a < 1 occur, so nothing overflows.
  static at::Tensor average(const at::Tensor& v_ni, const at::Tensor& decay_i, Context& ctx) {
    const Spans& spans = ctx.spans();
    const at::Tensor table_s5 = spans.table(v_ni.device()).to(at::kLong);  // document, start, length, document_len, state_slot
    const at::Tensor start_s = table_s5.select(1, 1), end_s = table_s5.select(1, 2).cumsum(0), slot_s = table_s5.select(1, 4);
    const at::Tensor& span_n = spans.span_index_n(v_ni.device());
    const at::Tensor offset_n1 = spans.positions_n(v_ni.device()).sub(start_s.index_select(0, span_n)).unsqueeze(1);  // in the span
    int64_t longest = 0;
    for (const Span& span : spans.list()) longest = std::max(longest, span.length);

    const at::Tensor log_a_i = at::log_sigmoid(decay_i);
    at::Tensor m_ni = v_ni.mul(decay_i.neg().sigmoid());
    for (int64_t s = 1; s < longest; s *= 2)
      m_ni = m_ni.addcmul(at::where(offset_n1.ge(s), m_ni.roll({s}, {0}), 0.0), log_a_i.mul(s).exp());
    if (!ctx.has_state()) return m_ni;

    const at::Tensor& state = ctx.state("average");  // [slots, I]
    const at::Tensor before_si = at::where(start_s.gt(0).unsqueeze(1), state.index_select(0, slot_s), 0.0);
    m_ni = m_ni.addcmul(before_si.index_select(0, span_n), log_a_i.mul(offset_n1.add(1)).exp());
    state.index_copy_(0, slot_s, m_ni.index_select(0, end_s.sub(1)));
    return m_ni;
  }

  static void count_gates(const at::Tensor& g_ni, Context& ctx) {
    const double width = static_cast<double>(g_ni.size(1) * ctx.mesh().tp);  // a rank has its share of the channels
    const at::Tensor open_n = all_reduce(g_ni.detach().to(at::kFloat).sigmoid().sum(1), ctx.tensor_group()).div(width);
    const at::Tensor valid_n = ctx.valid_n().defined() ? ctx.valid_n().to(at::kFloat) : at::ones_like(open_n);
    ctx.count("gates", at::stack({open_n.mul(valid_n).sum(), valid_n.sum()}));
  }
};

}  // namespace

TESSERA_PLUGIN(Ema)
