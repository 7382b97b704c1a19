#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <numeric>

#include "layers/attention.hpp"
#include "layers/conv.hpp"
#include "layers/pieces.hpp"
#include "layers/ssd_scan.hpp"
#include "tessera/error.hpp"
#include "tests/support/on_ranks.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

int64_t sum(const std::vector<int64_t>& lengths) { return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}); }

class Normal {
 public:
  explicit Normal(uint64_t seed) : generator_(at::detail::createCPUGenerator(seed)) {}
  at::Tensor operator()(at::IntArrayRef shape) { return at::randn(shape, generator_, at::TensorOptions(at::kDouble)); }

 private:
  at::Generator generator_;
};

void on_two_three_four_ranks(const std::function<std::vector<RankProblem>(at::ScalarType)>& make) {
  for (const auto dtype : {at::kDouble, at::kFloat})
    for (const int64_t ranks : {2, 3, 4}) expect_ranks_agree(make(dtype), ranks, dtype);
}

// Widths that reach back over several chunks of a rank or two.
TEST(ContextParallel, ConvolutionTakesWhatLiesBeforeAPieceFromItsRanks) {
  on_two_three_four_ranks([](at::ScalarType dtype) {
    std::vector<RankProblem> problems;
    for (const auto& lengths : packings())
      for (const int64_t width : {1, 2, 4, 7}) {
        Normal normal(static_cast<uint64_t>(width));
        const int64_t n = sum(lengths), C = 6;
        problems.push_back({.name = fmt::format("conv of width {}", width),
                            .fn = [](Context& ctx, const std::vector<at::Tensor>& in) { return causal_conv1d(ctx, in[0], in[1], in[2], true); },
                            .lengths = lengths,
                            .inputs = {normal({n, C}), normal({C, 1, width}), normal({C})},
                            .cut = 1,
                            .dy = normal({n, C}),
                            .limit = tolerance(dtype, Op::kReduction, n)});
      }
    return problems;
  });
}

RankProblem scan(const std::vector<int64_t>& lengths, const SsdSizes& z, double decay, double limit) {
  Normal normal(5);
  const int64_t n = sum(lengths), H = z.num_heads, inner = H * z.head_dim;
  return {.name = fmt::format("scan, decay {}", decay),
          .fn = [z](Context& ctx, const std::vector<at::Tensor>& in) { return ssd_scan(ctx, in[0], in[1], in[2], in[3], in[4], z); },
          .lengths = lengths,
          .inputs = {normal({n, inner + 2 * z.num_groups * z.state_size}), normal({n, H}), normal({H}) - 2, normal({H}) * 0.5 + decay, normal({H})},
          .cut = 2,
          .dy = normal({n, inner}),
          .limit = limit};
}

// Slow decays carry states over many chunks, fast ones lose them in a few tokens.
TEST(ContextParallel, ScanCarriesItsStateOverTheRanks) {
  on_two_three_four_ranks([](at::ScalarType dtype) {
    std::vector<RankProblem> problems;
    for (const auto& lengths : packings())
      for (const double decay : {-4.0, 1.0})
        problems.push_back(scan(lengths, {.num_heads = 4, .head_dim = 5, .num_groups = 2, .state_size = 3, .chunk = 8}, decay, tolerance(dtype, Op::kScan, sum(lengths))));
    return problems;
  });
}

TEST(ContextParallel, ScanOfLongDocumentsKeepsItsPrecision) {
  std::vector<RankProblem> problems;
  for (const double decay : {-6.0, 2.5})
    problems.push_back(scan({700, 2300}, {.num_heads = 2, .head_dim = 8, .num_groups = 1, .state_size = 16, .chunk = 64}, decay, tolerance(at::kFloat, Op::kScan, 3000)));
  expect_ranks_agree(problems, 3, at::kFloat);
}

