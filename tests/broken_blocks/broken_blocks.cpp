// One small token mixer with one fault at a time, for the conformance suite to find: y = out_proj(silu(gain * v + mix * v_before)), v = in_proj x,
// v_before that of the token before in the document. `sound` and `masked`, which drops out as it should, have none.
// Letters: N tokens, D hidden, I width, S spans.
#include <ATen/ops/diag.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/roll.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/where.h>

#include "layers/linear.hpp"
#include "layers/random.hpp"
#include "tessera/plugin.hpp"

namespace {

using namespace tessera;

enum Fault {
  kSound, kMasked, kAcausal, kLeaks, kCountsSpans, kForgets, kNeverWrites, kKeepsSlot, kMixesSlots, kHidesState, kRemembers, kMatmul, kMixing, kDetached, kRounds,
  kUnused, kUndeclared, kNoSource, kRandom, kRandomOnce, kSameColumns, kCountsGradMode, kLocalShape, kSegments, kUncut, kBiasTwice, kDrawsAnew, kOneMember, kReadsOther, kEdge, kDtype
};
constexpr const char* kTypes[] = {"sound", "masked", "acausal", "leaks", "counts_spans", "forgets", "never_writes", "keeps_slot", "mixes_slots", "hides_state", "remembers",
                                  "matmul", "mixing", "detached", "rounds", "unused", "undeclared", "no_source", "random", "random_once", "same_columns", "counts_grad_mode", "local_shape", "segments",
                                  "uncut", "bias_twice", "draws_anew", "one_member", "reads_other", "edge", "dtype"};

struct Sizes {
  int64_t width = 0;
  double mix = 0.5, sharpness = 1;
};

Schema<Sizes> fields(Fault fault) {
  Schema<Sizes> s;
  s.field("width", &Sizes::width, "channels").required().range(1);
  s.field("mix", &Sizes::mix, "share of the token before").range(0, 4);
  s.field("sharpness", fault == kOneMember ? &Sizes::mix : &Sizes::sharpness, "scale of the activation's input").range(0, 4);
  if (fault == kReadsOther) s.list[1].get = [](const void* config) { return Value(static_cast<const Sizes*>(config)->mix + 0.25); };
  return s;
}

ParamTable rows(Fault fault, const Sizes& c, const Env& env) {
  const int64_t I = c.width, D = env.hidden_size;
  const auto anew = [](double drawn) {
    static int calls = 0;
    return drawn + 1e-3 * (++calls % 7);
  };
  ParamTable table{
      {.name = "in_proj.weight", .shape = {fault == kLocalShape ? I / env.mesh.tp : I, D}, .shards = {{Axis::kTensor, 0}}, .init = Init::normal(env.init_std)},
      {.name = "gain", .shape = {I}, .shards = {{Axis::kTensor, 0}}, .init = Init::uniform(0.5, 1.5), .decay = false, .fp32 = fault == kDtype},
      {.name = "out_proj.weight", .shape = {D, I}, .shards = {{Axis::kTensor, 1}}, .init = Init::normal(env.init_std)},
  };
  if (fault == kSegments) table[0].segments = {{"v", I / 2}};
  if (fault == kUncut) table[2].shards = replicated();
  if (fault == kDrawsAnew) table[1].init = Init::uniform(0.5, 1.5, anew);
  if (fault == kUnused) table.push_back({.name = "unused", .shape = {I}, .shards = replicated(), .init = Init::normal(env.init_std)});
  if (fault == kBiasTwice) table.push_back({.name = "bias", .shape = {D}, .shards = replicated(), .init = Init::normal(env.init_std)});
  return table;
}

Cost flops(Fault fault, const Sizes& c, const Env& env, const Documents& documents) {
  const double N = static_cast<double>(num_tokens(documents)), D = static_cast<double>(env.hidden_size), I = static_cast<double>(c.width);
  return {.matmul = (fault == kMatmul ? 4.2 : 4) * N * D * I, .elementwise = 8 * N * I, .bytes = N * (2 * D + 4 * I), .activations = N * (D + 3 * I)};
}

// v of the token before, which may be in the decode state.
at::Tensor before(Fault fault, const at::Tensor& v_ni, Context& ctx, at::Tensor& hidden_state) {
  const Spans& spans = ctx.spans();
  const at::Tensor table_s5 = spans.table(v_ni.device()).to(at::kLong);
  const at::Tensor start_s = table_s5.select(1, 1), length_s = table_s5.select(1, 2), end_s = length_s.cumsum(0);
  const at::Tensor slot_s = fault == kMixesSlots ? spans.span_index_n(v_ni.device()).index_select(0, end_s.sub(1)) : table_s5.select(1, 4);
  const at::Tensor& span_n = spans.span_index_n(v_ni.device());
  const at::Tensor offset_n1 = spans.positions_n(v_ni.device()).sub(start_s.index_select(0, span_n)).unsqueeze(1);
  if (fault == kAcausal) return at::where(offset_n1.add(1).lt(length_s.index_select(0, span_n).unsqueeze(1)), v_ni.roll({-1}, {0}), 0.0);
  if (fault == kLeaks && !ctx.has_state()) return v_ni.roll({1}, {0});
  at::Tensor before_ni = at::where(offset_n1.gt(0), v_ni.roll({1}, {0}), 0.0);
  if (!ctx.has_state() || fault == kNeverWrites) return before_ni;

  const at::Tensor& state = ctx.state("last");
  if (fault == kHidesState && !hidden_state.defined()) hidden_state = state.clone();
  at::Tensor held_si = (fault == kHidesState ? hidden_state : state).index_select(0, slot_s);
  if (fault != kKeepsSlot) held_si = at::where(start_s.gt(0).unsqueeze(1), held_si, 0.0);
  if (fault != kForgets) before_ni = at::where(offset_n1.eq(0), held_si.index_select(0, span_n), before_ni);
  const at::Tensor last_si = v_ni.index_select(0, end_s.sub(1));
  state.index_copy_(0, slot_s, last_si);
  if (fault == kHidesState) hidden_state.index_copy_(0, slot_s, last_si);
  return before_ni;
}

template <Fault fault>
class Mixer final : public Block {
 public:
  static constexpr BlockInfo kInfo{.type = kTypes[fault], .version = 1, .source = fault == kNoSource ? "" : "made up"};
  using Config = Sizes;
  static Schema<Config> schema() { return fields(fault); }
  static void check(const Config&, const Env&, Issues&) {}
  static ParamTable params(const Config& c, const Env& env) { return rows(fault, c, env); }
  static StateTable state(const Config& c, const Env&) { return {{.name = "last", .shape = {c.width}, .shards = {{Axis::kTensor, 0}}}}; }
  static Cost cost(const Config& c, const Env& env, const Documents& documents) { return flops(fault, c, env, documents); }

