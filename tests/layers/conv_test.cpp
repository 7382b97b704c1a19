#include "layers/conv.hpp"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/conv1d.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "tessera/error.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

constexpr int64_t kChannels = 37;

struct Result {
  at::Tensor out;
  std::vector<at::Tensor> grads;
};

Result run(const std::vector<at::Tensor>& inputs, const at::Tensor& dout, const Spans& spans, bool silu, bool fast, at::ScalarType dtype) {
  std::vector<at::Tensor> in;
  for (const auto& t : inputs) in.push_back(t.to(dtype).detach().clone().requires_grad_());
  Result r;
  r.out = (fast ? static_cast<decltype(&causal_conv1d_ref)>(causal_conv1d) : causal_conv1d_ref)(in[0], in[1], in.size() > 2 ? in[2] : at::Tensor(), spans, silu, {});
  r.grads = torch::autograd::grad({r.out}, in, {dout.to(dtype)});
  r.out = r.out.detach();
  return r;
}

std::vector<at::Tensor> make(int64_t n, int64_t width, bool bias, int64_t channels = kChannels) {
  at::manual_seed(5);
  std::vector<at::Tensor> in{at::randn({n, channels}, at::kDouble), at::randn({channels, 1, width}, at::kDouble)};
  if (bias) in.push_back(at::randn({channels}, at::kDouble));
  return in;
}

class Convolutions : public testing::TestWithParam<std::tuple<std::vector<int64_t>, int64_t, bool>> {};

TEST_P(Convolutions, ReferenceIsATensConvolutionOfEachDocument) {
  const auto [lengths, width, bias] = GetParam();
  const Spans spans = Spans::documents(lengths);
  const auto in = make(spans.num_tokens(), width, bias);
  std::vector<at::Tensor> rows;
  for (int64_t s = 0; s < spans.size(); ++s) {
    const at::Tensor x = in[0].narrow(0, spans.rows()[s], lengths[s]).t().unsqueeze(0);
    const at::Tensor y = at::conv1d(x, in[1], bias ? std::optional(in[2]) : std::nullopt, 1, width - 1, 1, kChannels);
    rows.push_back(y.squeeze(0).narrow(1, 0, lengths[s]).t());
  }
  EXPECT_TRUE(close(causal_conv1d_ref(in[0], in[1], bias ? in[2] : at::Tensor(), spans, false), at::cat(rows), tolerance(at::kDouble, Op::kElementwise)));
}

TEST_P(Convolutions, FastEqualsReference) {
  at::globalContext().setDeterministicAlgorithms(true, false);
  at::globalContext().setDeterministicFillUninitializedMemory(true);
  const auto [lengths, width, bias] = GetParam();
  const Spans spans = Spans::documents(lengths);
  auto in = make(spans.num_tokens(), width, bias);
  at::Tensor dout = at::randn(in[0].sizes(), at::kDouble);
  for (const bool silu : {false, true}) {
    const Result want = run(in, dout, spans, silu, false, at::kDouble), got = run(in, dout, spans, silu, true, at::kFloat);
    EXPECT_TRUE(close(got.out, want.out, tolerance(at::kFloat, Op::kReduction, 130)));
    for (size_t k = 0; k < in.size(); ++k) EXPECT_TRUE(close(got.grads[k], want.grads[k], tolerance(at::kFloat, Op::kReduction, 130))) << k;
  }
  for (auto& t : in) t = t.to(at::kBFloat16).to(at::kDouble);
  dout = dout.to(at::kBFloat16).to(at::kDouble);
  const Result want = run(in, dout, spans, true, false, at::kDouble), plain = run(in, dout, spans, true, false, at::kBFloat16);
  const Result fast = run(in, dout, spans, true, true, at::kBFloat16);
  EXPECT_TRUE(close(fast.out, want.out, kErrorFactor * relative_rms(plain.out, want.out)));
  for (size_t k = 0; k < in.size(); ++k)
    EXPECT_TRUE(close(fast.grads[k], want.grads[k], kErrorFactor * relative_rms(plain.grads[k], want.grads[k]))) << k;
  at::globalContext().setDeterministicAlgorithms(false, false);
}

INSTANTIATE_TEST_SUITE_P(All, Convolutions,
                         testing::Combine(testing::Values(std::vector<int64_t>{1}, std::vector<int64_t>{63}, std::vector<int64_t>{130},
                                                          std::vector<int64_t>{2, 1, 50, 3, 20}),
                                          testing::Values(1, 2, 4, 7), testing::Bool()));

// Whole 16-byte vectors of channels, and more of them than one block of a GPU's kernel holds.
TEST(CausalConv, WideRows) {
  for (const int64_t channels : {16, 1032})
    for (const int64_t width : {1, 2, 3, 4, 6}) {
      const Spans spans = Spans::documents({3, 37, 1});
      auto in = make(spans.num_tokens(), width, width != 3, channels);
      for (auto& t : in) t = t.to(at::kBFloat16).to(at::kDouble);
      const at::Tensor dout = at::randn(in[0].sizes(), at::kDouble).to(at::kBFloat16).to(at::kDouble);
      const Result want = run(in, dout, spans, true, false, at::kDouble), plain = run(in, dout, spans, true, false, at::kBFloat16);
      const Result fp32 = run(in, dout, spans, true, true, at::kFloat), bf16 = run(in, dout, spans, true, true, at::kBFloat16);
      EXPECT_TRUE(close(fp32.out, want.out, tolerance(at::kFloat, Op::kReduction, 41)));
      EXPECT_TRUE(close(bf16.out, want.out, kErrorFactor * relative_rms(plain.out, want.out)));
      for (size_t k = 0; k < in.size(); ++k) {
        EXPECT_TRUE(close(fp32.grads[k], want.grads[k], tolerance(at::kFloat, Op::kReduction, 41))) << k;
        EXPECT_TRUE(close(bf16.grads[k], want.grads[k], kErrorFactor * relative_rms(plain.grads[k], want.grads[k]))) << k;
      }
    }
}

