#include "layers/norm.hpp"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <torch/csrc/autograd/autograd.h>

#include "tessera/error.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

struct Result {
  at::Tensor out;
  std::vector<at::Tensor> grads;
};

// `gated`: inputs are y, z, weight; otherwise x, weight. The weight stays fp32 in bf16, and so does y unless y_too.
Result run(const std::vector<at::Tensor>& inputs, const at::Tensor& dout, bool gated, bool fast, int64_t group_size, at::ScalarType dtype,
           at::ScalarType out_dtype, bool y_too = false) {
  std::vector<at::Tensor> in;
  for (size_t k = 0; k < inputs.size(); ++k) {
    const bool wide = k + 1 == inputs.size() || (gated && k == 0 && !y_too);
    in.push_back(inputs[k].to(wide && dtype == at::kBFloat16 ? at::kFloat : dtype).detach().clone().requires_grad_());
  }
  Result r;
  if (gated) r.out = (fast ? static_cast<decltype(&gated_rms_norm_ref)>(gated_rms_norm) : gated_rms_norm_ref)(in[0], in[1], in[2], group_size, 1e-5, out_dtype);
  else r.out = (fast ? rms_norm : rms_norm_ref)(in[0], in[1], 1e-5, out_dtype);
  r.grads = torch::autograd::grad({r.out}, in, {dout.to(out_dtype)});
  r.out = r.out.detach();
  return r;
}

std::vector<at::Tensor> make(int64_t n, int64_t d, bool gated) {
  at::manual_seed(3);
  std::vector<at::Tensor> in{at::randn({n, d}, at::kDouble)};
  if (gated) in.push_back(at::randn({n, d}, at::kDouble) * 2);
  in.push_back(at::rand({d}, at::kDouble) + 0.5);
  return in;
}

class Norms : public testing::TestWithParam<std::tuple<bool, int64_t, int64_t>> {};

TEST_P(Norms, FastEqualsReference) {
  at::globalContext().setDeterministicAlgorithms(true, false);
  at::globalContext().setDeterministicFillUninitializedMemory(true);
  const auto [gated, n, d] = GetParam();
  const auto in = make(n, d, gated);
  const at::Tensor dout = at::randn({n, d}, at::kDouble);
  for (const int64_t groups : {1, 3}) {
    const Result want = run(in, dout, gated, false, d / groups, at::kDouble, at::kDouble);
    const Result got = run(in, dout, gated, true, d / groups, at::kFloat, at::kFloat);
    EXPECT_TRUE(close(got.out, want.out, tolerance(at::kFloat, Op::kReduction, n)));
    for (size_t k = 0; k < in.size(); ++k) EXPECT_TRUE(close(got.grads[k], want.grads[k], tolerance(at::kFloat, Op::kReduction, n))) << k;
  }
  at::globalContext().setDeterministicAlgorithms(false, false);
}

TEST_P(Norms, Bfloat16ErrorIsAtMostTwiceThePlainComposition) {
  const auto [gated, n, d] = GetParam();
  auto in = make(n, d, gated);
  for (auto& t : in) t = t.to(at::kBFloat16).to(at::kDouble);
  const at::Tensor dout = at::randn({n, d}, at::kDouble).to(at::kBFloat16).to(at::kDouble);
  const double rounding = tolerance(at::kFloat, Op::kElementwise);  // of fp32 results, where one row of the plain composition may be lucky
  for (const auto& [out_dtype, y_too] : {std::pair{at::kBFloat16, false}, {at::kFloat, false}, {at::kBFloat16, true}}) {
    const Result want = run(in, dout, gated, false, d / 3, at::kDouble, at::kDouble);
    const Result plain = run(in, dout, gated, false, d / 3, at::kBFloat16, out_dtype, y_too), fast = run(in, dout, gated, true, d / 3, at::kBFloat16, out_dtype, y_too);
    EXPECT_EQ(fast.out.scalar_type(), out_dtype);
    EXPECT_TRUE(close(fast.out, want.out, std::max(rounding, kErrorFactor * relative_rms(plain.out, want.out))));
    for (size_t k = 0; k < in.size(); ++k)
      EXPECT_TRUE(close(fast.grads[k], want.grads[k], std::max(rounding, kErrorFactor * relative_rms(plain.grads[k], want.grads[k])))) << k;
  }
}

INSTANTIATE_TEST_SUITE_P(All, Norms, testing::Combine(testing::Bool(), testing::Values(1, 63, 130), testing::Values(33, 96)));
// Groups of several warps of a GPU's kernel, and such as no block holds.
INSTANTIATE_TEST_SUITE_P(Long, Norms, testing::Combine(testing::Bool(), testing::Values(7), testing::Values(1536, 2055, 4320, 8400)));

TEST(Norm, ReferenceGradientsMatchFiniteDifferences) {
  for (const bool gated : {false, true}) {
    auto in = make(3, 6, gated);
    const at::Tensor dout = at::randn({3, 6}, at::kDouble);
    const Result r = run(in, dout, gated, false, 3, at::kDouble, at::kDouble);
    for (size_t k = 0; k < in.size(); ++k) {
      at::Tensor flat = in[k].view(-1), difference = at::zeros_like(flat);
      for (int64_t e = 0; e < flat.numel(); ++e) {
        double value[2];
        for (const int sign : {1, -1}) {
          flat[e] += sign * 1e-5;
          value[sign < 0] = (run(in, dout, gated, false, 3, at::kDouble, at::kDouble).out * dout).sum().item<double>();
          flat[e] -= sign * 1e-5;
        }
        difference[e] = (value[0] - value[1]) / 2e-5;
      }
      EXPECT_TRUE(close(r.grads[k].view(-1), difference, tolerance(at::kDouble, Op::kFiniteDifference))) << gated << k;
    }
  }
}

TEST(Norm, GateMayBeASliceOfAPackedMatrix) {
  const at::Tensor packed = at::randn({40, 100}), y = at::randn({40, 30}), w = at::rand({30});
  EXPECT_TRUE(bit_equal(gated_rms_norm(y, packed.narrow(1, 7, 30), w, 10, 1e-5, at::kFloat),
                        gated_rms_norm(y, packed.narrow(1, 7, 30).contiguous(), w, 10, 1e-5, at::kFloat)));
}

TEST(Norm, NamesTheShapeThatDoesNotFit) {
  try {
    rms_norm(at::zeros({4, 8}), at::zeros({6}), 1e-5, at::kFloat);
    FAIL() << "no error";
  } catch (const Error& e) {
    EXPECT_EQ(e.message(), "[rms_norm] x must be [N, D] and weight [D], got Float [4, 8] and Float [6]");
  }
}

}  // namespace
}  // namespace tessera
