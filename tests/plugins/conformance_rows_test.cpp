// Conformance: the tables of a block against what it does: parameters, initial values, cost.
#include <ATen/ops/isfinite.h>
#include <ATen/record_function.h>

#include <cmath>
#include <set>

#include "tests/support/conformance.hpp"
#include "tests/support/directional.hpp"

namespace tessera::conformance {

TEST_P(Conformance, RowsAreComplete) {
  Built built(text());
  const std::vector<std::string> names = parameter_names(built.plan);
  EXPECT_EQ(std::set<std::string>(names.begin(), names.end()).size(), names.size()) << "two parameters have one name";
  EXPECT_FALSE(std::string(type().source()).empty()) << "BlockInfo::source names the paper or project";
  backward(built.model, random_batch({63, 130}, kVocab));
  for (const std::string& name : names) {
    const at::Tensor g = built.store.gradient(name);
    EXPECT_TRUE(at::isfinite(g).all().item<bool>()) << name << ": its gradient is not finite";
    if (!(g.abs().max().item<float>() > 0)) ADD_FAILURE() << name << " is declared, but gets no gradient";
  }
}

TEST_P(Conformance, InitialValuesDependOnSeedAndNameAlone) {
  const Built one(text("XX")), other(text("XXXX")), seeded(text("XX"), {.seed = 4});
  bool random = false;
  for (size_t i = 0; i < one.plan.layers[1].params.size(); ++i) {
    const Param &param = one.plan.layers[1].params[i], &deeper = other.plan.layers[1].params[i];
    const std::string name = "layers.1." + param.name;
    // A projection into the residual stream starts smaller in a deeper stack: the same draw, scaled.
    const at::Tensor a = one.store.parameter(name), b = other.store.parameter(name);
    const double scale = param.init.kind == Init::Kind::kNormal ? deeper.init.std / param.init.std : 1;
    expect(scale == 1 ? bit_equal(b, a) : close(b, a * scale, tolerance(at::kFloat, Op::kElementwise)), name + ": its initial values in a stack of four layers, against one of two");
    if (param.init.kind == Init::Kind::kConstant) continue;
    random = true;
    if (bit_equal(seeded.store.parameter(name), a)) ADD_FAILURE() << name << ": another seed gives the same values";
    if (bit_equal(one.store.parameter("layers.0." + param.name), a)) ADD_FAILURE() << name << ": two layers begin with the same values";
  }
  EXPECT_TRUE(random || one.plan.layers[1].params.empty()) << "no parameter starts from random values";
}

namespace {

// FLOPs of the matrix products while it lives: those that read a parameter, and those among activations.
class Counter {
 public:
  explicit Counter(Store& store) {
    for (const FlatGroup& group : store.groups())
      for (const at::Tensor& t : {group.data, group.compute})
        if (t.defined()) now().storages.insert(t.storage().unsafeGetStorageImpl());
    handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(&Counter::enter).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
  }
  ~Counter() {
    at::removeCallback(handle_);
    now() = {};
  }
  double with_parameters() const { return now().with_parameters; }
  double among_activations() const { return now().among_activations; }

 private:
  struct Sums {
    std::set<const c10::StorageImpl*> storages;
    double with_parameters = 0, among_activations = 0;
  };
  static Sums& now() {
    static Sums sums;
    return sums;
  }
  static std::unique_ptr<at::ObserverContext> enter(const at::RecordFunction& call) {
    const std::string name = call.name();
    const size_t first = name == "aten::addmm" || name == "aten::baddbmm" ? 1 : 0;
    if (!first && name != "aten::mm" && name != "aten::bmm") return nullptr;
    std::vector<at::Tensor> factors;
    for (const c10::IValue& value : call.inputs())
      if (value.isTensor()) factors.push_back(value.toTensor());
    const at::Tensor &a = factors.at(first), &b = factors.at(first + 1);
    const auto held = [](const at::Tensor& t) { return now().storages.contains(t.storage().unsafeGetStorageImpl()); };
    (held(a) || held(b) ? now().with_parameters : now().among_activations) += 2.0 * static_cast<double>(a.numel()) * static_cast<double>(b.size(-1));
    return nullptr;
  }
  at::CallbackHandle handle_;
};

}  // namespace

// In fp64, where operators run as plain compositions.
TEST_P(Conformance, DeclaredFlopsAreThoseThatRun) {
  Built built(text(), {.dtype = at::kDouble});
  const Batch batch = random_batch({1, 63, 130}, kVocab);
  hidden(built.model, batch);
  double counted = 0, mixing = 0;
  {
    const Counter counter(built.store);
    hidden(built.model, batch);
    counted = counter.with_parameters(), mixing = counter.among_activations();
  }
  Cost declared;
  double dense = 0;
  for (const LayerPlan& layer : built.plan.layers) {
    declared += layer.type->cost(layer.config, built.plan.env, {{1, 1}, {63, 1}, {130, 1}});
    for (const Param& param : layer.params)
      if (param.shape.size() == 2) dense += 2.0 * 194 * static_cast<double>(num_elements(param.shape));
  }
  if (std::abs(counted - declared.matmul) > 0.01 * counted)
    ADD_FAILURE() << fmt::format("two layers over 194 tokens declare {:.0f} FLOPs in products with parameters (Cost::matmul), and {:.0f} ran", declared.matmul, counted);
  // A composition may compute what it then masks, so the count is an upper bound; and products inside a fused operator are not seen.
  if (mixing > 0 && (declared.mixing > 1.01 * mixing || declared.mixing <= 0))
    ADD_FAILURE() << fmt::format("two layers over 194 tokens declare {:.0f} FLOPs in products among activations (Cost::mixing), and {:.0f} ran", declared.mixing, mixing);
  for (const double part : {declared.matmul, declared.mixing, declared.elementwise, declared.bytes, declared.activations})
    EXPECT_TRUE(std::isfinite(part) && part >= 0) << "a part of the cost is " << part;
  if (!has_experts(built.plan) && std::abs(declared.matmul - dense) > 1e-9 * dense)
    ADD_FAILURE() << fmt::format("matrices of the table imply {:.0f} FLOPs (2 x tokens x elements), Cost::matmul says {:.0f}", dense, declared.matmul);
}

}  // namespace tessera::conformance