TEST(CausalConv, ReferenceGradientsMatchFiniteDifferences) {
  const Spans spans = Spans::documents({5, 2});
  auto in = make(7, 4, true, 2);
  const at::Tensor dout = at::randn({7, 2}, at::kDouble);
  const Result r = run(in, dout, spans, true, false, at::kDouble);
  for (size_t k = 0; k < in.size(); ++k) {
    at::Tensor flat = in[k].view(-1), difference = at::zeros_like(flat);
    for (int64_t e = 0; e < flat.numel(); ++e) {
      double value[2];
      for (const int sign : {1, -1}) {
        flat[e] += sign * 1e-5;
        value[sign < 0] = (causal_conv1d_ref(in[0], in[1], in[2], spans, true) * dout).sum().item<double>();
        flat[e] -= sign * 1e-5;
      }
      difference[e] = (value[0] - value[1]) / 2e-5;
    }
    EXPECT_TRUE(close(r.grads[k].view(-1), difference, tolerance(at::kDouble, Op::kFiniteDifference))) << k;
  }
}

TEST(CausalConv, DocumentsAreIndependentAndRowsMayBeStrided) {
  const Spans spans = Spans::documents({40, 2, 30});
  const at::Tensor packed = at::randn({72, 60}), x = packed.narrow(1, 11, kChannels), w = at::randn({kChannels, 1, 4});
  const at::Tensor a = causal_conv1d(x, w, {}, spans, true);
  EXPECT_TRUE(bit_equal(a, causal_conv1d(x.contiguous(), w, {}, spans, true)));
  at::Tensor other = x.clone();
  other.narrow(0, 40, 2).mul_(7);
  const at::Tensor b = causal_conv1d(other, w, {}, spans, true);
  EXPECT_TRUE(bit_equal(a.narrow(0, 0, 40), b.narrow(0, 0, 40)));
  EXPECT_TRUE(bit_equal(a.narrow(0, 42, 30), b.narrow(0, 42, 30)));
  EXPECT_FALSE(at::equal(a, b));
}

TEST(CausalConv, PrefillAndStepsEqualTheWhole) {
  const at::NoGradGuard no_grad;
  const int64_t lengths[] = {52, 29};
  for (const bool fast : {true, false})
    for (const auto dtype : {at::kFloat, at::kBFloat16})
      for (const auto& [width, channels] : {std::pair<int64_t, int64_t>{1, kChannels}, {4, kChannels}, {4, 16}, {2, 16}, {6, 3}}) {
        const Spans whole = Spans::documents({lengths[0], lengths[1]});
        const at::Tensor x = at::randn({whole.num_tokens(), channels}).to(dtype), w = at::randn({channels, 1, width}).to(dtype), b = at::randn({channels}).to(dtype);
        const at::Tensor full = causal_conv1d(x, w, b, whole, true), state = at::randn({3, channels, width - 1}).to(dtype);
        at::Tensor parts = at::empty_like(full);
        const int64_t cuts[][2] = {{0, 0}, {40, 1}, {49, 26}, {50, 27}, {51, 28}, {52, 29}};
        for (int step = 0; step < 5; ++step) {
          std::vector<Span> list;
          std::vector<at::Tensor> rows;
          for (int64_t s = 0; s < 2; ++s) {
            const int64_t from = cuts[step][s], length = cuts[step + 1][s] - from;
            list.push_back({.document = s, .start = from, .length = length, .document_len = lengths[s], .state_slot = 2 - 2 * s});
            rows.push_back(x.narrow(0, lengths[0] * s + from, length));
          }
          const at::Tensor y = (fast ? static_cast<decltype(&causal_conv1d_ref)>(causal_conv1d) : causal_conv1d_ref)(at::cat(rows), w, b, Spans(list), true, state);
          parts.narrow(0, list[0].start, list[0].length).copy_(y.narrow(0, 0, list[0].length));
          parts.narrow(0, lengths[0] + list[1].start, list[1].length).copy_(y.narrow(0, list[0].length, list[1].length));
        }
        EXPECT_TRUE(close(parts, full, tolerance(dtype, Op::kElementwise)));
      }
}

TEST(CausalConv, NamesTheShapeThatDoesNotFit) {
  try {
    causal_conv1d(at::zeros({4, 8}), at::zeros({6, 1, 4}), {}, Spans::uniform(1, 4), true);
    FAIL() << "no error";
  } catch (const Error& e) {
    EXPECT_EQ(e.message(), "[causal_conv1d] x must be [4, C], weight [C, 1, width] and bias [C], got Float [4, 8], Float [6, 1, 4] and none");
  }
}

}  // namespace
}  // namespace tessera
