#include "measure/self_check.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/randint.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "model/model.hpp"
#include "train/optimizer.hpp"
#include "train/setup.hpp"
#include "train/step.hpp"

namespace tessera {

namespace {

constexpr int64_t kVocab = 64, kMostElements = int64_t{1} << 26;  // 2^26 fp64 numbers are half a GiB

struct Outcome {
  at::Tensor hidden_nd;  // fp64, CPU
  double grad_norm = 0;
};

Outcome run(const ModelPlan& plan, at::ScalarType dtype, at::Device device) {
  Store store(plan, device, dtype);
  store.initialise(0);
  Model model(plan, store);
  Batch batch{.spans = Spans::documents({1, 63, 130})};
  batch.ids_n = at::randint(kVocab, {batch.spans.num_tokens()}, at::detail::createCPUGenerator(1), at::TensorOptions(at::kLong)).to(device);
  Outcome out;
  {
    const at::NoGradGuard no_grad;
    out.hidden_nd = model.hidden(batch).to(at::kCPU, at::kDouble);
  }
  accumulate(model, {batch});
  Optimizer optimizer(store, {});
  out.grad_norm = optimizer.grad_norm().to(at::kCPU, at::kDouble).item<double>();
  return out;
}

}  // namespace

SelfCheck check_blocks(const Config& config, at::ScalarType dtype, at::Device device) {
  const double output_limit = dtype == at::kBFloat16 ? 5e-2 : 1e-4, norm_limit = dtype == at::kBFloat16 ? 1e-1 : 1e-3;
  SelfCheck result;
  std::set<std::string> seen;
  for (const Binding& binding : config.bindings) {
    if (!seen.insert(binding.name).second) continue;
    Config one = config;
    one.model.hybrid_override_pattern = std::string(1, binding.symbol);
    std::vector<PatternProblem> none;
    one.pattern = parse_pattern(one.model.hybrid_override_pattern, none);
    one.head.reset();
    one.model.vocab_size = kVocab;
    const ModelPlan plan = make_plan(one);
    if (totals(plan).elements > kMostElements) {
      result.too_large.push_back(binding.name);
      continue;
    }
    const Outcome got = run(plan, dtype, device), want = run(plan, at::kDouble, at::kCPU);
    const at::Tensor error_n = ((got.hidden_nd - want.hidden_nd).norm(2, 1) / want.hidden_nd.norm(2, 1));
    const double error = error_n.median().item<double>(), norm = std::abs(got.grad_norm - want.grad_norm) / want.grad_norm;
    if (!(error <= output_limit) || !(norm <= norm_limit))
      throw Error(ExitCode::kComparison, fmt::format("{} computes something else in {} on {} than in fp64: its output differs by {:.1e} (at most {:.0e} is rounding), the gradient's norm by {:.1e} (at most {:.0e})", binding.name,
                                                     dtype_name(dtype), device.str(), error, output_limit, norm, norm_limit),
                  "`tessera test` shows which operator is wrong; a figure of it would be of no use");
    result.checked.push_back(binding.name);
  }
  return result;
}

}  // namespace tessera
