#include "layers/activation.hpp"

#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/support/compare.hpp"
#include "tests/support/gradients.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

TEST(Relu2, EqualsTheComposition) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16})
    for (const int64_t rows : {0, 1, 63, 130, 500}) {
      const auto x = at::randn({rows, 37}, dtype), dy = at::randn({rows, 37}, dtype);
      const auto fast = with_gradients([](const auto& in) { return relu2(in[0]); }, {x}, dy);
      const auto want = with_gradients([](const auto& in) { return relu2_ref(in[0]); }, {x.to(at::kDouble)}, dy);
      EXPECT_EQ(fast.output.scalar_type(), dtype);
      EXPECT_TRUE(close(fast.output, want.output, tolerance(dtype, Op::kElementwise)));
      EXPECT_TRUE(close(fast.gradients[0], want.gradients[0], tolerance(dtype, Op::kElementwise)));
    }
}

TEST(Relu2, TakesStridedInput) {
  const auto x = at::randn({12, 7}).t(), dy = at::randn({12, 7}).t();
  const auto fast = with_gradients([](const auto& in) { return relu2(in[0]); }, {x}, dy);
  const auto want = with_gradients([](const auto& in) { return relu2_ref(in[0]); }, {x}, dy);
  EXPECT_TRUE(close(fast.output, want.output, tolerance(at::kFloat, Op::kElementwise)));
  EXPECT_TRUE(close(fast.gradients[0], want.gradients[0], tolerance(at::kFloat, Op::kElementwise)));
}

TEST(Relu2, TakesASliceThatBeginsAnywhere) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto x = at::randn({40, 37}, dtype).narrow(0, 1, 39);
    EXPECT_TRUE(bit_equal(relu2(x), relu2(x.clone())));
  }
}

TEST(Relu2, KeepsNan) {
  const auto nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto y = relu2(at::tensor({-1.f, nan, 2.f}).to(dtype)).to(at::kFloat);
    EXPECT_EQ(y[0].item<float>(), 0.f);
    EXPECT_TRUE(std::isnan(y[1].item<float>()));
    EXPECT_EQ(y[2].item<float>(), 4.f);
  }
}

}  // namespace
}  // namespace tessera
