#include "layers/attention.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <cmath>
#include <ostream>

#include "tessera/error.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/gradients.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

struct Case {
  std::vector<int64_t> lengths;
  int64_t heads, kv_heads, dim, window;
  int64_t tokens() const { return Spans::documents(lengths).num_tokens(); }
  double scale() const { return 1 / std::sqrt(static_cast<double>(dim)); }
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << fmt::format("lengths [{}] heads {}/{} dim {} window {}", fmt::join(c.lengths, ", "), c.heads, c.kv_heads, c.dim, c.window);
}

std::vector<at::Tensor> inputs(const Case& c, at::ScalarType dtype) {
  const auto N = c.tokens();
  return {at::randn({N, c.heads, c.dim}, dtype), at::randn({N, c.kv_heads, c.dim}, dtype), at::randn({N, c.kv_heads, c.dim}, dtype)};
}

class Attention : public testing::TestWithParam<Case> {};

TEST_P(Attention, EqualsTheComposition) {
  const auto& c = GetParam();
  const auto spans = Spans::documents(c.lengths);
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const auto in = inputs(c, dtype);
    const auto dy = at::randn({c.tokens(), c.heads, c.dim}, dtype);
    const auto got = with_gradients([&](const auto& x) { return attention(x[0], x[1], x[2], spans, c.scale(), c.window); }, in, dy);
    const auto ref = [&](const auto& x) { return attention_ref(x[0], x[1], x[2], spans, c.scale(), c.window); };
    const auto plain = with_gradients(ref, in, dy);
    const auto want = with_gradients(ref, {in[0].to(at::kDouble), in[1].to(at::kDouble), in[2].to(at::kDouble)}, dy);
    const auto check = [&](const at::Tensor& a, const at::Tensor& p, const at::Tensor& b, const char* what) {
      EXPECT_EQ(a.scalar_type(), dtype);
      EXPECT_TRUE(close(a, b, std::max(tolerance(dtype, Op::kMatmul, c.dim), kErrorFactor * relative_rms(p, b))))
          << what << " " << c10::toString(dtype);
    };
    check(got.output, plain.output, want.output, "output");
    const char* names[] = {"dq", "dk", "dv"};
    for (size_t i = 0; i < 3; ++i) check(got.gradients[i], plain.gradients[i], want.gradients[i], names[i]);
  }
}

TEST_P(Attention, DocumentsAreIndependent) {
  const auto& c = GetParam();
  if (c.lengths.size() < 2) return;
  const auto spans = Spans::documents(c.lengths);
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto in = inputs(c, dtype), other = inputs(c, dtype);
    const auto dy = at::randn({c.tokens(), c.heads, c.dim}, dtype);
    const auto first = c.lengths[0];
    std::vector<at::Tensor> changed;
    for (size_t i = 0; i < 3; ++i) changed.push_back(at::cat({other[i].narrow(0, 0, first), in[i].narrow(0, first, c.tokens() - first)}, 0));
    const auto run = [&](const std::vector<at::Tensor>& x) {
      return with_gradients([&](const auto& y) { return attention(y[0], y[1], y[2], spans, c.scale(), c.window); }, x, dy);
    };
    const auto a = run(in), b = run(changed);
    const auto rest = [&](const at::Tensor& x) { return x.narrow(0, first, c.tokens() - first); };
    EXPECT_TRUE(bit_equal(rest(b.output), rest(a.output)));
    for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(bit_equal(rest(b.gradients[i]), rest(a.gradients[i]))) << i;
  }
}

