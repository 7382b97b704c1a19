#include "layers/collectives.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "tessera/error.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/ranks.hpp"

namespace tessera {
namespace {

TEST(Mesh, RanksLieWithTensorInnermostAndExpertsFoldedOverTheData) {
  const Mesh mesh{.pp = 2, .dp_replicate = 2, .dp_shard = 2, .cp = 2, .tp = 2, .ep = 2, .etp = 2};
  const Place place = place_of(mesh, 16 + 8 + 4 + 1);
  EXPECT_EQ(std::vector<int64_t>({place.pp, place.dp_replicate, place.dp_shard, place.cp, place.tp}), std::vector<int64_t>({1, 1, 1, 0, 1}));
  EXPECT_EQ(std::vector<int64_t>({place.expert_copy, place.ep, place.etp}), std::vector<int64_t>({1, 0, 1}));
  for (int64_t rank = 0; rank < mesh.size(); ++rank) EXPECT_EQ(rank_at(mesh, place_of(mesh, rank)), rank);
  EXPECT_EQ(place_text(mesh, 29), "rank 29 (pp 1, dp_replicate 1, dp_shard 1, cp 0, tp 1)");
}

TEST(Collectives, UnevenRowsComeTogetherAndTheirGradientsAreSums) {
  run_ranks({.tp = 3}, [](MeshGroups& groups) {
    const std::vector<int64_t> rows{3, 0, 2};
    const int64_t r = groups.place().tp;
    const at::AutoGradMode grad_mode(true);
    auto x = (at::arange(rows[r] * 2, at::kFloat).view({-1, 2}) + 10.0 * static_cast<double>(r)).set_requires_grad(true);
    const at::Tensor all = gather_rows(x, rows, groups.tensor());
    ASSERT_EQ(all.sizes(), at::IntArrayRef({5, 2}));
    EXPECT_EQ(all[3][1].item<float>(), 21);
    const at::Tensor weight = at::arange(10, at::kFloat).view({5, 2}) * static_cast<double>(r + 1);  // each rank's loss differs: gradients are their sum
    const auto gradient = torch::autograd::grad({(all * weight).sum()}, {x})[0];
    const int64_t begin = r == 0 ? 0 : 3;
    EXPECT_TRUE(bit_equal(gradient, (at::arange(10, at::kFloat).view({5, 2}) * 6).narrow(0, begin, rows[r]).contiguous())) << "gradient";
    const at::Tensor back = reduce_scatter_rows(all, rows, groups.tensor());
    EXPECT_TRUE(bit_equal(back.detach(), x.detach() * 3)) << "three copies added up";
  });
}

TEST(Collectives, ExchangedRowsFindTheirWayBack) {
  run_ranks({.tp = 3}, [](MeshGroups& groups) {
    const int64_t r = groups.place().tp;
    const std::vector<std::vector<int64_t>> sends{{1, 0, 2}, {0, 0, 0}, {3, 1, 0}};
    std::vector<int64_t> receives;
    for (const auto& row : sends) receives.push_back(row[r]);
    const int64_t n = sends[r][0] + sends[r][1] + sends[r][2];
    const at::AutoGradMode grad_mode(true);
    auto x = (at::arange(n * 2, at::kDouble).view({n, 2}) + 100.0 * static_cast<double>(r)).set_requires_grad(true);
    const at::Tensor there = exchange_rows(x, sends[r], receives, groups.tensor());
    EXPECT_TRUE(bit_equal(exchange_rows(there, receives, sends[r], groups.tensor()).detach(), x.detach())) << "there and back";
    const auto gradient = torch::autograd::grad({(there * there).sum() / 2}, {x})[0];
    EXPECT_TRUE(bit_equal(gradient, x.detach())) << "gradient";
    if (r == 0) {
      EXPECT_EQ(there[1][0].item<double>(), 200);
    }
  });
}

TEST(Collectives, SumsAndTheBytesThatTheyTake) {
  run_ranks({.cp = 2, .tp = 2}, [](MeshGroups& groups) {
    const auto rank = static_cast<double>(groups.place().rank);
    const at::AutoGradMode grad_mode(true);
    auto x = at::full({4}, rank, at::kBFloat16).set_requires_grad(true);
    const at::Tensor sum = all_reduce(x, groups.sequence());
    EXPECT_EQ(sum[0].item<float>(), 6);
    EXPECT_EQ(groups.sequence()->sent_bytes(), 2 * 3 * 8 / 4);
    const auto gradient = torch::autograd::grad({sum.sum() * (rank + 1)}, {x})[0];
    EXPECT_EQ(gradient[0].item<float>(), 10);
    EXPECT_EQ(groups.tensor()->sent_bytes(), 0);
    const at::Tensor alone = all_reduce(x, nullptr);
    EXPECT_TRUE(alone.is_same(x));
  });
}

TEST(Collectives, ADeadRankIsAnErrorWithThePlace) {
  try {
    run_ranks({.tp = 2}, [](MeshGroups& groups) {
      groups.whereabouts().place = "layers.3 (moe), forward";
      if (groups.place().tp == 1) throw Error(ExitCode::kRuntime, "gone");
      try {
        at::Tensor x = at::zeros({4});
        groups.tensor()->all_reduce(x);
        ADD_FAILURE() << "the sum of one rank";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::kCollective);
        EXPECT_TRUE(error.message().starts_with("all_reduce over tp (ranks 0, 1) in layers.3 (moe), forward, number 0: ")) << error.message();
        throw;
      }
    });
    FAIL();
  } catch (const Error&) {
  }
}

TEST(ContextCut, EveryTokenLiesOnOneRank) {
  for (const std::vector<int64_t>& lengths : {std::vector<int64_t>{1}, {7}, {1, 1, 1}, {5, 1, 64, 3}, {33, 17}}) {
    const Spans whole = Spans::documents(lengths);
    for (int64_t ranks = 1; ranks <= 4; ++ranks) {
      at::Tensor seen = at::zeros({whole.num_tokens()}, at::kLong);
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const ContextCut cut(whole, ranks, rank);
        const at::Tensor rows = cut.take(at::arange(whole.num_tokens(), at::kLong));
        seen.index_add_(0, rows, at::full({rows.numel()}, 1, at::kLong));
        EXPECT_EQ(cut.spans().num_tokens(), rows.numel());
        if (rows.numel()) {
          EXPECT_TRUE(bit_equal(cut.spans().positions_n(at::kCPU), whole.positions_n(at::kCPU).index_select(0, rows))) << "positions";
        }
        EXPECT_LE(cut.num_tokens(rank), cut.most_tokens());
      }
      EXPECT_TRUE(seen.eq(1).all().item<bool>());
    }
  }
}

}  // namespace
}  // namespace tessera