std::vector<RankProblem> attentions(const std::vector<std::vector<int64_t>>& packed, const std::vector<int64_t>& windows, at::ScalarType dtype) {
  std::vector<RankProblem> problems;
  for (const auto& lengths : packed)
    for (const int64_t window : windows) {
      Normal normal(static_cast<uint64_t>(window) + 1);
      const int64_t n = sum(lengths), H = 6, K = 2, P = 8;
      problems.push_back({.name = fmt::format("attention, window {}", window),
                          // Queries and keys are added: where a token sees itself alone, their gradients would be nothing but rounding.
                          .fn = [=](Context& ctx, const std::vector<at::Tensor>& in) {
                            return attention(ctx, in[0], in[1], in[2], 0.4, window) + in[0] + in[1].repeat_interleave(H / K, 1);
                          },
                          .lengths = lengths,
                          .inputs = {normal({n, H, P}), normal({n, K, P}), normal({n, K, P})},
                          .cut = 3,
                          .dy = normal({n, H, P}),
                          .limit = tolerance(dtype, Op::kMatmul, n)});
    }
  return problems;
}

TEST(ContextParallel, AttentionSeesTheKeysOfEarlierPieces) {
  on_two_three_four_ranks([](at::ScalarType dtype) { return attentions(packings(), {0, 1, 2, 19}, dtype); });
}

// More queries than a mask holds at once, and windows longer and shorter than a piece.
TEST(ContextParallel, AttentionOfLongPiecesGoesInBlocks) {
  expect_ranks_agree(attentions({{150, 2700}}, {0, 40, 1200}, at::kFloat), 2, at::kFloat);
}

TEST(ContextParallel, BFloat16RoundsOnlyWhatItExchanges) {
  std::vector<RankProblem> problems = attentions({{5, 1, 164, 3}, {9}}, {0, 19}, at::kBFloat16);
  for (const std::vector<int64_t>& lengths : {std::vector<int64_t>{5, 1, 164, 3}, {9}})
    problems.push_back(scan(lengths, {.num_heads = 4, .head_dim = 5, .num_groups = 2, .state_size = 3, .chunk = 8}, -1, tolerance(at::kBFloat16, Op::kScan)));
  expect_ranks_agree(problems, 2, at::kBFloat16);
}

TEST(ContextParallel, WhatDoesNotFitIsAnError) {
  const Spans whole = Spans::documents({5, 3});
  const ContextCut cut(whole, 1, 0);
  Context ctx(whole);
  ctx.set_cut(&cut);
  const auto message = [&](const at::Tensor& x, const at::Tensor& state) {
    try {
      causal_conv1d(ctx, x, at::zeros({2, 1, 4}), {}, true, state);
    } catch (const Error& error) {
      return error.message();
    }
    return std::string("none");
  };
  EXPECT_EQ(message(at::zeros({7, 2}), {}), "[causal_conv1d] context-parallel rank 0 holds 8 rows of the micro-batch, got 7 rows and spans of 8");
  EXPECT_EQ(message(at::zeros({8, 2}), at::zeros({2, 2, 3})), "[causal_conv1d] a decode state belongs to whole documents, but context-parallel rank 0 holds pieces");
}

TEST(ContextParallel, PiecesSayWhatGoesOn) {
  // Chunks [0, 3), [3, 6), [6, 9), [9, 13) of documents [0, 2), [2, 10), [10, 13).
  const auto pieces = pieces_of(ContextCut(Spans::documents({2, 8, 3}), 2, 0));
  const auto numbers = [](const Piece& p) { return std::vector<int64_t>{p.before, p.head, p.tail, p.through()}; };
  EXPECT_EQ(numbers(pieces[0]), (std::vector<int64_t>{0, 0, 1, 0}));
  EXPECT_EQ(numbers(pieces[1]), (std::vector<int64_t>{1, 3, 3, 1}));
  EXPECT_EQ(numbers(pieces[2]), (std::vector<int64_t>{4, 3, 3, 1}));
  EXPECT_EQ(numbers(pieces[3]), (std::vector<int64_t>{7, 1, 0, 0}));
}

}  // namespace
}  // namespace tessera
