// The stack: losses and their denominators, padding and masks, errors of blocks, decode state.
#include "model/model.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/full.h>

#include "tests/support/compare.hpp"
#include "tests/support/directional.hpp"
#include "tests/support/model.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

constexpr int64_t kVocab = 32;

std::string text(const std::string& pattern = "M*EO/*E", const std::string& more = "[heads.mtp]\ndepths = 2\n") {
  return fmt::format(R"(
[model]
hybrid_override_pattern = "{}"
vocab_size = {}
hidden_size = 24
init_std = 0.1
[blocks.mamba2]
num_heads = 2
head_dim = 8
state_size = 8
num_groups = 1
chunk = 16
[blocks.gqa]
num_heads = 2
num_kv_heads = 1
head_dim = 8
[blocks.mlp]
intermediate_size = 24
[blocks.moe]
num_experts = 4
top_k = 2
intermediate_size = 16
aux_loss_coeff = 0.05
z_loss_coeff = 0.01
{})",
                     pattern, kVocab, more);
}

LossResult loss(Built& built, const Batch& batch, bool training = false) {
  at::NoGradGuard no_grad;
  LossResult result = built.model.loss(batch, denominators(built.plan, batch), training);
  built.model.take_counts();
  return result;
}

TEST(Model, LossIsTheMeanOverTargetsOfTheLogits) {
  Built built(text());
  const std::vector<int64_t> lengths{1, 9, 20, 2};
  const Batch batch = random_batch(lengths, kVocab);
  at::NoGradGuard no_grad;
  const at::Tensor hidden = built.model.hidden(batch);
  const auto mean = [&](const at::Tensor& logits, int64_t offset) {
    const at::Tensor log_p = at::log_softmax(logits.to(at::kDouble), 1);
    double sum = 0, targets = 0;
    int64_t row = 0;
    for (const int64_t length : lengths) {
      for (int64_t p = 0; p + offset < length; ++p, ++targets) sum -= log_p[row + p][batch.ids_n[row + p + offset].item<int64_t>()].item<double>();
      row += length;
    }
    return sum / targets;
  };
  const LossResult result = loss(built, batch);
  const double limit = tolerance(at::kFloat, Op::kReduction) * 4;
  EXPECT_NEAR(result.main.item<double>(), mean(built.model.logits(hidden), 1), limit);
  const auto ahead = built.model.head_logits(batch, hidden);
  EXPECT_NEAR(result.parts.at("mtp.1").item<double>(), mean(ahead[0], 2), limit);
  EXPECT_NEAR(result.parts.at("mtp.2").item<double>(), mean(ahead[1], 3), limit);
  EXPECT_EQ(result.parts.count("seq_aux"), 0u) << "evaluation has no auxiliary losses";
  EXPECT_NEAR(built.model.token_losses(batch).sum().item<double>() / 28, result.main.item<double>(), limit);
}

TEST(Model, DenominatorsCountTargetsTokensAndDocuments) {
  Built built(text());
  const Batch batch = random_batch({1, 9, 20, 2}, kVocab);
  const Denominators sums = denominators(built.plan, batch);
  EXPECT_EQ(sums.targets, (std::vector<double>{28, 7 + 18, 6 + 17}));
  EXPECT_EQ(sums.tokens, (std::vector<double>{32, 8 + 19 + 1, 7 + 18}));
  EXPECT_EQ(sums.documents, (std::vector<double>{4, 3, 2}));
}

// A padded batch is the batch without its padding, for losses, auxiliary losses, counts and gradients.
TEST(Model, PaddingMovesNothing) {
  Built plain(text()), padded(text());
  const Batch batch = random_batch({9, 20}, kVocab);
  Batch more = random_batch({9, 20, 14}, kVocab, 5);  // the last document is padding, and so is the end of none
  more.ids_n.narrow(0, 0, 29).copy_(batch.ids_n);
  more.valid_n = at::ones({43}, at::kBool);
  more.valid_n.narrow(0, 29, 14).fill_(false);
  const LossResult a = loss(plain, batch, true), b = loss(padded, more, true);
  EXPECT_EQ(denominators(plain.plan, batch).targets, denominators(plain.plan, more).targets);
  EXPECT_EQ(denominators(plain.plan, batch).tokens, denominators(plain.plan, more).tokens);
  EXPECT_EQ(denominators(plain.plan, batch).documents, denominators(plain.plan, more).documents);
  const double limit = tolerance(at::kFloat, Op::kModel);
  EXPECT_NEAR(b.value.item<double>(), a.value.item<double>(), limit);
  for (const auto& [name, part] : a.parts) EXPECT_NEAR(b.parts.at(name).item<double>(), part.item<double>(), limit) << name;
  backward(plain.model, batch);
  backward(padded.model, more);
  for (const std::string& name : parameter_names(plain.plan)) EXPECT_TRUE(close(padded.store.gradient(name), plain.store.gradient(name), limit)) << name;
}