  Mixer(const Config& c, const Env&) : c_(c) {}

  at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const override {
    const at::Tensor& gain_i = w["gain"].tensor();
    at::Tensor v_ni = linear(ctx, x_nd, w["in_proj.weight"]);
    if (fault == kMixing) v_ni = at::mm(v_ni, at::diag(at::ones({v_ni.size(1)}, v_ni.options())));
    if (fault == kUndeclared) v_ni = v_ni.mul(w["scale"].tensor());
    at::Tensor before_ni = before(fault, v_ni, ctx, hidden_state_);
    if (fault == kDetached) before_ni = before_ni.detach();
    at::Tensor h_ni = at::silu(v_ni.mul(gain_i).add(before_ni.mul(c_.mix)).mul(c_.sharpness));
    if (fault == kEdge) h_ni = h_ni.div(c_.mix);
    if (fault == kCountsSpans) h_ni = h_ni.div(ctx.spans().size());
    if (fault == kRemembers) h_ni = h_ni.mul(1 + 1e-3 * static_cast<double>(++calls_));
    if (fault == kRounds && h_ni.scalar_type() == at::kFloat) h_ni = h_ni.to(at::kBFloat16).to(at::kFloat);
    const auto draw = [&] { return at::rand({h_ni.size(0), 1}, at::TensorOptions(at::kFloat)).gt(0.1).to(h_ni.scalar_type()); };
    if (fault == kRandom && ctx.training()) h_ni = h_ni.mul(draw());
    if (fault == kRandomOnce && ctx.training()) h_ni = h_ni.mul(ctx.once("mask", draw));
    const Group* ranks = ctx.tensor_group();
    if (fault == kMasked) h_ni = dropout(ctx, h_ni, 0.1, "mask", ranks ? ranks->rank() * h_ni.size(1) : 0);
    if (fault == kSameColumns) h_ni = dropout(ctx, h_ni, 0.1, "mask");
    if (fault == kCountsGradMode) ctx.count("kept", at::ones({1}).mul(h_ni.requires_grad() ? 1 : 0));
    if (fault == kDtype) return at::mm(h_ni, w["out_proj.weight"].tensor().t());
    if (fault == kBiasTwice) return linear(ctx, h_ni, w["out_proj.weight"], w["bias"]);
    return partial_sum_linear(ctx, h_ni, w["out_proj.weight"]);
  }

 private:
  Config c_;
  mutable at::Tensor hidden_state_;
  mutable int64_t calls_ = 0;
};

}  // namespace

TESSERA_PLUGIN(Mixer<kSound>, Mixer<kMasked>, Mixer<kAcausal>, Mixer<kLeaks>, Mixer<kCountsSpans>, Mixer<kForgets>, Mixer<kNeverWrites>, Mixer<kKeepsSlot>, Mixer<kMixesSlots>,
               Mixer<kHidesState>, Mixer<kRemembers>, Mixer<kMatmul>, Mixer<kMixing>, Mixer<kDetached>, Mixer<kRounds>, Mixer<kUnused>, Mixer<kUndeclared>, Mixer<kNoSource>,
               Mixer<kRandom>, Mixer<kRandomOnce>, Mixer<kSameColumns>, Mixer<kCountsGradMode>, Mixer<kLocalShape>, Mixer<kSegments>, Mixer<kUncut>, Mixer<kBiasTwice>, Mixer<kDrawsAnew>, Mixer<kOneMember>,
               Mixer<kReadsOther>, Mixer<kEdge>, Mixer<kDtype>)