// A prefill of each document's first part, then single steps (all documents together, at different positions), then a chunk: as one pass.
TEST_P(Attention, StepsWithACacheEqualTheWholePass) {
  const auto& c = GetParam();
  const auto in = inputs(c, at::kFloat);
  const auto whole = attention(in[0], in[1], in[2], Spans::documents(c.lengths), c.scale(), c.window);
  const auto documents = Spans::documents(c.lengths);
  const auto B = documents.size(), longest = *std::max_element(c.lengths.begin(), c.lengths.end());
  for (const bool reversed : {false, true}) {
    const auto cache_k = at::randn({B + 1, longest + 3, c.kv_heads, c.dim}), cache_v = at::randn({B + 1, longest + 3, c.kv_heads, c.dim});
    auto got = at::zeros_like(whole);
    std::vector<int64_t> seen(B, 0);
    for (int64_t round = 0;; ++round) {
      std::vector<Span> spans;
      std::vector<int64_t> rows;
      for (int64_t d = 0; d < B; ++d) {
        const auto left = c.lengths[d] - seen[d];
        if (left == 0) continue;
        const auto want = round == 0 ? c.lengths[d] / 2 : round < 4 ? 1 : round == 4 ? 20 : left;
        const auto n = std::clamp<int64_t>(want, 1, left);
        spans.push_back({d, seen[d], n, c.lengths[d], reversed ? B - d : d});
        rows.push_back(documents.rows()[d] + seen[d]);
        seen[d] += n;
      }
      if (spans.empty()) break;
      const auto pick = [&](const at::Tensor& x) {
        std::vector<at::Tensor> parts;
        for (size_t i = 0; i < spans.size(); ++i) parts.push_back(x.narrow(0, rows[i], spans[i].length));
        return at::cat(parts, 0);
      };
      const Spans step(spans);
      const auto y = attention(pick(in[0]), pick(in[1]), pick(in[2]), step, c.scale(), c.window, cache_k, cache_v);
      for (size_t i = 0; i < spans.size(); ++i) got.narrow(0, rows[i], spans[i].length).copy_(y.narrow(0, step.rows()[i], spans[i].length));
    }
    EXPECT_TRUE(close(got, whole, tolerance(at::kFloat, Op::kMatmul, 256)));
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Attention,
                         testing::Values(Case{{1}, 2, 1, 8, 0}, Case{{63, 63}, 4, 2, 16, 0}, Case{{130}, 6, 1, 32, 0}, Case{{130}, 3, 3, 20, 0},
                                         Case{{1, 63, 130, 2, 17, 60, 129}, 4, 2, 16, 0}, Case{{63, 63}, 4, 2, 16, 5},
                                         Case{{130, 130}, 4, 1, 16, 64}, Case{{1, 200, 130, 2, 17, 66, 129}, 4, 2, 16, 65},
                                         Case{{1, 200, 130, 5}, 4, 2, 16, 1}, Case{{40, 30}, 2, 1, 8, 1000}));

TEST(Attention, AgreesWithFiniteDifferences) {
  for (const int64_t window : {0, 2}) {
    const Case c{{1, 5, 3}, 2, 1, 4, window};
    const auto in = inputs(c, at::kDouble);
    const auto dy = at::randn({9, 2, 4}, at::kDouble);
    const TensorFn fn = [&](const auto& x) { return attention(x[0], x[1], x[2], Spans::documents(c.lengths), c.scale(), c.window); };
    const auto got = with_gradients(fn, in, dy);
    for (size_t i = 0; i < 3; ++i)
      EXPECT_TRUE(close(got.gradients[i], finite_difference(fn, in, i, dy), tolerance(at::kDouble, Op::kFiniteDifference))) << i;
  }
}

TEST(Attention, TakesStridedInput) {
  for (const auto& lengths : {std::vector<int64_t>{33, 33}, std::vector<int64_t>{33, 7}}) {
    const Case c{lengths, 4, 2, 16, 0};
    const auto spans = Spans::documents(lengths);
    const auto packed = at::randn({c.tokens(), 8, 16});
    const auto q = packed.narrow(1, 0, 4), k = packed.narrow(1, 4, 2), v = packed.narrow(1, 6, 2);
    const auto dense = attention(q.contiguous(), k.contiguous(), v.contiguous(), spans, c.scale());
    EXPECT_TRUE(bit_equal(attention(q, k, v, spans, c.scale()), dense));
    const auto turned = at::randn({4, 16, c.tokens()}).permute({2, 0, 1});
    EXPECT_TRUE(bit_equal(attention(turned, k, v, spans, c.scale()), attention(turned.contiguous(), k, v, spans, c.scale())));
  }
}

// Longer than one block of keys, in both dtypes, with channels that fill no vector.
TEST(Attention, ShortSpansReadLongCaches) {
  const Spans spans({{0, 999, 1, 1000, 1}, {1, 700, 5, 705, 0}, {2, 0, 3, 3, 2}, {3, 255, 2, 257, 3}});
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const int64_t dim : {32, 20, 72, 136, 256})
      for (const int64_t window : {0, 300, 1}) {
        const auto q = at::randn({11, 6, dim}, dtype), k = at::randn({11, 2, dim}, dtype), v = at::randn({11, 2, dim}, dtype);
        const auto cache_k = at::randn({4, 1100, 2, dim}, dtype), cache_v = at::randn({4, 1100, 2, dim}, dtype);
        const auto wide = [](const at::Tensor& t) { return t.to(at::kDouble); };
        const auto want = attention_ref(wide(q), wide(k), wide(v), spans, 0.2, window, wide(cache_k), wide(cache_v));
        EXPECT_TRUE(close(attention(q, k, v, spans, 0.2, window, cache_k, cache_v), want, tolerance(dtype, Op::kMatmul, 256))) << dim << " window " << window;
      }
}

TEST(Attention, WritesTheCacheInPlaceAndNowhereElse) {
  const auto k = at::randn({3, 1, 4}), cache_k = at::zeros({2, 6, 1, 4}), cache_v = at::zeros({2, 6, 1, 4});
  attention(at::randn({3, 2, 4}), k, k, Spans({{0, 2, 3, 5, 1}}), 0.5, 0, cache_k, cache_v);
  EXPECT_TRUE(bit_equal(cache_k[1].narrow(0, 2, 3), k));
  EXPECT_EQ(cache_k.ne(0).sum().item<int64_t>(), 12);
  EXPECT_TRUE(bit_equal(cache_v, cache_k));
}

TEST(Attention, NamesWhatDoesNotFit) {
  const auto message = [](const at::Tensor& q, const at::Tensor& k, const Spans& spans, const at::Tensor& cache) -> std::string {
    try {
      attention(q, k, k, spans, 1, 0, cache, cache);
    } catch (const Error& e) {
      return e.message();
    }
    return "no error";
  };
  const auto q = at::randn({3, 4, 8}), k = at::randn({3, 2, 8});
  EXPECT_EQ(message(q, at::randn({3, 3, 8}), Spans::uniform(1, 3), {}),
            "[attention] q must be [N, H, P], k and v [N, K, P] with H % K == 0 and the spans' N = 3, got q [3, 4, 8], k [3, 3, 8], v [3, 3, 8]");
  EXPECT_EQ(message(q, k, Spans({{0, 1, 3, 4, 0}}), {}), "[attention] a span that begins at position 1 needs a cache");
  EXPECT_EQ(message(q, k, Spans({{0, 1, 3, 4, 0}}), at::zeros({1, 3, 2, 8})),
            "[attention] slot 0, positions [1, 4) must lie in the cache [1, 3, 2, 8]");
}

}  // namespace
}  // namespace tessera