TEST(Model, GivenTargetsAreWhatIsPredicted) {
  Built built(text("ME", ""));
  Batch batch = random_batch({20}, kVocab);
  const at::Tensor by_token = built.model.token_losses(batch);
  batch.targets_n = at::full({20}, -1, at::kLong);
  batch.targets_n.narrow(0, 4, 3).copy_(batch.ids_n.narrow(0, 5, 3));
  EXPECT_EQ(denominators(built.plan, batch).targets, std::vector<double>{3});
  EXPECT_NEAR(loss(built, batch).main.item<double>(), by_token.narrow(0, 4, 3).mean().item<double>(), tolerance(at::kFloat, Op::kReduction) * 4);
}

TEST(Model, ABatchWithoutTargetsHasZeroLossAndGradient) {
  Built built(text("M*E/*E"));
  const Batch batch = random_batch({1, 1, 1}, kVocab);
  EXPECT_EQ(loss(built, batch).value.item<double>(), 0);
  backward(built.model, batch);
  EXPECT_EQ(built.store.gradient("lm_head.weight").abs().sum().item<float>(), 0);
  EXPECT_EQ(built.store.gradient("layers.0.in_proj.weight").abs().sum().item<float>(), 0);
}

TEST(Model, ErrorsOfABlockNameLayerBlockAndPhase) {
  Built built(text("ME", ""));
  Batch batch = random_batch({4}, kVocab);
  DecodeState other(built.plan, 1, at::kCPU, at::kBFloat16);  // not the model's dtype
  at::NoGradGuard no_grad;
  try {
    built.model.hidden(batch, &other);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.message().substr(0, 28), "layer layers.0 (mamba2), for") << error.what();
    EXPECT_EQ(error.message().find("Exception raised from"), std::string::npos) << error.what();
  }
}

TEST(Model, ObserverSeesTheResidualStreamOnceALayer) {
  Built built(text("M*E", ""));
  const Batch batch = random_batch({5, 3}, kVocab);
  at::NoGradGuard no_grad;
  std::vector<int64_t> seen;
  built.model.hidden(batch, nullptr, [&](int64_t layer, const at::Tensor& x_nd) {
    seen.push_back(layer);
    EXPECT_EQ(x_nd.sizes(), (std::vector<int64_t>{8, 24}));
  });
  EXPECT_EQ(seen, (std::vector<int64_t>{-1, 0, 1, 2}));
}

TEST(DecodeState, GrowsByDoublingWithoutLosingTokens) {
  Built built(text("M*", ""));
  DecodeState state(built.plan, 2, at::kCPU, at::kFloat);
  const int64_t constant = state.bytes();
  state.reserve(10);
  state.layer(1).at("k").fill_(3);
  const int64_t ten = state.bytes() - constant;
  state.reserve(10);
  EXPECT_EQ(state.bytes() - constant, ten);
  state.reserve(11);
  EXPECT_EQ(state.bytes() - constant, 2 * ten);
  EXPECT_EQ(state.layer(1).at("k").narrow(1, 0, 10).mean().item<float>(), 3);
  EXPECT_EQ(ten, 2 * 10 * 2 * 8 * 4);  // slots, tokens, k and v, head_dim, bytes
  DecodeState kept = state.snapshot();
  state.layer(1).at("k").fill_(5);
  EXPECT_EQ(kept.layer(1).at("k").narrow(1, 0, 10).mean().item<float>(), 3);
}

}  // namespace
}  // namespace tessera
