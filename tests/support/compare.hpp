// Comparing tensors: RMS(diff) / RMS(reference), and bit equality. Both return a GoogleTest result that says what differs.
//   EXPECT_TRUE(close(got, want, tolerance(at::kFloat, Op::kMatmul, 256)));
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/equal.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

namespace tessera {

inline std::string shape_text(const at::Tensor& t) { return t.defined() ? fmt::format("[{}]", fmt::join(t.sizes(), ", ")) : "undefined"; }

// RMS(got - want) / RMS(want), computed in fp64. RMS(got) where `want` is all zeros; infinity where either holds a NaN or an infinity.
inline double relative_rms(const at::Tensor& got, const at::Tensor& want) {
  const at::Tensor a = got.detach().cpu().to(at::kDouble), b = want.detach().cpu().to(at::kDouble);
  if (a.numel() == 0) return 0;
  const double diff = a.sub(b).square().mean().item<double>(), base = b.square().mean().item<double>();
  if (!std::isfinite(diff) || !std::isfinite(base)) return std::numeric_limits<double>::infinity();
  return std::sqrt(diff / (base > 0 ? base : 1));
}

inline testing::AssertionResult close(const at::Tensor& got, const at::Tensor& want, double limit) {
  if (!got.defined() || !want.defined() || got.sizes() != want.sizes())
    return testing::AssertionFailure() << fmt::format("shapes differ: got {}, want {}", shape_text(got), shape_text(want));
  const double error = relative_rms(got, want);
  if (error <= limit) return testing::AssertionSuccess();
  return testing::AssertionFailure() << fmt::format("relative RMS error {:.3g} exceeds {:.3g}, shape {}", error, limit, shape_text(want));
}

// Same shape, dtype and values; a NaN equals nothing.
inline testing::AssertionResult bit_equal(const at::Tensor& got, const at::Tensor& want) {
  if (!got.defined() || !want.defined() || got.sizes() != want.sizes() || got.scalar_type() != want.scalar_type())
    return testing::AssertionFailure() << fmt::format("shapes or dtypes differ: got {}, want {}", shape_text(got), shape_text(want));
  if (at::equal(got, want)) return testing::AssertionSuccess();
  return testing::AssertionFailure() << fmt::format("not bit-equal: {} of {} elements differ, relative RMS {:.3g}",
                                                    got.ne(want).sum().item<int64_t>(), got.numel(), relative_rms(got, want));
}

}  // namespace tessera
