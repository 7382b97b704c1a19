#include "layers/routing.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>

#include <limits>

#include "checkpoint/safetensors.hpp"
#include "tessera/error.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

constexpr int64_t kTopK = 3;
constexpr double kScaling = 2.5, kRate = 1e-3, kAuxCoeff = 1e-2, kZCoeff = 1e-3;

at::Tensor golden(const std::string& name) {
  static const auto file = SafetensorsFile::open(TESSERA_SOURCE_DIR "/tests/golden/router/router.safetensors");
  return file.tensor(name);
}

Spans golden_spans() {
  const auto lengths = golden("document_lengths");
  return Spans::documents({lengths.const_data_ptr<int64_t>(), lengths.const_data_ptr<int64_t>() + lengths.numel()});
}

int64_t documents_with_a_valid_token(const Spans& spans, const at::Tensor& valid_n) {
  int64_t count = 0;
  for (int64_t i = 0; i < spans.size(); ++i) count += valid_n.slice(0, spans.rows()[i], spans.rows()[i + 1]).any().item<bool>();
  return count;
}

struct Groups {
  const char* name;
  int64_t num_groups, topk_group;
};
void PrintTo(const Groups& g, std::ostream* os) { *os << g.name; }

class GoldenRouter : public testing::TestWithParam<Groups> {};

TEST_P(GoldenRouter, ChoicesWeightsCountsAndBias) {
  const auto [name, num_groups, topk_group] = GetParam();
  const std::string prefix = std::string(name) + ".";
  const auto scores_ne = at::sigmoid(golden("logits"));
  const auto indices_nk = choose_experts(scores_ne, golden("bias"), kTopK, num_groups, topk_group);
  EXPECT_TRUE(bit_equal(indices_nk, golden(prefix + "indices")));
  EXPECT_TRUE(close(expert_weights(scores_ne, indices_nk, true, kScaling), golden(prefix + "weights"), tolerance(at::kFloat, Op::kElementwise)));
  const auto counts_e = expert_counts(indices_nk, golden("mask"), 12);
  EXPECT_TRUE(bit_equal(counts_e, golden(prefix + "counts").to(at::kFloat)));

  auto bias_e = golden("bias").clone();
  update_router_bias(bias_e, counts_e, kRate);
  EXPECT_TRUE(close(bias_e, golden(prefix + "bias_after"), tolerance(at::kFloat, Op::kElementwise)));
  const auto moved = bias_e.ne(golden("bias"));
  EXPECT_TRUE(bit_equal(moved, golden(prefix + "bias_after").ne(golden("bias"))));
  EXPECT_FALSE(moved.all().item<bool>()) << "an expert with the mean count keeps its bias";
  update_router_bias(bias_e, counts_e, 0);
  EXPECT_TRUE(bit_equal(bias_e.ne(golden("bias")), moved));
}
INSTANTIATE_TEST_SUITE_P(Routing, GoldenRouter, testing::Values(Groups{"plain", 1, 1}, Groups{"grouped", 4, 2}));

TEST(Routing, GoldenSequenceLoss) {
  const auto spans = golden_spans();
  const auto valid_n = golden("mask");
  const auto logits_ne = golden("logits").clone().set_requires_grad(true);
  const auto loss = seq_aux_loss(logits_ne, spans, valid_n, kTopK) * (kAuxCoeff / documents_with_a_valid_token(spans, valid_n));
  EXPECT_TRUE(close(loss, golden("seq_aux.loss"), tolerance(at::kFloat, Op::kReduction, 40)));
  EXPECT_TRUE(close(torch::autograd::grad({loss}, {logits_ne})[0], golden("seq_aux.grad_logits"), tolerance(at::kFloat, Op::kReduction, 40)));
}

TEST(Routing, GoldenZLoss) {
  const auto valid_n = golden("mask");
  const auto logits_ne = golden("logits").clone().set_requires_grad(true);
  const auto loss = router_z_loss(logits_ne, valid_n) * (kZCoeff / valid_n.sum().item<double>());
  EXPECT_TRUE(close(loss, golden("z.loss"), tolerance(at::kFloat, Op::kReduction, 40)));
  EXPECT_TRUE(close(torch::autograd::grad({loss}, {logits_ne})[0], golden("z.grad_logits"), tolerance(at::kFloat, Op::kReduction, 40)));
}

TEST(Routing, PaddingMovesNothing) {
  const auto spans = golden_spans();
  const auto valid_n = golden("mask");
  const auto run = [&](const at::Tensor& input_ne) {
    const auto logits_ne = input_ne.clone().set_requires_grad(true);
    const auto indices_nk = choose_experts(at::sigmoid(logits_ne), golden("bias"), kTopK);
    const auto aux = seq_aux_loss(logits_ne, spans, valid_n, kTopK), z = router_z_loss(logits_ne, valid_n);
    return std::vector{expert_counts(indices_nk, valid_n, 12), aux, z, torch::autograd::grad({aux + z}, {logits_ne})[0]};
  };
  const auto logits_ne = golden("logits");
  const auto before = run(logits_ne);
  const auto after = run(at::where(valid_n.unsqueeze(1), logits_ne, at::randn({40, 12}) * 20));
  for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(bit_equal(after[i], before[i])) << "result " << i;
  EXPECT_EQ(after[3].masked_select(valid_n.logical_not().unsqueeze(1)).abs().max().item<float>(), 0);
}

