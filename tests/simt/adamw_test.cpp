// The optimizer's kernel on buffers of any length that begin anywhere; what it computes in a model's training is for tests/core/optimizer_test.cpp.
#include <ATen/TensorOperators.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scalar_tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "layers/gpu.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

constexpr AdamWStep kStep{.lr = 1e-2, .beta1 = 0.8, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.3, .max_norm = 2, .t = 3};

struct Buffers {
  at::Tensor data, grad, exp_avg, exp_avg_sq, compute;
  // n values from the place `first` of larger buffers.
  Buffers(int64_t n, int64_t first, bool copy) {
    const auto part = [&](const at::Tensor& t) { return t.narrow(0, first, n); };
    // Of one sign in a place, so that no sum cancels: of a single element the relative error is all there is.
    const at::Tensor sign = at::randn({n + first}).sign();
    const auto signed_part = [&] { return part((at::rand({n + first}) + 0.5) * sign); };
    data = signed_part(), grad = signed_part(), exp_avg = signed_part(), exp_avg_sq = part(at::rand({n + first}));
    if (copy) compute = part(at::randn({n + first}, at::kBFloat16));
  }
  void step(double norm) const { gpu_kernels()->adamw(data, grad, exp_avg, exp_avg_sq, compute, at::scalar_tensor(norm, at::kFloat), kStep); }
};

TEST(AdamWKernel, TakesAnyLengthFromAnyPlace) {
  for (const int64_t n : {0, 1, 3, 1037, 4096})
    for (const int64_t first : {0, 1, 4})
      for (const bool copy : {false, true})
        for (const double norm : {0.5, 10.0}) {
          const Buffers b(n, first, copy);
          const at::Tensor g = b.grad.to(at::kDouble) * std::min(1.0, kStep.max_norm / (norm + 1e-6)), w = b.data.to(at::kDouble);
          const at::Tensor m = b.exp_avg.to(at::kDouble) * kStep.beta1 + g * (1 - kStep.beta1), v = b.exp_avg_sq.to(at::kDouble) * kStep.beta2 + g * g * (1 - kStep.beta2);
          const at::Tensor m_hat = m / (1 - std::pow(kStep.beta1, 3)), v_hat = v / (1 - std::pow(kStep.beta2, 3));
          b.step(norm);
          EXPECT_TRUE(close(b.data, w * (1 - kStep.lr * kStep.weight_decay) - kStep.lr * m_hat / (v_hat.sqrt() + kStep.eps), tolerance(at::kFloat, Op::kElementwise))) << n;
          EXPECT_TRUE(close(b.exp_avg, m, tolerance(at::kFloat, Op::kElementwise))) << n;
          EXPECT_TRUE(close(b.exp_avg_sq, v, tolerance(at::kFloat, Op::kElementwise))) << n;
          if (copy) {
            EXPECT_TRUE(bit_equal(b.compute, b.data.to(at::kBFloat16))) << n;
          }
        }
}

TEST(AdamWKernel, ANormThatIsNotFiniteChangesNothing) {
  for (const double norm : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    const Buffers b(100, 0, true);
    const at::Tensor before[] = {b.data.clone(), b.exp_avg.clone(), b.exp_avg_sq.clone(), b.compute.clone()};
    b.step(norm);
    EXPECT_TRUE(bit_equal(b.data, before[0]));
    EXPECT_TRUE(bit_equal(b.exp_avg, before[1]));
    EXPECT_TRUE(bit_equal(b.exp_avg_sq, before[2]));
    EXPECT_TRUE(bit_equal(b.compute, before[3]));
  }
}

}  // namespace
}  // namespace tessera
