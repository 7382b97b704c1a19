// The routed experts as one operator, against the formula expert by expert.
#include "layers/expert_mlp.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/relu.h>
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
  int64_t N, E, k, W, F;
};
void PrintTo(const Sizes& s, std::ostream* os) { *os << fmt::format("N{} E{} k{} W{} F{}", s.N, s.E, s.k, s.W, s.F); }

using Inputs = std::vector<at::Tensor>;  // x_nw, weights_nk, up_efw, down_ewf

// Choice by choice, with every product rounded to x's dtype.
at::Tensor plain(const Inputs& in, const at::Tensor& indices_nk) {
  at::Tensor out = at::zeros(in[0].sizes(), in[1].options());
  for (int64_t e = 0; e < in[2].size(0); ++e)
    for (int64_t j = 0; j < indices_nk.size(1); ++j) {
      const at::Tensor chosen_n1 = indices_nk.select(1, j).eq(e).unsqueeze(1).to(in[1].scalar_type());
      const at::Tensor h = at::relu(at::mm(in[0], in[2][e].t())).square();
      out = out + at::mm(h, in[3][e].t()).to(in[1].scalar_type()) * in[1].narrow(1, j, 1) * chosen_n1;
    }
  return out.to(in[0].scalar_type());
}

template <class F>
std::vector<at::Tensor> with_gradients(F f, const Inputs& from, const at::Tensor& dout) {
  Inputs in;
  for (const at::Tensor& t : from) in.push_back(t.detach().clone().set_requires_grad(true));
  const at::Tensor out = f(in);
  std::vector<at::Tensor> all = torch::autograd::grad({out}, {in[0], in[1], in[2], in[3]}, {dout.to(out.scalar_type())});
  all.insert(all.begin(), out);
  return all;
}

class ExpertMlps : public testing::TestWithParam<Sizes> {};

// Errs against fp64 at most twice as much as the formula in the same dtype.
TEST_P(ExpertMlps, AreTheFormula) {
  const Sizes s = GetParam();
  const at::Tensor indices = choose_experts(at::rand({s.N, s.E}), {}, s.k);
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
    const double scale = 1 / std::sqrt(static_cast<double>(s.W));
    const Inputs in{at::randn({s.N, s.W}).to(dtype), at::rand({s.N, s.k}).to(wide), (at::randn({s.E, s.F, s.W}) * scale).to(dtype), (at::randn({s.E, s.W, s.F}).abs() * scale).to(dtype)};
    const at::Tensor dout = at::randn({s.N, s.W}).abs().to(dtype);  // with down of one sign: the gradient of a weight is a sum that does not cancel
    Inputs exact;
    for (const at::Tensor& t : in) exact.push_back(t.to(at::kDouble));
    const auto got = with_gradients([&](const Inputs& i) { return expert_mlp(i[0], i[1], i[2], i[3], dispatch(indices, s.E)); }, in, dout);
    const auto rough = with_gradients([&](const Inputs& i) { return plain(i, indices); }, in, dout), want = with_gradients([&](const Inputs& i) { return plain(i, indices); }, exact, dout);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(got[i].scalar_type(), i == 0 ? dtype : in[i - 1].scalar_type());
      EXPECT_TRUE(close(got[i], want[i], std::max(kErrorFactor * relative_rms(rough[i], want[i]), tolerance(dtype, Op::kMatmul, s.N)))) << c10::toString(dtype) << " part " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Layers, ExpertMlps,
                         testing::Values(Sizes{1, 4, 2, 16, 8}, Sizes{37, 5, 2, 72, 136}, Sizes{23, 40, 3, 20, 30}, Sizes{150, 1, 1, 136, 40}, Sizes{141, 3, 3, 13, 131}));

TEST(ExpertMlp, NamesTheShapesThatDoNotFit) {
  const Dispatch d = dispatch(at::zeros({3, 1}, at::kLong), 2);
  const auto run = [&](const at::Tensor& x, const at::Tensor& down) { return expert_mlp(x, at::rand({3, 1}), at::rand({2, 5, 4}), down, d); };
  EXPECT_NO_THROW(run(at::rand({3, 4}), at::rand({2, 4, 5})));
  EXPECT_THROW(run(at::rand({3, 5}), at::rand({2, 4, 5})), Error);
  EXPECT_THROW(run(at::rand({2, 4}), at::rand({2, 4, 5})), Error);
  EXPECT_THROW(run(at::rand({3, 4}), at::rand({2, 5, 4})), Error);
}

}  // namespace
}  // namespace tessera
