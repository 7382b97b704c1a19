#include "layers/linear.hpp"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include "tessera/error.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/gradients.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

at::Tensor by_expert(const at::Tensor& x_md, const at::Tensor& w_eod, const std::vector<int64_t>& counts) {
  std::vector<at::Tensor> parts;
  for (int64_t e = 0, row = 0; e < w_eod.size(0); row += counts[e++]) parts.push_back(at::linear(x_md.narrow(0, row, counts[e]), w_eod[e]));
  return at::cat(parts, 0);
}

std::string message(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const Error& e) {
    return e.message();
  }
  return "no error";
}

TEST(Linear, TakesTheWeightsDtype) {
  const auto x = at::randn({3, 8}, at::kBFloat16), w = at::randn({5, 8}, at::kFloat), b = at::randn({5}, at::kFloat);
  const auto y = tessera::linear(x, w, b);
  EXPECT_EQ(y.scalar_type(), at::kFloat);
  EXPECT_TRUE(close(y, at::linear(x.to(at::kFloat), w, b), tolerance(at::kFloat, Op::kMatmul, 8)));
}

TEST(Linear, PartialSumsAddTheBiasOnceOverTheRanks) {
  Param row{.name = "o.bias"};
  const auto x = at::randn({3, 8}, at::kDouble), w = at::randn({5, 8}, at::kDouble), b = at::randn({5}, at::kDouble);
  const auto spans = Spans::uniform(1, 3);
  Context ctx(spans);
  ctx.set_mesh({.tp = 4});
  auto sum = at::zeros({3, 5}, at::kDouble);
  for (int64_t r = 0; r < 4; ++r)
    sum = sum + partial_sum_linear(ctx, x.narrow(1, 2 * r, 2), Weight(w.narrow(1, 2 * r, 2), &row), Weight(b, &row));
  EXPECT_TRUE(close(sum, at::linear(x, w, b), tolerance(at::kDouble, Op::kMatmul, 8)));
}

TEST(Linear, NamesTheShapesThatDoNotFit) {
  EXPECT_EQ(message([] { tessera::linear(at::randn({3, 8}), at::randn({5, 7})); }),
            "[linear] x [N, D] and weight [O, D] must share D, got x [3, 8] and weight [5, 7]");
  EXPECT_EQ(message([] { tessera::linear(at::randn({3, 8}), at::randn({5, 8}), at::randn({4})); }),
            "[linear] bias must be [O] for weight [O, D], got bias [4] and weight [5, 8]");
}

class GroupedLinear : public testing::TestWithParam<std::vector<int64_t>> {};

TEST_P(GroupedLinear, EqualsALoopOverExperts) {
  const auto counts = GetParam();
  const auto E = static_cast<int64_t>(counts.size());
  int64_t rows = 0;
  for (const auto n : counts) rows += n;
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const auto x = at::randn({rows, 24}, dtype), w = at::randn({E, 40, 24}, dtype), dy = at::randn({rows, 40}, dtype);
    const auto fast = with_gradients([&](const auto& in) { return grouped_linear(in[0], in[1], at::tensor(counts, at::kLong)); }, {x, w}, dy);
    const auto want = with_gradients([&](const auto& in) { return by_expert(in[0], in[1], counts); },
                                     {x.to(at::kDouble), w.to(at::kDouble)}, dy);
    const auto limit = tolerance(dtype, Op::kMatmul, 130);
    EXPECT_EQ(fast.output.scalar_type(), dtype);
    EXPECT_TRUE(close(fast.output, want.output, limit));
    for (size_t i = 0; i < 2; ++i) EXPECT_TRUE(close(fast.gradients[i], want.gradients[i], limit)) << i;
    for (int64_t e = 0; e < E; ++e) {
      if (counts[e] == 0) {
        EXPECT_EQ(fast.gradients[1][e].ne(0).sum().item<int64_t>(), 0) << "starved expert " << e;
      }
    }
  }
}

// Several tiles of a GPU's kernels in every direction, whole 16-byte vectors and not, and fewer rows than a tile.
TEST(GroupedLinear, SizesBeyondATile) {
  const std::vector<int64_t> counts{131, 0, 5, 128, 1};
  for (const auto& [O, D] : {std::pair<int64_t, int64_t>{136, 72}, {40, 264}, {131, 37}}) {
    const auto x = at::randn({265, D}, at::kBFloat16), w = at::randn({5, O, D}, at::kBFloat16), dy = at::randn({265, O}, at::kBFloat16);
    const auto fast = with_gradients([&](const auto& in) { return grouped_linear(in[0], in[1], at::tensor(counts, at::kLong)); }, {x, w}, dy);
    const auto want = with_gradients([&](const auto& in) { return by_expert(in[0], in[1], counts); }, {x.to(at::kDouble), w.to(at::kDouble)}, dy);
    const auto limit = tolerance(at::kBFloat16, Op::kMatmul, 265);
    EXPECT_TRUE(close(fast.output, want.output, limit));
    for (size_t i = 0; i < 2; ++i) EXPECT_TRUE(close(fast.gradients[i], want.gradients[i], limit)) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Counts, GroupedLinear,
                         testing::Values(std::vector<int64_t>{1}, std::vector<int64_t>{63, 0, 130}, std::vector<int64_t>{0, 0, 7, 0},
                                         std::vector<int64_t>{0, 0}));

// Threads that take experts of their own are in the caller's mode.
TEST(GroupedLinear, IsTheSameInInferenceMode) {
  const int threads = at::get_num_threads();
  at::set_num_threads(2);
  const auto x = at::randn({400, 64}), w = at::randn({4, 48, 64});
  const auto counts = at::tensor(std::vector<int64_t>{100, 120, 80, 100}, at::kLong);
  const auto want = grouped_linear(x, w, counts);
  const c10::InferenceMode inference;
  EXPECT_TRUE(bit_equal(grouped_linear(x, w, counts), want));
  at::set_num_threads(threads);
}

TEST(GroupedLinear, AgreesWithFiniteDifferences) {
  const auto x = at::randn({5, 3}, at::kDouble), w = at::randn({3, 2, 3}, at::kDouble), dy = at::randn({5, 2}, at::kDouble);
  const TensorFn fn = [](const auto& in) { return grouped_linear(in[0], in[1], at::tensor(std::vector<int64_t>{2, 0, 3}, at::kLong)); };
  const auto got = with_gradients(fn, {x, w}, dy);
  for (size_t i = 0; i < 2; ++i)
    EXPECT_TRUE(close(got.gradients[i], finite_difference(fn, {x, w}, i, dy), tolerance(at::kDouble, Op::kFiniteDifference)));
}

TEST(GroupedLinear, NamesCountsThatDoNotFit) {
  const auto x = at::randn({5, 3}), w = at::randn({2, 4, 3});
  EXPECT_EQ(message([&] { grouped_linear(x, w, at::tensor(std::vector<int64_t>{2, 2}, at::kLong)); }),
            "[grouped_linear] counts must sum to the rows of x, got sum 4 and x [5, 3]");
  EXPECT_EQ(message([&] { grouped_linear(x, w, at::tensor(std::vector<int64_t>{6, -1}, at::kLong)); }),
            "[grouped_linear] counts must not be negative, got [6, -1]");
  EXPECT_EQ(message([&] { grouped_linear(x, w, at::tensor(std::vector<int64_t>{5}, at::kLong)); }),
            "[grouped_linear] counts must be int64 [E] for weight [E, O, D], got Long [1] and weight [2, 4, 3]");
}

}  // namespace
}  // namespace tessera
