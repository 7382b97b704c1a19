#include "layers/experts.hpp"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>

#include "layers/routing.hpp"
#include "tessera/error.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

struct Sizes {
  int64_t N, E, k, D;
};
void PrintTo(const Sizes& s, std::ostream* os) { *os << fmt::format("N{} E{} k{} D{}", s.N, s.E, s.k, s.D); }

at::Tensor random_choice(const Sizes& s) { return choose_experts(at::rand({s.N, s.E}), {}, s.k); }

class Experts : public testing::TestWithParam<Sizes> {};

TEST_P(Experts, DispatchSortsByExpert) {
  const auto s = GetParam();
  const auto indices_nk = random_choice(s);
  const auto d = dispatch(indices_nk, s.E), want = dispatch_ref(indices_nk, s.E);
  EXPECT_TRUE(bit_equal(d.counts_e, want.counts_e));
  EXPECT_TRUE(bit_equal(d.slot_m, want.slot_m));
  EXPECT_TRUE(bit_equal(d.token_m, want.token_m));
  EXPECT_TRUE(bit_equal(d.row_nk, want.row_nk));
  EXPECT_EQ(d.counts_e.sum().item<int64_t>(), s.N * s.k);
  EXPECT_TRUE(bit_equal(d.slot_m.index_select(0, d.row_nk.flatten()), at::arange(s.N * s.k)));
}

struct Outcome {
  std::vector<at::Tensor> parts;  // sorted rows, output, gradients of x, y and weights
};

template <class Permute, class Combine>
Outcome run(const Dispatch& d, const at::Tensor& x, const at::Tensor& y, const at::Tensor& w, const at::Tensor& dx, const at::Tensor& dy,
            const Permute& permute, const Combine& combine) {
  const auto x_nd = x.detach().clone().set_requires_grad(true), y_md = y.detach().clone().set_requires_grad(true);
  const auto w_nk = w.detach().clone().set_requires_grad(true);
  const auto sorted_md = permute(x_nd, d), out_nd = combine(y_md, w_nk, d);
  const auto grads = torch::autograd::grad({sorted_md, out_nd}, {x_nd, y_md, w_nk}, {dx, dy});
  return {{sorted_md, out_nd, grads[0], grads[1], grads[2]}};
}

// The fast form errs against fp64 at most twice as much as the plain composition in the same dtype.
TEST_P(Experts, PermuteAndCombine) {
  const auto s = GetParam();
  const auto d = dispatch(random_choice(s), s.E);
  const auto M = s.N * s.k;
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
    const auto x = at::randn({s.N, s.D}).to(dtype), y = at::randn({M, s.D}).to(dtype), w = at::rand({s.N, s.k}).to(wide);
    const auto dx = at::randn({M, s.D}).to(dtype), dy = at::randn({s.N, s.D}).to(dtype);
    const auto f64 = [](const at::Tensor& t) { return t.to(at::kDouble); };
    const auto got = run(d, x, y, w, dx, dy, permute_tokens, combine_tokens);
    const auto plain = run(d, x, y, w, dx, dy, permute_tokens_ref, combine_tokens_ref);
    const auto exact = run(d, f64(x), f64(y), f64(w), f64(dx), f64(dy), permute_tokens_ref, combine_tokens_ref);
    EXPECT_TRUE(bit_equal(got.parts[0], plain.parts[0]));
    for (size_t i = 0; i < got.parts.size(); ++i) {
      EXPECT_EQ(got.parts[i].scalar_type(), plain.parts[i].scalar_type());
      const auto limit = std::max(kErrorFactor * relative_rms(plain.parts[i], exact.parts[i]), tolerance(dtype, Op::kElementwise));
      EXPECT_TRUE(close(got.parts[i], exact.parts[i], limit)) << c10::toString(dtype) << " part " << i;
    }
  }
}

TEST_P(Experts, ThreadsDoNotMatter) {
  const auto s = GetParam();
  const auto d = dispatch(random_choice(s), s.E);
  const auto M = s.N * s.k;
  const auto x = at::randn({s.N, s.D}), y = at::randn({M, s.D}), w = at::rand({s.N, s.k}), dx = at::randn({M, s.D}), dy = at::randn({s.N, s.D});
  const auto threads = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = run(d, x, y, w, dx, dy, permute_tokens, combine_tokens);
  at::set_num_threads(threads);
  const auto all = run(d, x, y, w, dx, dy, permute_tokens, combine_tokens);
  for (size_t i = 0; i < one.parts.size(); ++i) EXPECT_TRUE(bit_equal(all.parts[i], one.parts[i])) << "part " << i;
}

INSTANTIATE_TEST_SUITE_P(Layers, Experts,
                         testing::Values(Sizes{1, 8, 2, 16}, Sizes{63, 4, 4, 33}, Sizes{130, 16, 1, 1}, Sizes{130, 64, 6, 96}, Sizes{700, 12, 3, 257}));

TEST(Experts, NoRowsForUnchosenExperts) {
  const auto indices_nk = at::tensor({1, 3, 1, 3, 1, 5}, at::kLong).view({3, 2});
  const auto d = dispatch(indices_nk, 7);
  EXPECT_TRUE(bit_equal(d.counts_e, at::tensor({0, 3, 0, 2, 0, 1, 0}, at::kLong)));
  EXPECT_TRUE(bit_equal(d.token_m, at::tensor({0, 1, 2, 0, 1, 2}, at::kLong)));
}

// A gradient that is a view without memory of its own, as a sum's backward makes it.
TEST(Experts, ExpandedGradient) {
  const auto d = dispatch(at::tensor({0, 1, 1, 2}, at::kLong).view({2, 2}), 3);
  const auto x_nd = at::randn({2, 4}).set_requires_grad(true);
  EXPECT_TRUE(bit_equal(torch::autograd::grad({permute_tokens(x_nd, d).sum()}, {x_nd})[0], at::zeros({2, 4}) + 2));
  const auto y_md = at::randn({4, 4}), w_nk = at::rand({2, 2}).set_requires_grad(true);
  const auto dw_nk = torch::autograd::grad({combine_tokens(y_md, w_nk, d).sum()}, {w_nk})[0];
  EXPECT_TRUE(close(dw_nk, y_md.sum(1).index_select(0, d.row_nk.flatten()).view({2, 2}), tolerance(at::kFloat, Op::kReduction)));
}

TEST(Experts, WrongInputsAreNamed) {
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const Error& error) {
      return error.message();
    }
    return "no error";
  };
  const auto indices_nk = at::tensor({0, 1, 1, 2}, at::kLong).view({2, 2});
  EXPECT_EQ(message([&] { dispatch(indices_nk, 2); }), "[dispatch] experts must be in [0, 2), got 2 for token 1");
  EXPECT_EQ(message([&] { dispatch(indices_nk.to(at::kInt), 3); }), "[dispatch] indices must be int64 [N, k], got Int [2, 2]");
  const auto d = dispatch(indices_nk, 3);
  EXPECT_EQ(message([&] { permute_tokens(at::rand({3, 8}), d); }), "[permute_tokens] x must be [2, D], got [3, 8]");
  EXPECT_EQ(message([&] { combine_tokens(at::rand({4, 8}), at::rand({2, 3}), d); }), "[combine_tokens] weights must be [2, 2], got [2, 3]");
}

}  // namespace
}  // namespace tessera