struct Choice {
  int64_t N, E, k, num_groups, topk_group;
};
void PrintTo(const Choice& c, std::ostream* os) { *os << fmt::format("N{} E{} k{} groups {} of {}", c.N, c.E, c.k, c.topk_group, c.num_groups); }

class ChooseExperts : public testing::TestWithParam<Choice> {};

// Few distinct values, so that most choices are ties.
TEST_P(ChooseExperts, EqualsStableSorts) {
  const auto c = GetParam();
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    const auto scores_ne = (at::rand({c.N, c.E}) * 5).round().to(dtype) / 8;
    const auto bias_e = (at::rand({c.E}) * 2).round() / 8;
    for (const auto& bias : {at::Tensor(), bias_e}) {
      const auto got = choose_experts(scores_ne, bias, c.k, c.num_groups, c.topk_group);
      EXPECT_TRUE(bit_equal(got, choose_experts_ref(scores_ne, bias, c.k, c.num_groups, c.topk_group)));
      if (c.k > 1) {
        EXPECT_TRUE((got.narrow(1, 1, c.k - 1) > got.narrow(1, 0, c.k - 1)).all().item<bool>()) << "ascending and distinct";
      }
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Routing, ChooseExperts,
                         testing::Values(Choice{1, 8, 1, 1, 1}, Choice{63, 12, 12, 1, 1}, Choice{130, 128, 6, 1, 1}, Choice{130, 512, 22, 1, 1},
                                         Choice{63, 16, 4, 4, 2}, Choice{130, 64, 8, 8, 4}, Choice{5, 6, 2, 3, 1},
                                         Choice{0, 16, 2, 1, 1}, Choice{3, 33, 33, 1, 1}, Choice{7, 100, 5, 5, 2}, Choice{5, 72, 7, 36, 12}, Choice{2, 5000, 3, 1, 1}));

TEST(Routing, TiesGoToTheLowerIndex) {
  const auto same = at::zeros({1, 8}) + 0.5;
  EXPECT_TRUE(bit_equal(choose_experts(same, {}, 3), at::tensor({0, 1, 2}, at::kLong).view({1, 3})));
  const auto bias_e = at::tensor({0., 0., 0., 0., 1., 1., 0., 0.}).to(at::kFloat);
  EXPECT_TRUE(bit_equal(choose_experts(same, bias_e, 3, 4, 2), at::tensor({0, 4, 5}, at::kLong).view({1, 3})));
}

TEST(Routing, ANanIsChosenLast) {
  auto scores_ne = at::rand({4, 8});
  scores_ne.select(1, 2).fill_(std::numeric_limits<float>::quiet_NaN());
  EXPECT_FALSE(choose_experts(scores_ne, {}, 7).eq(2).any().item<bool>());
  EXPECT_TRUE(bit_equal(choose_experts(scores_ne, {}, 8), choose_experts_ref(scores_ne, {}, 8)));
}

TEST(Routing, EvenExpertsAreEvenOnAnyRangeOfTokens) {
  for (const auto& [k, E] : {std::pair<int64_t, int64_t>{3, 8}, {2, 4}, {1, 5}, {5, 5}, {22, 512}})
    for (const int64_t first : {int64_t{0}, int64_t{7}, int64_t{1} << 62})
      for (const int64_t n : {0, 1, 6, 100}) {
        const auto got_nk = even_experts(at::arange(first, first + n, at::kLong), k, E);
        ASSERT_EQ(got_nk.sizes(), (at::IntArrayRef{n, k}));
        if (n == 0) continue;
        const auto load_e = expert_counts(got_nk, {}, E);
        EXPECT_LE((load_e.max() - load_e.min()).item<float>(), 1) << k << " of " << E << " from " << first;
        if (k > 1) {
          EXPECT_TRUE(got_nk.narrow(1, 1, k - 1).gt(got_nk.narrow(1, 0, k - 1)).all().item<bool>()) << "ascending, none twice";
        }
      }
  const auto wraps = even_experts(at::tensor({2, 3}, at::kLong), 3, 8), want = at::tensor({0, 6, 7, 1, 2, 3}, at::kLong).view({2, 3});
  EXPECT_TRUE(bit_equal(wraps, want));
  EXPECT_THROW(even_experts(at::tensor({2}, at::kLong), 9, 8), Error);
}

TEST(Routing, OfLogitsIsOfTheirSigmoid) {
  for (const auto& [N, E, k] : {std::tuple<int64_t, int64_t, int64_t>{70, 128, 6}, {1, 33, 33}, {9, 50, 40}, {0, 8, 2}, {2, 9000, 3}})
    for (const bool normed : {true, false})
      for (const auto dtype : {at::kFloat, at::kDouble}) {
        const auto bias_e = at::randn({E}), x_ne = at::randn({N, E}).to(dtype), g_nk = at::randn({N, k}).to(dtype);
        const auto logits_ne = x_ne.clone().set_requires_grad(true), plain_ne = x_ne.to(at::kDouble).set_requires_grad(true);
        const auto scores = router_scores(logits_ne);
        const auto indices_nk = choose_experts(scores, bias_e, k);
        EXPECT_TRUE(bit_equal(indices_nk, choose_experts_ref(at::sigmoid(x_ne), bias_e, k)));
        const auto got = expert_weights(scores, indices_nk, normed, kScaling), want = expert_weights(at::sigmoid(plain_ne), indices_nk, normed, kScaling);
        EXPECT_EQ(got.scalar_type(), dtype);
        EXPECT_TRUE(close(got, want, tolerance(dtype, Op::kReduction, k)));
        EXPECT_TRUE(close(torch::autograd::grad({got}, {logits_ne}, {g_nk})[0], torch::autograd::grad({want}, {plain_ne}, {g_nk.to(at::kDouble)})[0],
                          tolerance(dtype, Op::kReduction, k)));
      }
}

TEST(Routing, CountsOfManyTokens) {
  for (const auto& [N, E, k] : {std::tuple<int64_t, int64_t, int64_t>{3000, 100, 3}, {0, 7, 2}, {5, 9000, 4}}) {
    const auto indices_nk = at::randint(E, {N, k}, at::kLong), valid_n = at::rand({N}).gt(0.3);
    const auto chosen = [&](const at::Tensor& rows_nk) { return at::bincount(rows_nk.flatten(), {}, E).to(at::kFloat); };
    EXPECT_TRUE(bit_equal(expert_counts(indices_nk, {}, E), chosen(indices_nk)));
    EXPECT_TRUE(bit_equal(expert_counts(indices_nk, valid_n, E), chosen(indices_nk.index_select(0, valid_n.nonzero().squeeze(1)))));
  }
}

TEST(Routing, WeightsWithoutNorm) {
  const auto scores_ne = at::rand({7, 5}, at::kDouble).set_requires_grad(true);
  const auto indices_nk = choose_experts(scores_ne, {}, 2);
  const auto weights_nk = expert_weights(scores_ne, indices_nk, false, kScaling);
  EXPECT_TRUE(bit_equal(weights_nk.detach(), scores_ne.detach().gather(1, indices_nk) * kScaling));
  const auto grad_ne = torch::autograd::grad({weights_nk.sum()}, {scores_ne})[0];
  EXPECT_EQ(grad_ne.ne(0).sum().item<int64_t>(), 14);
}

// One document lies in two spans, apart from each other; another has no valid token.
TEST(Routing, SequenceLossEqualsItsFormula) {
  const Spans spans({{.document = 4, .start = 0, .length = 5, .document_len = 12}, {.document = 2, .start = 0, .length = 9, .document_len = 9},
                     {.document = 4, .start = 5, .length = 7, .document_len = 12}, {.document = 7, .start = 0, .length = 2, .document_len = 2}});
  auto valid_n = at::rand({23}).gt(0.2);
  valid_n.narrow(0, 21, 2).fill_(false);
  for (const auto& valid : {valid_n, at::Tensor()}) {
    const auto logits_ne = at::randn({23, 10}, at::kDouble).set_requires_grad(true);
    const auto got = seq_aux_loss(logits_ne, spans, valid, 3), want = seq_aux_loss_ref(logits_ne, spans, valid, 3);
    EXPECT_TRUE(close(got, want, tolerance(at::kDouble, Op::kReduction)));
    EXPECT_TRUE(close(torch::autograd::grad({got}, {logits_ne})[0], torch::autograd::grad({want}, {logits_ne})[0],
                      tolerance(at::kDouble, Op::kReduction)));
  }
}

TEST(Routing, WrongShapesAreNamed) {
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const Error& error) {
      return error.message();
    }
    return "no error";
  };
  const auto scores_ne = at::rand({4, 12});
  EXPECT_EQ(message([&] { choose_experts(scores_ne, at::rand({11}), 3); }), "[choose_experts] bias must be [12], got [11]");
  EXPECT_EQ(message([&] { choose_experts(scores_ne, {}, 13); }), "[choose_experts] k must be in [1, 12], got 13");
  EXPECT_EQ(message([&] { choose_experts(scores_ne, {}, 3, 5, 2); }),
            "[choose_experts] 12 experts must split into num_groups = 5 groups of which topk_group = 2 are kept");
  EXPECT_EQ(message([&] { choose_experts(scores_ne, {}, 4, 4, 1); }),
            "[choose_experts] groups must hold at least 2 experts and the kept ones at least k, got 4 groups of 3, 1 kept, k = 4");
  EXPECT_EQ(message([&] { expert_counts(choose_experts(scores_ne, {}, 3), at::zeros({3}, at::kBool), 12); }),
            "[routing] the mask of valid tokens must be [4], got [3]");
}

}  // namespace
}  // namespace tessera
