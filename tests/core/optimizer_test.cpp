// AdamW against its formula in fp64, clipping, and the learning-rate schedules.
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <map>

#include "tests/support/compare.hpp"
#include "tests/support/directional.hpp"
#include "tests/support/emulated.hpp"
#include "tests/support/tolerance.hpp"
#include "train/optimizer.hpp"

namespace tessera {
namespace {

const std::string kText = R"(
[model]
hybrid_override_pattern = "ME"
vocab_size = 24
hidden_size = 16
init_std = 0.2
[blocks.mamba2]
num_heads = 2
head_dim = 4
state_size = 4
num_groups = 1
[blocks.mlp]
intermediate_size = 12
)";

struct Row {
  at::Tensor w, m, v;
  bool decay;
};

// Decoupled weight decay: arXiv:1711.05101, algorithm 2; clipping as clip_grad_norm_.
void formula(Row& row, const at::Tensor& gradient, double scale, double lr, const OptimizerConfig& c, int64_t t) {
  const at::Tensor g = gradient.to(at::kDouble) * scale;
  row.m = row.m * c.beta1 + g * (1 - c.beta1);
  row.v = row.v * c.beta2 + g * g * (1 - c.beta2);
  const double steps = static_cast<double>(t);
  const at::Tensor m_hat = row.m / (1 - std::pow(c.beta1, steps)), v_hat = row.v / (1 - std::pow(c.beta2, steps));
  row.w = row.w * (1 - (row.decay ? lr * c.weight_decay : 0)) - lr * m_hat / (v_hat.sqrt() + c.eps);
}

class AdamW : public testing::TestWithParam<double> {};

TEST_P(AdamW, FollowsItsFormula) {
  const double max_norm = GetParam();
  Built built(kText);
  const OptimizerConfig config{.lr = 1e-2, .beta1 = 0.8, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.3};
  Optimizer optimizer(built.store, config);
  std::map<std::string, Row> rows;
  for (const TensorRow& row : tensor_rows(built.plan)) {
    const at::Tensor w = built.store.parameter(row.name).to(at::kDouble);
    rows[row.name] = {w, w * 0, w * 0, row.param->decay};
  }
  bool clipped = false;
  for (int64_t t = 1; t <= 5; ++t) {
    backward(built.model, random_batch({7, 20}, 24, static_cast<uint64_t>(t)));
    double square = 0;
    std::map<std::string, at::Tensor> gradients;
    for (const auto& [name, row] : rows) {
      gradients[name] = built.store.gradient(name).clone();
      square += gradients[name].to(at::kDouble).square().sum().item<double>();
    }
    const double norm = std::sqrt(square), lr = config.lr / static_cast<double>(t);
    const at::Tensor measured = optimizer.grad_norm();
    EXPECT_NEAR(measured.item<double>(), norm, norm * tolerance(at::kFloat, Op::kReduction));
    const double scale = max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1;
    clipped |= scale < 1;
    optimizer.step(lr, max_norm, measured);
    for (auto& [name, row] : rows) {
      formula(row, gradients.at(name), scale, lr, config, t);
      // The weights themselves and what the steps added up to, which is far smaller.
      EXPECT_TRUE(close(built.store.parameter(name), row.w, tolerance(at::kFloat, Op::kReduction))) << name << " after step " << t;
      EXPECT_TRUE(close(optimizer.moment("exp_avg", name), row.m, tolerance(at::kFloat, Op::kReduction))) << name << " after step " << t;
      EXPECT_TRUE(close(optimizer.moment("exp_avg_sq", name), row.v, tolerance(at::kFloat, Op::kReduction))) << name << " after step " << t;
    }
    EXPECT_EQ(optimizer.steps_taken(), t);
  }
  EXPECT_EQ(clipped, max_norm > 0 && max_norm < 1) << "the limit had no effect";
}

INSTANTIATE_TEST_SUITE_P(MaxNorm, AdamW, testing::Values(0.0, 1e-2, 1e6));

TEST(Optimizer, DecaysMatricesAlone) {
  Built built(kText);
  for (const TensorRow& row : tensor_rows(built.plan)) {
    if (row.shape().size() == 1) {
      EXPECT_FALSE(row.param->decay) << row.name;
    }
    if (row.shape().size() == 2) {
      EXPECT_TRUE(row.param->decay) << row.name;
    }
  }
}

TEST(Optimizer, ClearsGradientsAfterAStep) {
  Built built(kText);
  Optimizer optimizer(built.store, {});
  backward(built.model, random_batch({7}, 24));
  optimizer.step(1e-3, 0, optimizer.grad_norm());
  for (const std::string& name : parameter_names(built.plan)) EXPECT_EQ(built.store.gradient(name).abs().max().item<float>(), 0) << name;
}

// A GPU's kernel writes them in the same pass; elsewhere they are made when they are asked for.
TEST(Optimizer, CopiesInTheComputeDtypeFollowTheMasters) {
  Built built(kText, {.dtype = at::kBFloat16});
  Optimizer optimizer(built.store, {.lr = 1e-2});
  for (int64_t step = 1; step <= 2; ++step) {
    backward(built.model, random_batch({7}, 24, static_cast<uint64_t>(step)));
    optimizer.step(1e-2, 1, optimizer.grad_norm());
    int copies = 0;
    for (const FlatGroup& group : built.store.groups()) {
      if (!group.compute.defined()) continue;
      EXPECT_EQ(group.stale, !emulated());
      if (!group.stale) {
        EXPECT_TRUE(bit_equal(group.compute, group.data.detach().to(at::kBFloat16)));
      }
      ++copies;
    }
    EXPECT_GT(copies, 0);
  }
}

TEST(Optimizer, NothingToTrainIsRefused) {
  Built built(kText, {.freeze = {""}});
  Optimizer optimizer(built.store, {});
  try {
    optimizer.grad_norm();
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.message(), "training.freeze: every parameter is frozen, so there is nothing to train");
  }
}

