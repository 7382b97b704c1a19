// What every block and head must hold, read from its own tables.
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/isfinite.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "tests/support/compare.hpp"
#include "tests/support/conformance.hpp"
#include "tests/support/directional.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

using conformance::Case;
using conformance::kHidden;
using conformance::kVocab;

const double kStackTolerance = tolerance(at::kFloat, Op::kModel, kHidden);

at::Tensor hidden(Model& model, const Batch& batch, DecodeState* state = nullptr) {
  at::NoGradGuard no_grad;
  return model.hidden(batch, state);
}

// Spans of one sequence a slot: tokens [start, start + length) of ids.
struct Piece {
  int64_t slot, start, length;
  at::Tensor ids_n;
};
Batch pieces(const std::vector<Piece>& list) {
  std::vector<Span> spans;
  std::vector<at::Tensor> ids;
  for (const Piece& p : list) {
    spans.push_back({.document = p.slot, .start = p.start, .length = p.length, .document_len = p.start + p.length, .state_slot = p.slot});
    ids.push_back(p.ids_n.narrow(0, p.start, p.length));
  }
  return {.ids_n = at::cat(ids), .spans = Spans(spans)};
}

// The same ids with other ones in [begin, end).
at::Tensor changed(const at::Tensor& ids_n, int64_t begin, int64_t end) {
  at::Tensor out = ids_n.clone();
  out.narrow(0, begin, end - begin).add_(1).remainder_(kVocab);
  return out;
}

class Conformance : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (!GetParam().given) FAIL() << conformance::how_to_add(GetParam());
  }
  std::string text(const std::string& pattern = "XX") const { return conformance::block_text(GetParam(), pattern); }
  const BlockType& type() const { return *plugins().block(GetParam().type); }
  bool per_token() const {
    const Built built(text());
    const StateTable& states = built.plan.layers[0].states;
    return std::any_of(states.begin(), states.end(), [](const State& s) { return s.per == State::Per::kToken; });
  }
  // Dense blocks give equal bits where the shapes are equal; experts see other shapes.
  testing::AssertionResult same(const Built& built, const at::Tensor& got, const at::Tensor& want) const {
    return conformance::has_experts(built.plan) ? close(got, want, kStackTolerance) : bit_equal(got, want);
  }
};

TEST_P(Conformance, ConfigurationIsWrittenAndReadBack) {
  const Built built(text());
  const std::string written = to_toml(built.config);
  const Config again = parse_config(written, "again.toml", {}, plugins());
  EXPECT_EQ(to_toml(again), written);
  for (const Field& field : type().fields().list)
    EXPECT_TRUE(same_value(field.get(built.config.bindings[0].config.get()), field.get(again.bindings[0].config.get()))) << field.key;
}

TEST_P(Conformance, ValuesOutsideARangeAreRefused) {
  for (const Field& field : type().fields().list) {
    if (!field.required_) {
      EXPECT_EQ(broken_rule(field, field.default_value), "") << field.key;
    }
    EXPECT_FALSE(field.doc.empty()) << field.key;
    if (!std::isfinite(field.min_) || !(std::holds_alternative<int64_t>(field.default_value) || std::holds_alternative<double>(field.default_value))) continue;
    const std::string key = "blocks." + GetParam().type + "." + field.key;
    try {
      parse_config(text(), "test.toml", {fmt::format("{}={}", key, field.above_min_ ? field.min_ : field.min_ - 1)}, plugins());
      ADD_FAILURE() << key << " below its range is taken";
    } catch (const Error& error) {
      EXPECT_NE(error.message().find(key), std::string::npos) << error.what();
      EXPECT_EQ(error.code(), ExitCode::kUsage);
    }
  }
}

TEST_P(Conformance, RowsAreComplete) {
  Built built(text());
  const std::vector<std::string> names = parameter_names(built.plan);
  EXPECT_EQ(std::set<std::string>(names.begin(), names.end()).size(), names.size());
  EXPECT_FALSE(std::string(type().source()).empty()) << "BlockInfo::source names the paper or project";
  backward(built.model, random_batch({63, 130}, kVocab));
  for (const std::string& name : names) {
    const at::Tensor g = built.store.gradient(name);
    EXPECT_TRUE(at::isfinite(g).all().item<bool>()) << name;
    EXPECT_GT(g.abs().max().item<float>(), 0) << name << " is declared, but gets no gradient";
  }
}

