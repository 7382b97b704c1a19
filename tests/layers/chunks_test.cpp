// Chunks hold every token once, in order, and tokens of one span only.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include "layers/chunks.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/gradients.hpp"

namespace tessera {
namespace {

TEST(Chunks, LieByPlaceWithTheLongestSpansFirst) {
  const Spans spans = Spans::documents({1, 7, 4, 9});  // rows 0, 1, 8, 12
  const Chunks chunks(spans, 4, at::kCPU);
  EXPECT_EQ(chunks.length(), 4);
  EXPECT_EQ(chunks.at_place(), (std::vector<int64_t>{4, 2, 1}));
  EXPECT_EQ(chunks.order(), (std::vector<int64_t>{3, 1, 0, 2}));
  const at::Tensor x = at::arange(1, 22, at::kDouble).unsqueeze(1), split = chunks.split(x);
  const at::Tensor want = at::tensor(at::ArrayRef<double>({13, 14, 15, 16, 2, 3, 4, 5, 1, 0, 0, 0, 9, 10, 11, 12, 17, 18, 19, 20, 6, 7, 8, 0, 21, 0, 0, 0}), at::kDouble);
  EXPECT_TRUE(bit_equal(split, want.view({7, 4, 1})));
  EXPECT_TRUE(bit_equal(chunks.join(split), x));
}

TEST(Chunks, AreNoLongerThanTheLongestSpan) {
  const Chunks chunks(Spans::documents({1, 1, 1}), 64, at::kCPU);
  EXPECT_EQ(chunks.length(), 1);
  EXPECT_EQ(chunks.at_place(), (std::vector<int64_t>{3}));
}

TEST(Chunks, GradientsComeBackToTheirTokens) {
  const Chunks chunks(Spans::documents({5, 63, 130}), 16, at::kCPU);
  const at::Tensor x = at::arange(198 * 3, at::kDouble).view({198, 3});
  const auto there_and_back = with_gradients([&](const auto& in) { return chunks.join(chunks.split(in[0])); }, {x}, x);
  EXPECT_TRUE(bit_equal(there_and_back.gradients[0], x));
  const auto squared = with_gradients([&](const auto& in) { return chunks.split(in[0]).square(); }, {x}, at::ones({14, 16, 3}, at::kDouble));
  EXPECT_TRUE(bit_equal(squared.gradients[0], x * 2));
}

}  // namespace
}  // namespace tessera
