#include "layers/rope.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tessera/error.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/gradients.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

TEST(Rope, TurnsEveryPairByItsAngle) {
  const int64_t P = 6;
  const double theta = 10000;
  const auto x = at::randn({5, 2, P}, at::kDouble);
  const auto positions = at::tensor(std::vector<int64_t>{0, 1, 7, 0, 4095}, at::kLong);
  const auto y = rope(x, positions, theta);
  for (int64_t n = 0; n < 5; ++n)
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t p = 0; p < P / 2; ++p) {
        const double angle = positions[n].item<int64_t>() * std::pow(theta, -2.0 * p / P);
        const double a = x[n][h][p].item<double>(), b = x[n][h][p + P / 2].item<double>();
        EXPECT_NEAR(y[n][h][p].item<double>(), a * std::cos(angle) - b * std::sin(angle), tolerance(at::kDouble, Op::kReduction));
        EXPECT_NEAR(y[n][h][p + P / 2].item<double>(), b * std::cos(angle) + a * std::sin(angle), tolerance(at::kDouble, Op::kReduction));
      }
}

TEST(Rope, ScoresDependOnTheDistanceAlone) {
  const auto q = at::randn({1, 1, 16}, at::kDouble), k = at::randn({1, 1, 16}, at::kDouble);
  const auto score = [&](int64_t i, int64_t j) {
    const auto at_position = [](int64_t p) { return at::tensor(std::vector<int64_t>{p}, at::kLong); };
    return (rope(q, at_position(i), 500.0) * rope(k, at_position(j), 500.0)).sum();
  };
  EXPECT_TRUE(close(score(1005, 1000), score(5, 0), tolerance(at::kDouble, Op::kReduction)));
}

TEST(Rope, SinglePrecisionAndGradients) {
  const auto positions = at::arange(63, at::kLong) * 1000;
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto x = at::randn({63, 3, 32}, dtype), dy = at::randn({63, 3, 32}, dtype);
    const TensorFn fn = [&](const auto& in) { return rope(in[0], positions, 10000); };
    const auto got = with_gradients(fn, {x}, dy), want = with_gradients(fn, {x.to(at::kDouble)}, dy);
    EXPECT_EQ(got.output.scalar_type(), dtype);
    EXPECT_TRUE(close(got.output, want.output, tolerance(dtype, Op::kElementwise)));
    EXPECT_TRUE(close(got.gradients[0], want.gradients[0], tolerance(dtype, Op::kElementwise)));
  }
}

TEST(Rope, RefusesAnOddWidth) { EXPECT_THROW(rope(at::randn({2, 1, 5}), at::arange(2, at::kLong), 10000), Error); }

}  // namespace
}  // namespace tessera