TEST_P(Conformance, OddLengthsTogetherEqualEachAlone) {
  Built built(text());
  const std::vector<int64_t> lengths{1, 63, 130, 2};
  const Batch all = random_batch(lengths, kVocab);
  const at::Tensor together = hidden(built.model, all);
  EXPECT_TRUE(at::isfinite(together).all().item<bool>());
  EXPECT_EQ(together.sizes(), (std::vector<int64_t>{196, kHidden}));
  for (size_t d = 0; d < lengths.size(); ++d) {
    const int64_t begin = all.spans.rows()[d];
    const Batch alone{.ids_n = all.ids_n.narrow(0, begin, lengths[d]), .spans = Spans::documents({lengths[d]})};
    EXPECT_TRUE(close(together.narrow(0, begin, lengths[d]), hidden(built.model, alone), kStackTolerance)) << lengths[d];
  }
}

// In fp64 the operators run as plain compositions: this holds their wiring and derivatives. The next test ties the fast ones to them.
TEST_P(Conformance, GradientsAreThoseOfFiniteDifferences) {
  Built built(text(), {.dtype = at::kDouble});
  const Batch batch = random_batch({1, 21, 34}, kVocab);
  backward(built.model, batch);
  for (const std::string& name : parameter_names(built.plan))
    for (uint64_t seed : {11, 12})
      EXPECT_LE(directional_error(built.model, batch, name, seed, 1e-5), tolerance(at::kDouble, Op::kFiniteDifference)) << name;
}

TEST_P(Conformance, GradientsInFp32AreThoseInFp64) {
  Built plain(text()), exact(text(), {.dtype = at::kDouble});
  const Batch batch = random_batch({1, 63, 130}, kVocab);
  backward(plain.model, batch);
  backward(exact.model, batch);
  for (const std::string& name : parameter_names(plain.plan))
    EXPECT_TRUE(close(plain.store.gradient(name), exact.store.gradient(name), kStackTolerance)) << name;
}

TEST_P(Conformance, NothingDependsOnLaterTokens) {
  Built built(text());
  const Batch batch = random_batch({130}, kVocab);
  const at::Tensor before = hidden(built.model, batch);
  for (const int64_t t : {1, 15, 16, 64, 129}) {
    const at::Tensor after = hidden(built.model, {.ids_n = changed(batch.ids_n, t, 130), .spans = batch.spans});
    EXPECT_TRUE(same(built, after.narrow(0, 0, t), before.narrow(0, 0, t))) << t;
    EXPECT_FALSE(bit_equal(after.narrow(0, t, 1), before.narrow(0, t, 1))) << t;
  }
}

TEST_P(Conformance, DocumentsAreIndependent) {
  Built built(text());
  const Batch batch = random_batch({5, 70, 1, 33, 17}, kVocab);
  const at::Tensor before = hidden(built.model, batch);
  for (size_t d = 0; d < 5; ++d) {
    const int64_t begin = batch.spans.rows()[d], end = batch.spans.rows()[d + 1];
    const at::Tensor after = hidden(built.model, {.ids_n = changed(batch.ids_n, begin, end), .spans = batch.spans});
    EXPECT_TRUE(same(built, after.narrow(0, 0, begin), before.narrow(0, 0, begin))) << d;
    EXPECT_TRUE(same(built, after.narrow(0, end, 126 - end), before.narrow(0, end, 126 - end))) << d;
    EXPECT_FALSE(bit_equal(after.narrow(0, begin, end - begin), before.narrow(0, begin, end - begin))) << d;
  }
}