double rate(const LrSchedulerConfig& s, int64_t step, int64_t steps = 100) { return learning_rate({.lr = 2.0}, s, step, steps); }

TEST(LearningRate, WarmsUpFromTheFirstStep) {
  const LrSchedulerConfig s{.warmup_steps = 4};
  EXPECT_DOUBLE_EQ(rate(s, 0), 0.5);
  EXPECT_DOUBLE_EQ(rate(s, 1), 1.0);
  EXPECT_DOUBLE_EQ(rate(s, 3), 2.0);
  EXPECT_DOUBLE_EQ(rate(s, 4), 2.0);
  EXPECT_DOUBLE_EQ(rate(s, 99), 2.0);
  EXPECT_DOUBLE_EQ(rate({}, 0), 2.0);
}

TEST(LearningRate, ReachesItsEndWithTheLastStep) {
  for (const char* shape : {"cosine", "linear", "sqrt"})
    for (const double ratio : {-1.0, 0.25, 1.0}) {
      const LrSchedulerConfig s{.warmup_steps = 10, .decay_type = shape, .decay_ratio = ratio, .min_lr_factor = 0.1};
      EXPECT_NEAR(rate(s, 99), 0.2, 1e-15) << shape << ratio;
      EXPECT_DOUBLE_EQ(rate(s, 9), 2.0) << shape << ratio;
      for (int64_t step = 10; step < 99; ++step) EXPECT_GE(rate(s, step), rate(s, step + 1)) << shape << ratio << " step " << step;
      // A run that goes on past its last step keeps the rate.
      EXPECT_NEAR(rate(s, 140), 0.2, 1e-15) << shape << ratio;
    }
}

TEST(LearningRate, ShapesOfTheDecay) {
  // 90 steps after the warm-up; halfway is step 10 + 45 - 1.
  EXPECT_NEAR(rate({.warmup_steps = 10, .decay_type = "cosine"}, 54), 1.0, 1e-12);
  EXPECT_NEAR(rate({.warmup_steps = 10, .decay_type = "linear"}, 54), 1.0, 1e-12);
  EXPECT_NEAR(rate({.warmup_steps = 10, .decay_type = "sqrt"}, 54), 2 * (1 - std::sqrt(0.5)), 1e-12);
  EXPECT_NEAR(rate({.warmup_steps = 10, .decay_type = "cosine", .min_lr_factor = 0.5}, 54), 1.5, 1e-12);
  EXPECT_NEAR(rate({.warmup_steps = 10, .decay_type = "cosine"}, 32), 2 * 0.5 * (1 + std::cos(std::acos(-1.0) * 23 / 90)), 1e-12);
}

TEST(LearningRate, WarmUpStableDecay) {
  const LrSchedulerConfig s{.warmup_steps = 10, .decay_type = "linear", .decay_ratio = 0.2};
  for (int64_t step = 9; step < 80; ++step) EXPECT_DOUBLE_EQ(rate(s, step), 2.0) << step;
  EXPECT_NEAR(rate(s, 80), 2.0 * 19 / 20, 1e-12);
  EXPECT_NEAR(rate(s, 89), 1.0, 1e-12);
  EXPECT_NEAR(rate(s, 99), 0.0, 1e-12);
  // A decay longer than what the warm-up leaves begins after it.
  EXPECT_DOUBLE_EQ(rate({.warmup_steps = 50, .decay_type = "linear", .decay_ratio = 0.9}, 49), 2.0);
  EXPECT_NEAR(rate({.warmup_steps = 50, .decay_type = "linear", .decay_ratio = 0.9}, 74), 1.0, 1e-12);
  // No decay at all.
  EXPECT_DOUBLE_EQ(rate({.decay_type = "linear", .decay_ratio = 0}, 99), 2.0);
}

}  // namespace
}  // namespace tessera
