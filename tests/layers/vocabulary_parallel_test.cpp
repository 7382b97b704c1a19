// Embedding and loss with the vocabulary cut over tensor-parallel ranks, against one process.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scalar_tensor.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "layers/cross_entropy.hpp"
#include "layers/embedding.hpp"
#include "tessera/error.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/emulated.hpp"
#include "tests/support/gradients.hpp"
#include "tests/support/ranks.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

constexpr int64_t kWords = 120, kWidth = 33;

at::Tensor part(const at::Tensor& table_vd, const MeshGroups& groups) {
  const int64_t rows = table_vd.size(0) / groups.mesh().tp;
  return table_vd.narrow(0, groups.place().tp * rows, rows);
}

// The whole table of the ranks' parts.
at::Tensor whole(const at::Tensor& part_vd, const MeshGroups& groups) {
  at::Tensor table = at::empty({part_vd.size(0) * groups.mesh().tp, part_vd.size(1)}, part_vd.options());
  groups.tensor()->all_gather(table, part_vd.contiguous());
  return table;
}

// Every rank's tensor added up.
at::Tensor total(const at::Tensor& x, const MeshGroups& groups) {
  at::Tensor sum = x.detach().to(at::kDouble).contiguous().clone();
  groups.tensor()->all_reduce(sum);
  return sum;
}

at::Tensor targets(int64_t tokens, int64_t every) {
  auto t = at::randint(kWords, {tokens}, at::kLong);
  for (int64_t i = 0; every > 0 && i < tokens; i += every) t[i].fill_(-1);
  return t;
}

struct Tokens {
  int64_t num, every;  // every `every`-th has no target
};

TEST(VocabularyParallel, LossAndGradientsEqualOneProcess) {
  at::manual_seed(5);
  const auto g = at::scalar_tensor(0.37, at::kDouble);
  struct Case {
    at::ScalarType dtype;
    at::Tensor h, w, t;
    WithGradients plain, want;
  };
  std::vector<Case> cases;
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16})
    for (const Tokens tokens : {Tokens{1, 0}, {63, 4}, {130, 0}, {20, 1}, {0, 0}}) {
      const auto t = targets(tokens.num, tokens.every), h = at::randn({tokens.num, kWidth}, dtype), w = at::randn({kWords, kWidth}, dtype);
      const TensorFn ref = [&](const auto& in) { return linear_cross_entropy_ref(in[0], in[1], t); };
      cases.push_back({dtype, h, w, t, with_gradients(ref, {h, w}, g), with_gradients(ref, {h.to(at::kDouble), w.to(at::kDouble)}, g)});
    }
  const auto compare = [&](const Case& c, int64_t chunk, const MeshGroups& groups) {
    SCOPED_TRACE(fmt::format("{}, {} tokens, chunks of {}, rank {} of {}", c10::toString(c.dtype), c.h.size(0), chunk, groups.place().tp, groups.mesh().tp));
    const auto limit = [&](const at::Tensor& p, const at::Tensor& b) { return std::max(tolerance(c.dtype, Op::kMatmul, 300), kErrorFactor * relative_rms(p, b)); };
    const auto w_part = part(c.w, groups);
    const auto got = with_gradients([&](const auto& in) { return linear_cross_entropy(in[0], in[1], c.t, groups.tensor(), chunk); }, {c.h, w_part}, g);
    EXPECT_EQ(got.output.scalar_type(), c.dtype == at::kDouble ? at::kDouble : at::kFloat);
    if (groups.place().tp > 0) {
      EXPECT_EQ(got.output.item<double>(), 0) << "the loss counts on rank 0";
    }
    EXPECT_TRUE(close(total(got.output, groups), c.want.output, limit(c.plain.output, c.want.output)));
    EXPECT_EQ(got.gradients[0].scalar_type(), c.dtype);
    EXPECT_EQ(got.gradients[1].scalar_type(), c.dtype);
    EXPECT_TRUE(close(total(got.gradients[0], groups), c.want.gradients[0], limit(c.plain.gradients[0], c.want.gradients[0]))) << "gradient of h";
    EXPECT_TRUE(close(whole(got.gradients[1], groups), c.want.gradients[1], limit(c.plain.gradients[1], c.want.gradients[1]))) << "gradient of the weight";
    const auto each = cross_entropy_per_token(c.h, w_part, c.t, groups.tensor(), chunk), alone = cross_entropy_per_token(c.h, c.w, c.t);
    EXPECT_TRUE(close(each, alone, tolerance(c.dtype == at::kDouble ? at::kDouble : at::kFloat, Op::kReduction))) << "token by token";
    EXPECT_EQ(each.masked_select(c.t.lt(0)).ne(0).sum().item<int64_t>(), 0);
  };
  for (const int64_t tp : {2, 4})
    run_ranks({.tp = tp}, [&](MeshGroups& groups) {
      for (const Case& c : cases)
        for (const int64_t chunk : {7, 0}) compare(c, chunk, groups);
    });
}

