// The parameter store: layout, initial values, gradients through gathered views, compute copies.
#include "store/store.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <set>

#include "store/init.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/model.hpp"

namespace tessera {
namespace {

const std::string kText = R"(
[model]
hybrid_override_pattern = "MO"
vocab_size = 40
hidden_size = 18
[blocks.mamba2]
num_heads = 3
head_dim = 5
state_size = 7
num_groups = 1
[blocks.moe]
num_experts = 4
top_k = 2
intermediate_size = 6
)";

at::Tensor filled(const Init& init, std::vector<int64_t> shape, int64_t seed, const char* name, int64_t begin = 0) {
  at::Tensor out = at::empty(shape, at::kFloat);
  fill_initial(out, init, seed, name, begin);
  return out;
}

TEST(Init, DependsOnSeedNameAndElementAlone) {
  const Init normal = Init::normal(1);
  const at::Tensor all = filled(normal, {100000}, 1, "a");
  EXPECT_TRUE(bit_equal(filled(normal, {1000}, 1, "a", 70000), all.narrow(0, 70000, 1000)));
  EXPECT_TRUE(bit_equal(filled(normal, {100, 1000}, 1, "a").flatten(), all));
  EXPECT_FALSE(bit_equal(filled(normal, {100000}, 1, "b"), all));
  EXPECT_FALSE(bit_equal(filled(normal, {100000}, 2, "a"), all));
}

TEST(Init, HasTheMomentsItSays) {
  const double n = 100000;
  const at::Tensor normal = filled({.kind = Init::Kind::kNormal, .mean = 2, .std = 3}, {100000}, 1, "a").to(at::kDouble);
  EXPECT_NEAR(normal.mean().item<double>(), 2, 5 * 3 / std::sqrt(n));
  EXPECT_NEAR(normal.std().item<double>(), 3, 5 * 3 / std::sqrt(2 * n));
  EXPECT_NEAR(normal.sub(2).div(3).pow(4).mean().item<double>(), 3, 5 * std::sqrt(96 / n));  // the fourth moment of a Gaussian
  const at::Tensor uniform = filled(Init::uniform(-1, 3), {100000}, 1, "a").to(at::kDouble);
  EXPECT_NEAR(uniform.mean().item<double>(), 1, 5 * 4 / std::sqrt(12 * n));
  EXPECT_GE(uniform.min().item<double>(), -1);
  EXPECT_LE(uniform.max().item<double>(), 3);
  EXPECT_LT(uniform.min().item<double>(), -0.999);
  EXPECT_GT(uniform.max().item<double>(), 2.999);
  EXPECT_TRUE(bit_equal(filled(Init::uniform(1, 2, [](double x) { return 10 * x; }), {50}, 1, "a"), filled(Init::uniform(10, 20), {50}, 1, "a")));
  EXPECT_EQ(filled(Init::constant(4), {3}, 1, "a").sum().item<float>(), 12);
}

TEST(Store, ParametersAreAlignedAndApart) {
  Built built(kText);
  std::set<const void*> begins;
  for (const FlatGroup& group : built.store.groups()) {
    int64_t end = 0;
    for (const FlatGroup::Slot& slot : group.slots) {
      EXPECT_GE(slot.offset, end) << slot.name;
      EXPECT_EQ(slot.offset % 16, 0) << slot.name;
      end = slot.offset + num_elements(slot.row->shape);
      EXPECT_EQ(slot.row->decay, group.decay) << slot.name;
      EXPECT_EQ(slot.row->fp32, group.fp32) << slot.name;
      EXPECT_TRUE(begins.insert(built.store.parameter(slot.name).const_data_ptr()).second) << slot.name;
    }
    EXPECT_EQ(group.data.numel(), end);
  }
  EXPECT_EQ(begins.size(), parameter_names(built.plan).size());
}

TEST(Store, ViewsReachTheMasters) {
  Built built(kText);
  built.store.parameter("layers.0.D").fill_(7);
  EXPECT_EQ(built.store.parameter("layers.0.D").sum().item<float>(), 21);
  EXPECT_EQ(built.store.gather("layers.0.")["D"].tensor().sum().item<float>(), 21);
  EXPECT_EQ(built.store.buffer("layers.1.gate.e_score_correction_bias").sizes(), std::vector<int64_t>{4});
  for (const char* name : {"layers.9.D", "D", ""}) {
    std::string message;
    try {
      built.store.parameter(name);
    } catch (const Error& error) {
      message = error.message();
    }
    EXPECT_EQ(message, fmt::format("the model has no parameter '{}'", name));
  }
  EXPECT_THROW(built.store.buffer("layers.1.gate.weight"), Error);
}

TEST(Store, GradientsOfSeveralUsesAddUp) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    Built built(kText, {.dtype = dtype});
    const auto use = [&](double factor) {
      at::AutoGradMode grad_mode(true);
      const Weights w = built.store.gather("layers.0.");
      torch::autograd::backward({(w["D"].tensor() * factor).sum() + (w["out_proj.weight"].tensor().to(at::kFloat) * (2 * factor)).sum()}, {});
    };
    use(1), use(2);
    EXPECT_EQ(built.store.gradient("layers.0.D")[0].item<float>(), 3);
    EXPECT_EQ(built.store.gradient("layers.0.out_proj.weight").mean().item<float>(), 6);
    EXPECT_EQ(built.store.gradient("layers.0.out_proj.weight").scalar_type(), at::kFloat);
    EXPECT_EQ(built.store.gradient("layers.0.A_log").abs().sum().item<float>(), 0) << "no use, no gradient";
    built.store.zero_grad();
    EXPECT_EQ(built.store.gradient("layers.0.D")[0].item<float>(), 0);
    use(5);
    EXPECT_EQ(built.store.gradient("layers.0.D")[0].item<float>(), 5) << "an old gradient was added to";
    built.store.finish_grad();
    for (const FlatGroup& group : built.store.groups())
      for (const FlatGroup::Slot& slot : group.slots) {
        if (slot.name == "layers.0.D" || slot.name == "layers.0.out_proj.weight") continue;
        EXPECT_EQ(built.store.slot_view(slot.name, gradients).abs().sum().item<float>(), 0) << slot.name;
      }
  }
}

