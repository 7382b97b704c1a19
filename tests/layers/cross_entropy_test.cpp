#include "layers/cross_entropy.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <ostream>

#include "tessera/error.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/gradients.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

struct Case {
  int64_t tokens, words, every;  // every `every`-th target is not valid; 0: all valid
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << fmt::format("{} tokens, {} words, every {}th without a target", c.tokens, c.words, c.every);
}

at::Tensor targets(const Case& c) {
  auto t = at::randint(c.words, {c.tokens}, at::kLong);
  for (int64_t i = 0; c.every > 0 && i < c.tokens; i += c.every) t[i].fill_(-1);
  return t;
}

class CrossEntropy : public testing::TestWithParam<Case> {};

TEST_P(CrossEntropy, EqualsTheCompositionWhateverTheChunk) {
  const auto c = GetParam();
  const auto t = targets(c);
  const auto g = at::scalar_tensor(0.37, at::kDouble);
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const auto h = at::randn({c.tokens, 33}, dtype), w = at::randn({c.words, 33}, dtype);
    const TensorFn ref = [&](const auto& in) { return linear_cross_entropy_ref(in[0], in[1], t); };
    const auto plain = with_gradients(ref, {h, w}, g), want = with_gradients(ref, {h.to(at::kDouble), w.to(at::kDouble)}, g);
    // Logits are rounded to the compute dtype, which the exponential amplifies in the composition as well.
    const auto limit = [&](const at::Tensor& p, const at::Tensor& b) {
      return std::max(tolerance(dtype, Op::kMatmul, 300), kErrorFactor * relative_rms(p, b));
    };
    const auto loss_limit = limit(plain.output, want.output);
    for (const int64_t chunk : {1, 7, 0}) {
      const auto got = with_gradients([&](const auto& in) { return linear_cross_entropy(in[0], in[1], t, nullptr, chunk); }, {h, w}, g);
      EXPECT_EQ(got.output.dim(), 0);
      EXPECT_EQ(got.output.scalar_type(), dtype == at::kDouble ? at::kDouble : at::kFloat);
      EXPECT_TRUE(close(got.output, want.output, loss_limit)) << c10::toString(dtype) << " chunk " << chunk;
      for (size_t i = 0; i < 2; ++i) {
        EXPECT_EQ(got.gradients[i].scalar_type(), dtype);
        EXPECT_TRUE(close(got.gradients[i], want.gradients[i], limit(plain.gradients[i], want.gradients[i])))
            << c10::toString(dtype) << " chunk " << chunk << " input " << i;
      }
      const auto each = cross_entropy_per_token(h, w, t, nullptr, chunk);
      EXPECT_TRUE(close(each.sum(), want.output, loss_limit));
      EXPECT_EQ(each.masked_select(t.lt(0)).ne(0).sum().item<int64_t>(), 0);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, CrossEntropy,
                         testing::Values(Case{1, 5, 0}, Case{63, 257, 4}, Case{130, 16, 1000}, Case{130, 300, 2}, Case{20, 1, 0}));
// Rows that a block of a GPU's kernel takes in several turns, in part longer than its shared memory, and such as begin anywhere.
INSTANTIATE_TEST_SUITE_P(Long, CrossEntropy, testing::Values(Case{3, 9001, 3}, Case{2, 16384, 0}, Case{2, 90005, 0}));

TEST(CrossEntropy, TopWordIsTheOnlyGreatest) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16})
    for (const int64_t words : {2, 50, 17000}) {
      const auto c = Case{21, words, 5};
      const auto t = targets(c), h = at::randn({c.tokens, 4}, dtype), w = at::randn({words, 4}, dtype);
      const auto logits = at::matmul(h.to(at::kDouble), w.to(at::kDouble).t());
      t.narrow(0, 6, 4).copy_(logits.narrow(0, 6, 4).argmax(1));
      w[1].copy_(w[0]);  // two words with the same logit
      const auto same = at::matmul(h, w.t()).to(at::kDouble), picked = same.gather(1, t.clamp_min(0).unsqueeze(1));
      const auto want = t.ge(0).logical_and(same.ge(picked).sum({1}).eq(1));
      EXPECT_TRUE(bit_equal(top_word_is(h, w, t, nullptr, 7), want)) << words << c10::toString(dtype);
    }
}

