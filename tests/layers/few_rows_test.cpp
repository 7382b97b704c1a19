#include "layers/few_rows.hpp"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <limits>
#include <numeric>

#include "tests/support/compare.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

at::Tensor exact(const at::Tensor& x_mk, const at::Tensor& w_ok) { return at::mm(x_mk.to(at::kDouble), w_ok.to(at::kDouble).t()); }

class FewRows : public testing::TestWithParam<at::ScalarType> {
 protected:
  at::Tensor run(const at::Tensor& x_mk, const at::Tensor& w_ok) {
    at::Tensor out_mo = at::full({x_mk.size(0), w_ok.size(0)}, std::numeric_limits<double>::quiet_NaN(), x_mk.options());
    few_rows(out_mo, x_mk, w_ok);
    return out_mo;
  }
};

TEST_P(FewRows, EqualTheProductInAnySize) {
  for (const int64_t rows : {1, 2, 3, 4, 5, 31, 32})
    for (const int64_t inner : {1, 15, 16, 17, 130})
      for (const int64_t columns : {1, 3, 4, 15, 16, 33}) {
        // Positive numbers: a single product may otherwise cancel to far less than its terms.
        const at::Tensor x = at::rand({rows, inner}, GetParam()), w = at::rand({columns, inner}, GetParam());
        EXPECT_TRUE(close(run(x, w), exact(x, w), tolerance(GetParam(), Op::kMatmul, inner))) << rows << " x " << inner << " x " << columns;
      }
}

TEST_P(FewRows, TakeSlicesOfLargerMatrices) {
  const at::Tensor x = at::randn({5, 70}, GetParam()).narrow(1, 3, 40), w = at::randn({90, 64}, GetParam()).narrow(1, 11, 40).narrow(0, 2, 77);
  EXPECT_TRUE(close(run(x, w), exact(x, w), tolerance(GetParam(), Op::kMatmul, 40)));
}

TEST_P(FewRows, ARowIsTheSameBesideAnyOthersAndOnAnyThreads) {
  const at::Tensor x = at::randn({7, 100}, GetParam()), w = at::randn({3000, 100}, GetParam());
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const at::Tensor one = run(x, w);
  at::set_num_threads(2);
  const at::Tensor two = run(x, w);
  at::set_num_threads(threads);
  EXPECT_TRUE(bit_equal(one, two));
  for (int64_t r = 0; r < 7; ++r) EXPECT_TRUE(bit_equal(run(x.narrow(0, r, 1), w), one.narrow(0, r, 1))) << r;
}

TEST_P(FewRows, GroupsTakeTheirExpertsWeight) {
  const std::vector<int64_t> counts{3, 0, 1, 32, 0, 5};
  const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const at::Tensor x = at::randn({rows, 24}, GetParam()), w = at::randn({6, 19, 24}, GetParam());
  at::Tensor out = at::full({rows, 19}, std::numeric_limits<double>::quiet_NaN(), x.options());
  few_rows_grouped(out, x, w, counts);
  std::vector<at::Tensor> want;
  for (int64_t e = 0, row = 0; e < 6; row += counts[e++]) want.push_back(exact(x.narrow(0, row, counts[e]), w[e]));
  EXPECT_TRUE(close(out, at::cat(want), tolerance(GetParam(), Op::kMatmul, 24)));
}

INSTANTIATE_TEST_SUITE_P(Dtypes, FewRows, testing::Values(at::kFloat, at::kBFloat16), [](const auto& info) { return std::string(c10::toString(info.param)); });

TEST(FewRows, SayWhatTheyCannotDo) {
  const at::Tensor x = at::randn({4, 8}), w = at::randn({6, 8}), out = at::empty({4, 6});
  EXPECT_TRUE(few_rows_fit(out, x, w));
  EXPECT_FALSE(few_rows_fit(out, x.to(at::kDouble), w.to(at::kDouble)));
  EXPECT_FALSE(few_rows_fit(out, x.to(at::kBFloat16), w));
  EXPECT_FALSE(few_rows_fit(out, x, at::randn({8, 6}).t()));
}

}  // namespace
}  // namespace tessera
