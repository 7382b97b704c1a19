// Conformance: gradients, recomputation, counts and losses of a block.
#include <ATen/ops/isfinite.h>

#include "tests/support/conformance.hpp"
#include "tests/support/directional.hpp"

namespace tessera::conformance {

// In fp64 the operators run as plain compositions: this holds their wiring and derivatives. The next test ties the fast ones to them.
TEST_P(Conformance, GradientsAreThoseOfFiniteDifferences) {
  Built built(text(), {.dtype = at::kDouble});
  const Batch batch = random_batch({1, 21, 34}, kVocab);
  backward(built.model, batch);
  for (const std::string& name : parameter_names(built.plan))
    for (uint64_t seed : {11, 12}) {
      const double error = directional_error(built.model, batch, name, seed, 1e-5), limit = tolerance(at::kDouble, Op::kFiniteDifference);
      if (!(error <= limit)) ADD_FAILURE() << fmt::format("{}: its gradient in fp64 differs from finite differences by {:.2g} of its size, at most {:.2g} is rounding", name, error, limit);
    }
}

TEST_P(Conformance, GradientsInFp32AreThoseInFp64) {
  Built plain(text()), exact(text(), {.dtype = at::kDouble});
  const Batch batch = random_batch({1, 63, 130}, kVocab);
  backward(plain.model, batch);
  backward(exact.model, batch);
  for (const std::string& name : parameter_names(plain.plan)) expect(close(plain.store.gradient(name), exact.store.gradient(name), kStackTolerance), name + ": its gradient in fp32 against fp64");
}

TEST_P(Conformance, RecomputationGivesEqualGradients) {
  Built kept(text()), again(text(), {.recompute = {"*"}});
  const Batch batch = random_batch({1, 63, 130}, kVocab);
  EXPECT_EQ(total_loss(kept.model, batch), total_loss(again.model, batch)) << "two forward passes over the same batch differ";
  backward(kept.model, batch);
  backward(again.model, batch);
  for (const std::string& name : parameter_names(kept.plan))
    expect(bit_equal(again.store.gradient(name), kept.store.gradient(name)), name + ": its gradient with activations recomputed, against kept ones (what may differ between two passes belongs in ctx.once)");
}

TEST_P(Conformance, CountsAndLossesEnterOnceInRecomputation) {
  Built kept(text()), again(text(), {.recompute = {"*"}});
  const Batch batch = random_batch({9, 30}, kVocab);
  const auto counts = [&](Built& built) {
    draw_alike();
    at::AutoGradMode grad_mode(true);
    torch::autograd::backward({built.model.loss(batch, denominators(built.plan, batch), true).total}, {});
    return built.model.take_counts();
  };
  const LayerCounts first = counts(kept), second = counts(again);
  EXPECT_EQ(first.size(), second.size());
  for (const auto& [prefix, by_name] : first)
    for (const auto& [name, count] : by_name) expect(bit_equal(second.at(prefix).at(name), count), prefix + name + ": counts with activations recomputed, against kept ones");
  kept.model.loss(batch, denominators(kept.plan, batch), false);
  EXPECT_TRUE(kept.model.take_counts().empty()) << "evaluation counted";
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
  for (const std::string& name : parameter_names(kept.plan)) expect(bit_equal(again.store.gradient(name), kept.store.gradient(name)), name + ": its gradient with activations recomputed, against kept ones");
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

}  // namespace tessera::conformance