TEST_P(Conformance, PrefillAndDecodingGiveTheWholeForward) {
  Built built(text());
  const at::Tensor ids = random_ids(130, kVocab);
  const at::Tensor whole = hidden(built.model, {.ids_n = ids, .spans = Spans::documents({130})});
  for (const std::vector<int64_t>& chunks : std::vector<std::vector<int64_t>>{{}, {120}, {1, 2, 3, 63, 31}, {64, 16, 48}}) {
    DecodeState state(built.plan, 1, at::kCPU, at::kFloat);
    std::vector<at::Tensor> rows;
    int64_t seen = 0;
    const auto feed = [&](int64_t length) {
      rows.push_back(hidden(built.model, pieces({{0, seen, length, ids}}), &state));
      seen += length;
    };
    for (const int64_t chunk : chunks) feed(chunk);
    while (seen < 130) feed(1);
    EXPECT_TRUE(close(at::cat(rows), whole, kStackTolerance)) << fmt::format("{}", fmt::join(chunks, ", "));
  }
}

TEST_P(Conformance, PromptsOfDifferentLengthsTogetherEqualEachAlone) {
  Built built(text());
  const std::vector<int64_t> lengths{1, 63, 130};
  std::vector<at::Tensor> ids, whole;
  for (const int64_t n : lengths) {
    ids.push_back(random_ids(n + 4, kVocab, static_cast<uint64_t>(n)));
    whole.push_back(hidden(built.model, {.ids_n = ids.back(), .spans = Spans::documents({n + 4})}));
  }
  DecodeState state(built.plan, 3, at::kCPU, at::kFloat);
  const auto expect = [&](const std::vector<Piece>& list) {
    const Batch batch = pieces(list);
    const at::Tensor got = hidden(built.model, batch, &state);
    for (size_t i = 0; i < list.size(); ++i)
      EXPECT_TRUE(close(got.narrow(0, batch.spans.rows()[i], list[i].length), whole[static_cast<size_t>(list[i].slot)].narrow(0, list[i].start, list[i].length), kStackTolerance))
          << list[i].slot << " from " << list[i].start;
  };
  expect({{0, 0, 1, ids[0]}, {1, 0, 63, ids[1]}, {2, 0, 100, ids[2]}});
  expect({{2, 100, 30, ids[2]}, {0, 1, 1, ids[0]}});                        // a prompt's second chunk beside another's first new token
  expect({{1, 63, 1, ids[1]}, {2, 130, 1, ids[2]}, {0, 2, 1, ids[0]}});     // in another order
  expect({{0, 3, 2, ids[0]}, {2, 131, 3, ids[2]}});                         // several new tokens, one sequence left out
  expect({{1, 64, 3, ids[1]}});
}

TEST_P(Conformance, DecodeStateRollsBack) {
  Built built(text());
  const at::Tensor ids = random_ids(60, kVocab);
  DecodeState state(built.plan, 1, at::kCPU, at::kFloat);
  hidden(built.model, pieces({{0, 0, 41, ids}}), &state);
  DecodeState kept = state.snapshot();
  const at::Tensor first = hidden(built.model, pieces({{0, 41, 5, ids}}), &state);
  hidden(built.model, pieces({{0, 46, 1, changed(ids, 41, 60)}}), &state);
  EXPECT_TRUE(bit_equal(hidden(built.model, pieces({{0, 41, 5, ids}}), &kept), first));
}

TEST_P(Conformance, StateGrowsWithTheContextOnlyWhereItIsDeclaredPerToken) {
  Built built(text());
  const at::Tensor ids = random_ids(400, kVocab);
  DecodeState state(built.plan, 1, at::kCPU, at::kFloat);
  hidden(built.model, pieces({{0, 0, 8, ids}}), &state);
  const int64_t early = state.bytes();
  hidden(built.model, pieces({{0, 8, 391, ids}}), &state);
  hidden(built.model, pieces({{0, 399, 1, ids}}), &state);
  if (per_token()) EXPECT_GT(state.bytes(), early);
  else EXPECT_EQ(state.bytes(), early);
}

TEST_P(Conformance, RecomputationGivesEqualGradients) {
  Built kept(text()), again(text(), {.recompute = {"*"}});
  const Batch batch = random_batch({1, 63, 130}, kVocab);
  EXPECT_EQ(total_loss(kept.model, batch), total_loss(again.model, batch));
  backward(kept.model, batch);
  backward(again.model, batch);
  for (const std::string& name : parameter_names(kept.plan)) EXPECT_TRUE(bit_equal(again.store.gradient(name), kept.store.gradient(name))) << name;
}