TEST(Store, ComputeCopiesFollowTheMasters) {
  Built built(kText, {.dtype = at::kBFloat16});
  const auto view = [&] { return built.store.gather("layers.1.")["experts.up_proj.weight"].tensor(); };
  at::Tensor master = built.store.parameter("layers.1.experts.up_proj.weight");
  EXPECT_TRUE(bit_equal(view().detach(), master.to(at::kBFloat16)));
  master.fill_(3);
  built.store.touch();
  EXPECT_EQ(view().to(at::kFloat).mean().item<float>(), 3);
  EXPECT_EQ(built.store.gather("layers.1.")["gate.weight"].tensor().scalar_type(), at::kFloat);
  EXPECT_EQ(built.store.gather(kEmbeddingUnit)["embedding.weight"].tensor().scalar_type(), at::kFloat);
}

TEST(Store, FrozenViewsNeedNoGradient) {
  Built built(kText, {.freeze = {"layers.0.A_log", "layers.1."}});
  const Weights mixed = built.store.gather("layers.0."), frozen = built.store.gather("layers.1.");
  EXPECT_FALSE(mixed["A_log"].tensor().requires_grad());
  EXPECT_TRUE(mixed["D"].tensor().requires_grad());
  for (const Weight& w : frozen.list()) EXPECT_FALSE(w.tensor().requires_grad()) << w.row().name;
}

TEST(Store, UnknownNamesOfABlockAreItsAuthorsError) {
  Built built(kText);
  const Weights w = built.store.gather("layers.0.");
  EXPECT_FALSE(w.find("in_proj.bias").defined());
  try {
    w["in_proj.wieght"];
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kPlugin);
    EXPECT_NE(error.message().find("in_proj.wieght"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("in_proj.weight"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace tessera
