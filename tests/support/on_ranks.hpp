// A function of rows and parameters on context-parallel ranks, each with its pieces of documents, against the same on one rank that holds them whole.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "tessera/context.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/ranks.hpp"

namespace tessera {

struct RankProblem {
  using Fn = std::function<at::Tensor(Context&, const std::vector<at::Tensor>&)>;
  std::string name;
  Fn fn;                           // output rows as its first input has
  std::vector<int64_t> lengths;    // of the documents
  std::vector<at::Tensor> inputs;  // fp64; the first `cut` are rows [N, ...] and lie cut over the ranks, every rank holds the others
  size_t cut = 1;
  at::Tensor dy;                   // fp64
  double limit = 0;
};

// Rows of a rank, in the numbers of the whole.
inline at::Tensor row_numbers(const ContextCut& cut) {
  std::vector<int64_t> rows;
  for (const Range& range : cut.ranges(cut.rank()))
    for (int64_t row = range.begin; row < range.end; ++row) rows.push_back(row);
  return at::tensor(rows, at::kLong);
}

// `fn` takes its inputs in `dtype`; the one rank's are the same values in fp64. Every rank works all problems in order, over one set of groups.
inline void expect_ranks_agree(const std::vector<RankProblem>& problems, int64_t ranks, at::ScalarType dtype) {
  const auto leaves_of = [](const std::vector<at::Tensor>& inputs, at::ScalarType type) {
    std::vector<at::Tensor> leaves;
    for (const at::Tensor& x : inputs) leaves.push_back(x.to(type).detach().clone().requires_grad_());
    return leaves;
  };
  struct Result {
    at::Tensor y;
    std::vector<at::Tensor> gradients;
  };
  std::vector<Result> want, got;
  std::vector<RankProblem> rounded = problems;
  for (RankProblem& p : rounded) {
    const at::AutoGradMode grad_mode(true);
    for (at::Tensor& x : p.inputs) x = x.to(dtype).to(at::kDouble);
    p.dy = p.dy.to(dtype).to(at::kDouble);
    const Spans whole = Spans::documents(p.lengths);
    Context ctx(whole);
    const auto leaves = leaves_of(p.inputs, at::kDouble);
    const at::Tensor y = p.fn(ctx, leaves);
    want.push_back({y.detach(), torch::autograd::grad({y}, leaves, {p.dy})});
    Result zero{.y = at::zeros_like(want.back().y), .gradients = {}};
    for (const at::Tensor& gradient : want.back().gradients) zero.gradients.push_back(at::zeros_like(gradient));
    got.push_back(std::move(zero));
  }
  std::mutex mutex;
  const Mesh mesh{.cp = ranks};
  run_ranks(mesh, [&](MeshGroups& groups) {
    const at::AutoGradMode grad_mode(true);
    for (size_t i = 0; i < rounded.size(); ++i) {
      const RankProblem& p = rounded[i];
      const ContextCut cut(Spans::documents(p.lengths), ranks, groups.place().cp);
      Context ctx(cut.spans());
      ctx.set_mesh(mesh), ctx.set_groups(&groups), ctx.set_cut(&cut);
      std::vector<at::Tensor> local = p.inputs;
      for (size_t k = 0; k < p.cut; ++k) local[k] = cut.take(local[k]);
      const auto leaves = leaves_of(local, dtype);
      const at::Tensor y = p.fn(ctx, leaves);
      const auto gradients = torch::autograd::grad({y}, leaves, {cut.take(p.dy).to(y.scalar_type())});
      const at::Tensor rows = row_numbers(cut);
      const std::lock_guard lock(mutex);
      got[i].y.index_add_(0, rows, y.detach().to(at::kDouble));
      for (size_t k = 0; k < leaves.size(); ++k) {
        if (k < p.cut) got[i].gradients[k].index_add_(0, rows, gradients[k].to(at::kDouble));
        else got[i].gradients[k].add_(gradients[k].to(at::kDouble));
      }
    }
  });
  for (size_t i = 0; i < rounded.size(); ++i) {
    const std::string where = fmt::format("{}, documents [{}], {} ranks, {}", rounded[i].name, fmt::join(rounded[i].lengths, ", "), ranks, c10::toString(dtype));
    EXPECT_TRUE(close(got[i].y, want[i].y, rounded[i].limit)) << where;
    for (size_t k = 0; k < want[i].gradients.size(); ++k)
      EXPECT_TRUE(close(got[i].gradients[k], want[i].gradients[k], rounded[i].limit)) << where << ", gradient of input " << k;
  }
}

// Packings of documents: single tokens, fewer tokens than chunks, cuts everywhere in a document, and drawn lengths.
inline std::vector<std::vector<int64_t>> packings() {
  std::vector<std::vector<int64_t>> list{{1}, {3}, {1, 1, 1}, {9}, {5, 1, 64, 3}, {130}, {33, 17, 1, 2}, {1, 1, 90}, {90, 1, 1}};
  uint64_t state = 12345;
  const auto draw = [&](int64_t below) { return static_cast<int64_t>((state = state * 6364136223846793005ULL + 1442695040888963407ULL) >> 33) % below; };
  for (int i = 0; i < 6; ++i) {
    std::vector<int64_t> lengths;
    for (int64_t n = 1 + draw(7); n > 0; --n) lengths.push_back(1 + draw(draw(2) ? 40 : 4));
    list.push_back(std::move(lengths));
  }
  return list;
}

}  // namespace tessera