TEST_P(Conformance, CountsAndLossesEnterOnceInRecomputation) {
  Built kept(text()), again(text(), {.recompute = {"*"}});
  const Batch batch = random_batch({9, 30}, kVocab);
  const auto counts = [&](Built& built) {
    at::AutoGradMode grad_mode(true);
    torch::autograd::backward({built.model.loss(batch, denominators(built.plan, batch), true).total}, {});
    return built.model.take_counts();
  };
  const LayerCounts first = counts(kept), second = counts(again);
  EXPECT_EQ(first.size(), second.size());
  for (const auto& [prefix, by_name] : first)
    for (const auto& [name, count] : by_name) EXPECT_TRUE(bit_equal(second.at(prefix).at(name), count)) << prefix << name;
  kept.model.loss(batch, denominators(kept.plan, batch), false);
  EXPECT_TRUE(kept.model.take_counts().empty()) << "evaluation counted";
}

TEST_P(Conformance, InitialValuesDependOnSeedAndNameAlone) {
  const Built one(text("XX")), other(text("XXXX")), seeded(text("XX"), {.seed = 4});
  bool random = false;
  for (size_t i = 0; i < one.plan.layers[1].params.size(); ++i) {
    const Param &param = one.plan.layers[1].params[i], &deeper = other.plan.layers[1].params[i];
    const std::string name = "layers.1." + param.name;
    // A projection into the residual stream starts smaller in a deeper stack: the same draw, scaled.
    const at::Tensor a = one.store.parameter(name), b = other.store.parameter(name);
    const double scale = param.init.kind == Init::Kind::kNormal ? deeper.init.std / param.init.std : 1;
    EXPECT_TRUE(scale == 1 ? bit_equal(b, a) : close(b, a * scale, tolerance(at::kFloat, Op::kElementwise))) << name;
    if (param.init.kind == Init::Kind::kConstant) continue;
    random = true;
    EXPECT_FALSE(bit_equal(seeded.store.parameter(name), a)) << name;
    EXPECT_FALSE(bit_equal(one.store.parameter("layers.0." + param.name), a)) << name;
  }
  EXPECT_TRUE(random || one.plan.layers[1].params.empty());
}

// FLOPs of the matrix products that read a parameter, counted while they run.
class Counter {
 public:
  explicit Counter(Store& store) {
    for (const FlatGroup& group : store.groups())
      for (const at::Tensor& t : {group.data, group.compute})
        if (t.defined()) storages().insert(t.storage().unsafeGetStorageImpl());
    flops() = 0;
    handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(&Counter::enter).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
  }
  ~Counter() {
    at::removeCallback(handle_);
    storages().clear();
  }
  static double& flops() {
    static double sum = 0;
    return sum;
  }

 private:
  static std::set<const c10::StorageImpl*>& storages() {
    static std::set<const c10::StorageImpl*> set;
    return set;
  }
  static std::unique_ptr<at::ObserverContext> enter(const at::RecordFunction& call) {
    const std::string name = call.name();
    if (name != "aten::mm" && name != "aten::addmm" && name != "aten::bmm") return nullptr;
    std::vector<at::Tensor> factors;
    for (const c10::IValue& value : call.inputs())
      if (value.isTensor()) factors.push_back(value.toTensor());
    const size_t first = name == "aten::addmm" ? 1 : 0;
    const at::Tensor &a = factors.at(first), &b = factors.at(first + 1);
    if (storages().contains(a.storage().unsafeGetStorageImpl()) || storages().contains(b.storage().unsafeGetStorageImpl()))
      flops() += 2.0 * static_cast<double>(a.numel()) * static_cast<double>(b.size(-1));
    return nullptr;
  }
  at::CallbackHandle handle_;
};