TEST(CrossEntropy, AgreesWithFiniteDifferences) {
  const auto t = targets({7, 5, 3});
  const auto h = at::randn({7, 4}, at::kDouble), w = at::randn({5, 4}, at::kDouble), g = at::scalar_tensor(1.7, at::kDouble);
  const TensorFn fn = [&](const auto& in) { return linear_cross_entropy(in[0], in[1], t, nullptr, 3); };
  const auto got = with_gradients(fn, {h, w}, g);
  for (size_t i = 0; i < 2; ++i)
    EXPECT_TRUE(close(got.gradients[i], finite_difference(fn, {h, w}, i, g), tolerance(at::kDouble, Op::kFiniteDifference)));
}

TEST(CrossEntropy, NoTargetMeansNoLossAndNoGradient) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16})
    for (const int64_t tokens : {0, 9}) {
      const auto got = with_gradients([&](const auto& in) { return linear_cross_entropy(in[0], in[1], at::full({tokens}, -1, at::kLong)); },
                                      {at::randn({tokens, 8}, dtype), at::randn({11, 8}, dtype)}, at::scalar_tensor(1.0));
      EXPECT_EQ(got.output.item<double>(), 0);
      for (const auto& d : got.gradients) EXPECT_EQ(d.ne(0).sum().item<int64_t>(), 0);
      EXPECT_EQ(got.gradients[1].size(0), 11);
    }
}

TEST(CrossEntropy, GradientsOnlyWhereTheyAreWanted) {
  const auto t = targets({9, 11, 0});
  auto h = at::randn({9, 8}), w = at::randn({11, 8});
  EXPECT_FALSE(linear_cross_entropy(h, w, t).requires_grad());
  const auto both = with_gradients([&](const auto& in) { return linear_cross_entropy(in[0], in[1], t); }, {h, w}, at::scalar_tensor(1.0));
  const auto of_h = with_gradients([&](const auto& in) { return linear_cross_entropy(in[0], w, t); }, {h}, at::scalar_tensor(1.0));
  const auto of_w = with_gradients([&](const auto& in) { return linear_cross_entropy(h, in[0], t); }, {w}, at::scalar_tensor(1.0));
  EXPECT_TRUE(bit_equal(of_h.gradients[0], both.gradients[0]));
  EXPECT_TRUE(bit_equal(of_w.gradients[0], both.gradients[1]));
}

TEST(CrossEntropy, LargeLogitsStayFinite) {
  const auto t = targets({17, 40, 0});
  const auto h = at::randn({17, 8}) * 1000, w = at::randn({40, 8}) * 10;
  const auto got = with_gradients([&](const auto& in) { return linear_cross_entropy(in[0], in[1], t); }, {h, w}, at::scalar_tensor(1.0));
  const auto want = with_gradients([&](const auto& in) { return linear_cross_entropy_ref(in[0], in[1], t); },
                                   {h.to(at::kDouble), w.to(at::kDouble)}, at::scalar_tensor(1.0));
  EXPECT_TRUE(close(got.output, want.output, tolerance(at::kFloat, Op::kMatmul)));
}

TEST(CrossEntropy, NamesWhatDoesNotFit) {
  const auto h = at::randn({2, 8}), w = at::randn({11, 8});
  const auto message = [&](const at::Tensor& head, const at::Tensor& t) -> std::string {
    try {
      linear_cross_entropy(h, head, t);
    } catch (const Error& e) {
      return e.message();
    }
    return "no error";
  };
  EXPECT_EQ(message(at::randn({11, 7}), at::zeros({2}, at::kLong)),
            "[linear_cross_entropy] h [N, D] and lm_head [V, D] must share D, got h [2, 8] and lm_head [11, 7]");
  EXPECT_EQ(message(w, at::zeros({3}, at::kLong)), "[linear_cross_entropy] targets must be int64 [N], got Long [3] for h [2, 8]");
  EXPECT_EQ(message(w, at::full({2}, 11, at::kLong)), "[linear_cross_entropy] targets must lie below the vocabulary's 11, got 11");
}

}  // namespace
}  // namespace tessera