TEST(VocabularyParallel, ChunksAndWantedGradientsDoNotChangeWhatIsExchanged) {
  const auto t = targets(50, 3);
  const auto h = at::randn({50, kWidth}), w = at::randn({kWords, kWidth});
  run_ranks({.tp = 2}, [&](MeshGroups& groups) {
    const auto w_part = part(w, groups);
    const auto sent = [&](const auto& run) {
      const auto before = groups.tensor()->sent_bytes();
      run();
      return groups.tensor()->sent_bytes() - before;
    };
    const int64_t tokens = emulated() ? t.numel() : t.ge(0).sum().item<int64_t>();  // a device is not asked which have a target
    const int64_t bytes = 12 * tokens;                                              // a maximum, a sum and a logit a token; 2 (2 - 1) / 2 of them
    // Ranks may want different gradients, and still meet: rank 0 wants none.
    const bool wants = groups.place().tp == 1;
    for (const int64_t chunk : {1, 7, 0}) {
      const at::AutoGradMode grad_mode(true);
      EXPECT_EQ(sent([&] { linear_cross_entropy(h.detach().set_requires_grad(wants), w_part, t, groups.tensor(), chunk); }), bytes) << "chunk " << chunk;
    }
    EXPECT_FALSE(linear_cross_entropy(h, w_part, t, groups.tensor()).requires_grad());
  });
}

TEST(VocabularyParallel, LargeLogitsStayFinite) {
  const auto t = targets(17, 0);
  const auto h = at::randn({17, kWidth}) * 1000, w = at::randn({kWords, kWidth}) * 10;
  const auto want = linear_cross_entropy_ref(h.to(at::kDouble), w.to(at::kDouble), t);
  run_ranks({.tp = 4}, [&](MeshGroups& groups) {
    EXPECT_TRUE(close(total(linear_cross_entropy(h, part(w, groups), t, groups.tensor()), groups), want, tolerance(at::kFloat, Op::kMatmul)));
  });
}

TEST(VocabularyParallel, NamesTargetsAndIdsBeyondTheVocabulary) {
  run_ranks({.tp = 2}, [](MeshGroups& groups) {
    const auto message = [](const auto& run) -> std::string {
      try {
        run();
      } catch (const Error& e) {
        return e.message();
      }
      return "no error";
    };
    const auto h = at::randn({2, 8}), w = at::randn({5, 8});
    EXPECT_EQ(message([&] { linear_cross_entropy(h, w, at::full({2}, 9, at::kLong), groups.tensor()); }), "no error");
    EXPECT_EQ(message([&] { linear_cross_entropy(h, w, at::full({2}, 10, at::kLong), groups.tensor()); }),
              "[linear_cross_entropy] targets must lie below the vocabulary's 10, got 10");
    EXPECT_EQ(message([&] { embedding(at::full({2}, 10, at::kLong), w, groups.tensor()); }), "[embedding] ids must be in [0, 10), got 10");
    EXPECT_EQ(message([&] { embedding(at::full({2}, -1, at::kLong), w, nullptr); }), "[embedding] ids must be in [0, 5), got -1");
  });
}

TEST(VocabularyParallel, EmbeddingsAddUpAndTheirGradientsAreTheTablesParts) {
  struct Case {
    at::Tensor ids, table, g;
    WithGradients want;
  };
  std::vector<Case> cases;
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16})
    for (const int64_t tokens : {0, 1, 77}) {
      const auto ids = at::randint(kWords, {tokens}, at::kLong), table = at::randn({kWords, kWidth}, dtype), g = at::randn({tokens, kWidth}, dtype);
      cases.push_back({ids, table, g, with_gradients([&](const auto& in) { return embedding(ids, in[0], nullptr); }, {table}, g)});
      EXPECT_TRUE(bit_equal(cases.back().want.output, table.index_select(0, ids)));
    }
  for (const int64_t tp : {2, 4})
    run_ranks({.tp = tp}, [&](MeshGroups& groups) {
      for (const Case& c : cases) {
        const auto got = with_gradients([&](const auto& in) { return embedding(c.ids, in[0], groups.tensor()); }, {part(c.table, groups)}, c.g);
        EXPECT_EQ(got.output.scalar_type(), c.table.scalar_type());
        EXPECT_TRUE(bit_equal(total(got.output, groups), c.want.output.to(at::kDouble))) << "one rank holds each id";
        EXPECT_TRUE(bit_equal(got.gradients[0], part(c.want.gradients[0], groups).contiguous())) << "tp " << tp;
      }
    });
}

}  // namespace
}  // namespace tessera