TEST_P(Conformance, DeclaredProductsAreThoseThatRun) {
  Built built(text());
  const std::vector<int64_t> lengths{1, 63, 130};
  const Batch batch = random_batch(lengths, kVocab);
  hidden(built.model, batch);
  double counted = 0;
  {
    const Counter counter(built.store);
    hidden(built.model, batch);
    counted = Counter::flops();
  }
  double declared = 0, dense = 0;
  for (const LayerPlan& layer : built.plan.layers) {
    declared += layer.type->cost(layer.config, built.plan.env, {{1, 1}, {63, 1}, {130, 1}}).matmul;
    for (const Param& param : layer.params)
      if (param.shape.size() == 2) dense += 2.0 * 194 * static_cast<double>(num_elements(param.shape));
  }
  EXPECT_NEAR(counted, declared, 0.01 * declared);
  if (!conformance::has_experts(built.plan)) {
    EXPECT_EQ(declared, dense) << "2 N x the elements of the matrices";
  }
}

INSTANTIATE_TEST_SUITE_P(Blocks, Conformance, testing::ValuesIn(conformance::block_cases()),
                         [](const auto& info) { return info.param.type + (info.param.variant.empty() ? "" : "_" + info.param.variant); });

class HeadConformance : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (!GetParam().given) FAIL() << conformance::how_to_add(GetParam());
    text_ = conformance::head_text(GetParam());
    ASSERT_FALSE(text_.empty()) << "no block type has sizes to be tested in";
  }
  std::string text_;
};

TEST_P(HeadConformance, ConfigurationIsWrittenAndReadBack) {
  const Built built(text_);
  const std::string written = to_toml(built.config);
  const Config again = parse_config(written, "again.toml", {}, plugins());
  EXPECT_EQ(to_toml(again), written);
  for (const Field& field : plugins().head(GetParam().type)->fields().list)
    EXPECT_TRUE(same_value(field.get(built.config.head->config.get()), field.get(again.head->config.get()))) << field.key;
}

TEST_P(HeadConformance, GradientsAreThoseOfFiniteDifferences) {
  Built built(text_, {.dtype = at::kDouble});
  const Batch batch = random_batch({1, 2, 21, 34}, kVocab);
  backward(built.model, batch);
  for (const std::string& name : parameter_names(built.plan)) {
    EXPECT_GT(built.store.gradient(name).abs().max().item<float>(), 0) << name << " is declared, but gets no gradient";
    EXPECT_LE(directional_error(built.model, batch, name, 11, 1e-5), tolerance(at::kDouble, Op::kFiniteDifference)) << name;
  }
}

TEST_P(HeadConformance, RecomputationGivesEqualGradients) {
  Built kept(text_), again(text_, {.recompute = {"*"}});
  const Batch batch = random_batch({1, 63, 130}, kVocab);
  backward(kept.model, batch);
  backward(again.model, batch);
  for (const std::string& name : parameter_names(kept.plan)) EXPECT_TRUE(bit_equal(again.store.gradient(name), kept.store.gradient(name))) << name;
}

TEST_P(HeadConformance, PassesSeeTheirShiftAndNoOtherDocument) {
  Built built(text_);
  const Batch batch = random_batch({40, 30}, kVocab);
  const auto logits = [&](const at::Tensor& ids_n) {
    at::NoGradGuard no_grad;
    const Batch b{.ids_n = ids_n, .spans = batch.spans};
    return built.model.head_logits(b, built.model.hidden(b));
  };
  const std::vector<at::Tensor> before = logits(batch.ids_n), later = logits(changed(batch.ids_n, 25, 40)), elsewhere = logits(changed(batch.ids_n, 0, 40));
  ASSERT_EQ(before.size(), built.plan.head->passes.size());
  int64_t ahead = 0;  // passes build on each other, so each sees what those before it saw
  for (size_t i = 0; i < before.size(); ++i) {
    ahead = std::max(ahead, built.plan.head->passes[i].shift);
    EXPECT_TRUE(bit_equal(later[i].narrow(0, 0, 25 - ahead), before[i].narrow(0, 0, 25 - ahead))) << i;
    EXPECT_FALSE(bit_equal(later[i].narrow(0, 25 - ahead, 1), before[i].narrow(0, 25 - ahead, 1))) << i;
    EXPECT_TRUE(bit_equal(elsewhere[i].narrow(0, 40, 30), before[i].narrow(0, 40, 30))) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Heads, HeadConformance, testing::ValuesIn(conformance::head_cases()),
                         [](const auto& info) { return info.param.type + (info.param.variant.empty() ? "" : "_" + info.param.variant); });

}  // namespace
}  // namespace tessera
