// Random numbers: what they depend on and what not, their distribution, and dropout's derivative.
#include "layers/random.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "tessera/error.hpp"
#include "tests/support/compare.hpp"

namespace tessera {
namespace {

struct Drawing {
  Spans spans;
  Context ctx{spans};
  explicit Drawing(int64_t tokens, int64_t first_token = 0, std::string layer = "layers.0.", int64_t seed = 7) : spans(Spans::uniform(1, tokens)), ctx(spans) {
    ctx.set_training(true);
    ctx.set_draws({.seed = seed, .layer = std::move(layer), .token_n = at::arange(first_token, first_token + tokens, at::TensorOptions(at::kLong))});
  }
};

TEST(Random, TheFastFormIsThePlainOne) {
  for (const int64_t first_token : {int64_t{0}, int64_t{1} << 31, (int64_t{1} << 40) + 5})
    for (const auto& [width, first] : {std::pair<int64_t, int64_t>{1, 0}, {4, 0}, {13, 0}, {13, 3}, {5, 6}, {64, 128}, {3, (int64_t{1} << 34) + 1}}) {
      const Drawing d(29, first_token);
      EXPECT_TRUE(bit_equal(uniform(d.ctx, "x", width, first), uniform_ref(d.ctx, "x", width, first))) << width << " from " << first;
    }
  const Drawing none(1);
  EXPECT_EQ(uniform(none.ctx, "x", 0).sizes(), at::IntArrayRef({1, 0}));
  EXPECT_EQ(uniform_ref(none.ctx, "x", 0).sizes(), at::IntArrayRef({1, 0}));
}

TEST(Random, DependsOnTheTokenAndTheColumnAlone) {
  const Drawing all(40);
  const at::Tensor whole = uniform(all.ctx, "x", 32);
  EXPECT_TRUE(bit_equal(uniform(all.ctx, "x", 32), whole));
  const Drawing later(25, 15);
  EXPECT_TRUE(bit_equal(uniform(later.ctx, "x", 32), whole.narrow(0, 15, 25))) << "the same tokens in another batch";
  EXPECT_TRUE(bit_equal(at::cat({uniform(all.ctx, "x", 7, 0), uniform(all.ctx, "x", 25, 7)}, 1), whole)) << "columns cut over two ranks";
}

TEST(Random, DiffersWithSeedLayerNameTokenAndColumn) {
  const Drawing d(64);
  const at::Tensor x = uniform(d.ctx, "x", 64);
  for (const at::Tensor& other : {uniform(d.ctx, "y", 64), uniform(Drawing(64, 64).ctx, "x", 64), uniform(d.ctx, "x", 64, 64), uniform(Drawing(64, 0, "layers.1.").ctx, "x", 64),
                                  uniform(Drawing(64, 0, "layers.0.", 8).ctx, "x", 64)}) {
    EXPECT_LT(x.eq(other).sum().item<int64_t>(), 5);
    const double correlation = ((x - 0.5) * (other - 0.5)).mean().item<double>() * 12;
    EXPECT_LT(std::abs(correlation), 5.0 / 64) << "five standard deviations";
  }
}

TEST(Random, IsUniform) {
  const Drawing d(1 << 12);
  const at::Tensor x = uniform(d.ctx, "x", 256).to(at::kDouble);
  const double n = static_cast<double>(x.numel());
  EXPECT_GE(x.min().item<double>(), 0);
  EXPECT_LT(x.max().item<double>(), 1);
  EXPECT_NEAR(x.mean().item<double>(), 0.5, 5 * std::sqrt(1 / 12.0 / n));
  EXPECT_NEAR((x - 0.5).square().mean().item<double>(), 1 / 12.0, 5 * std::sqrt(1 / 180.0 / n));
  double chi = 0;  // of 64 bins
  for (int64_t b = 0; b < 64; ++b) {
    const double count = x.mul(64).floor().eq(b).sum().item<double>();
    chi += (count - n / 64) * (count - n / 64) / (n / 64);
  }
  EXPECT_NEAR(chi, 63, 5 * std::sqrt(2 * 63.0));
}

TEST(Dropout, ZeroesTheShareItShouldAndScalesTheRest) {
  const Drawing d(512);
  const at::Tensor ones = at::ones({512, 128}), kept = dropout(d.ctx, ones, 0.3, "mask");
  EXPECT_TRUE((kept.eq(0) | kept.eq(static_cast<float>(1 / 0.7))).all().item<bool>());
  EXPECT_NEAR(kept.eq(0).to(at::kDouble).mean().item<double>(), 0.3, 5 * std::sqrt(0.21 / (512 * 128)));
  EXPECT_TRUE(bit_equal(dropout(d.ctx, ones.to(at::kBFloat16), 0.3, "mask").ne(0), kept.ne(0))) << "the mask is that of every dtype";
  EXPECT_TRUE(dropout(d.ctx, ones, 0, "mask").is_same(ones));
}

TEST(Dropout, ItsGradientHasTheSameMask) {
  const Drawing d(33);
  const at::Tensor x = at::randn({33, 17}).set_requires_grad(true), y = dropout(d.ctx, x, 0.4, "mask", 5);
  torch::autograd::backward({(y * 3).sum()}, {});
  const at::Tensor factor = at::where(y.ne(0), 3 / 0.6, 0.0).to(at::kFloat);
  EXPECT_TRUE(at::allclose(x.grad(), factor, 1e-6)) << x.grad();
}

TEST(Dropout, IsNothingOutsideOfTraining) {
  Drawing d(8);
  Context evaluation(d.spans);
  const at::Tensor x = at::ones({8, 3});
  EXPECT_TRUE(dropout(evaluation, x, 0.5, "mask").is_same(x));
}

TEST(Random, MistakesOfABlockAreTold) {
  Drawing d(8);
  Context evaluation(d.spans);
  const auto message = [](const std::function<void()>& call) {
    try {
      call();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kPlugin);
      return std::string(error.message());
    }
    return std::string("none");
  };
  EXPECT_EQ(message([&] { uniform(evaluation, "noise", 3); }), "draws 'noise' outside of training");
  EXPECT_EQ(message([&] { uniform(d.ctx, "noise", -3); }), "draws -3 columns of 'noise' from column 0");
  EXPECT_EQ(message([&] { dropout(d.ctx, at::ones({8, 2}), 1, "mask"); }), "dropout of 'mask' needs a probability in [0, 1), got 1");
  EXPECT_EQ(message([&] { dropout(d.ctx, at::ones({7, 2}), 0.5, "mask"); }), "dropout of 'mask' got 7 rows of 8 tokens");
  EXPECT_EQ(message([&] { dropout(d.ctx, at::ones({8}), 0.5, "mask"); }), "dropout of 'mask' takes [tokens, columns], got 1 dimensions");
}

}  // namespace
}  // namespace tessera
