#include <ATen/TensorOperators.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>

#include "layers/attention.hpp"
#include "tessera/error.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

// Token by token as the definition says, in fp64: k_ntp holds all keys of span i up to its last token.
at::Tensor plain(const at::Tensor& q_nhp, const std::vector<at::Tensor>& keys_of_span, const Spans& spans, double scale, int64_t window) {
  const auto H = q_nhp.size(1), P = q_nhp.size(2);
  const auto sums = at::zeros({H}, at::kDouble);
  const auto q = q_nhp.to(at::kDouble).contiguous();
  for (int64_t s = 0; s < spans.size(); ++s) {
    const Span& span = spans.list()[s];
    const auto k = keys_of_span[s].to(at::kDouble).contiguous();
    for (int64_t i = 0; i < span.length; ++i)
      for (int64_t h = 0; h < H; ++h) {
        const int64_t last = span.start + i, first = window > 0 ? std::max<int64_t>(0, last - window + 1) : 0, kv = h / (H / k.size(1));
        std::vector<double> e;
        double sum = 0, entropy = 0;
        for (int64_t j = first; j <= last; ++j) {
          double score = 0;
          for (int64_t p = 0; p < P; ++p) score += q.const_data_ptr<double>()[((spans.rows()[s] + i) * H + h) * P + p] * k.const_data_ptr<double>()[(j * k.size(1) + kv) * P + p];
          e.push_back(std::exp(scale * score)), sum += e.back();
        }
        for (const double x : e) entropy -= x / sum * std::log(x / sum);
        sums.mutable_data_ptr<double>()[h] += entropy;
      }
  }
  return sums / static_cast<double>(spans.num_tokens());
}

std::vector<at::Tensor> keys_of(const at::Tensor& k_nkp, const Spans& spans) {
  std::vector<at::Tensor> out;
  for (int64_t s = 0; s < spans.size(); ++s) out.push_back(k_nkp.narrow(0, spans.rows()[s], spans.list()[s].length));
  return out;
}

TEST(AttentionEntropy, EqualsTheDefinition) {
  for (const auto& lengths : {std::vector<int64_t>{1}, std::vector<int64_t>{70}, std::vector<int64_t>{33, 1, 41}})
    for (const int64_t window : {0, 1, 7, 1000})
      for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
        const Spans spans = Spans::documents(lengths);
        const auto q = at::randn({spans.num_tokens(), 6, 8}, dtype), k = at::randn({spans.num_tokens(), 2, 8}, dtype);
        const auto got = attention_entropy(q, k, spans, 0.6, window);
        ASSERT_EQ(got.sizes(), (at::IntArrayRef{6}));
        EXPECT_EQ(got.scalar_type(), at::kDouble);
        EXPECT_TRUE(close(got, plain(q, keys_of(k, spans), spans, 0.6, window), tolerance(dtype == at::kDouble ? at::kDouble : at::kFloat, Op::kMatmul, 70))) << "window " << window;
        if (window == 1) EXPECT_EQ(got.abs().max().item<double>(), 0) << "one key alone";
      }
}

TEST(AttentionEntropy, KeysAlikeGiveTheLogarithmOfTheTokensSeen) {
  const Spans spans = Spans::documents({5, 3});
  const auto q = at::randn({8, 2, 4}), k = at::zeros({8, 1, 4});
  const auto mean_log = [](const std::vector<double>& seen) {
    double sum = 0;
    for (const double n : seen) sum += std::log(n);
    return sum / static_cast<double>(seen.size());
  };
  for (const auto& [window, seen] : {std::pair<int64_t, std::vector<double>>{0, {1, 2, 3, 4, 5, 1, 2, 3}}, {2, {1, 2, 2, 2, 2, 1, 2, 2}}}) {
    const auto got = attention_entropy(q, k, spans, 1, window);
    for (const int64_t h : {0, 1}) EXPECT_NEAR(got[h].item<double>(), mean_log(seen), 1e-6) << window;
  }
}

// More queries than a block takes.
TEST(AttentionEntropy, BlocksOfQueriesJoin) {
  const Spans spans = Spans::documents({3000});
  const auto q = at::randn({3000, 4, 4}), k = at::zeros({3000, 4, 4});
  double all = 0, near = 0;
  for (int64_t i = 1; i <= 3000; ++i) all += std::log(static_cast<double>(i)) / 3000, near += std::log(static_cast<double>(std::min<int64_t>(i, 900))) / 3000;
  EXPECT_NEAR(attention_entropy(q, k, spans, 1)[3].item<double>(), all, 1e-5);
  EXPECT_NEAR(attention_entropy(q, k, spans, 1, 900)[0].item<double>(), near, 1e-5);
}

TEST(AttentionEntropy, ReadsEarlierKeysOfItsSlot) {
  const Spans spans({{0, 5, 3, 8, 1}, {1, 0, 4, 4, 0}, {2, 9, 1, 10, 2}});
  const auto q = at::randn({8, 4, 8}), k = at::randn({8, 2, 8}), cache = at::randn({3, 12, 2, 8}), before = cache.clone();
  auto whole = before.clone();
  std::vector<at::Tensor> keys;
  for (int64_t s = 0; s < spans.size(); ++s) {
    const Span& span = spans.list()[s];
    whole[span.state_slot].narrow(0, span.start, span.length).copy_(k.narrow(0, spans.rows()[s], span.length));
    keys.push_back(whole[span.state_slot].narrow(0, 0, span.start + span.length));
  }
  for (const int64_t window : {0, 4}) EXPECT_TRUE(close(attention_entropy(q, k, spans, 0.5, window, cache), plain(q, keys, spans, 0.5, window), tolerance(at::kFloat, Op::kMatmul, 70))) << window;
  EXPECT_TRUE(bit_equal(cache, before));
}

TEST(Context, ObservesWhereItIsAskedAlone) {
  const Spans spans = Spans::uniform(1, 2);
  Context ctx(spans);
  int asked = 0;
  const auto offer = [&] { return ++asked, at::randn({2}).set_requires_grad(true); };
  ctx.observe("entropy", offer);
  EXPECT_EQ(asked, 0);
  EXPECT_TRUE(ctx.observed().empty());
  ctx.set_observing(true);
  ctx.observe("entropy", offer);
  EXPECT_EQ(asked, 1);
  EXPECT_FALSE(ctx.observed().at("entropy").requires_grad());
}

TEST(AttentionEntropy, NothingIsZeroAndWhatDoesNotFitIsNamed) {
  EXPECT_TRUE(bit_equal(attention_entropy(at::zeros({0, 2, 4}), at::zeros({0, 1, 4}), Spans(), 1), at::zeros({2}, at::kDouble)));
  EXPECT_THROW(attention_entropy(at::zeros({3, 2, 4}), at::zeros({2, 1, 4}), Spans::uniform(1, 3), 1), Error);
  EXPECT_THROW(attention_entropy(at::zeros({3, 2, 4}), at::zeros({3, 1, 4}), Spans({{0, 1, 3, 4, 0}}), 1), Error) << "no cache";
}

}  // namespace
}  // namespace tessera
