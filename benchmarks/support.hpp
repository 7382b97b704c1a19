// What the benchmark programs share: a case is an operator call with its inputs, timed forward or forward and backward.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones_like.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace tessera::benchmarks {

// One call on `tokens` tokens. FLOPs are of the products, forward, 2 a multiply-add; bytes are what forward must read and write at least.
struct Case {
  std::function<at::Tensor()> call;
  std::vector<at::Tensor> leaves = {};  // their gradients are computed by fwd_bwd
  double tokens = 0, flops = 0, bytes = 0;
};

inline void wait_for(const at::Tensor& t) {
  if (!t.is_cpu()) t.view(-1).narrow(0, 0, 1).cpu();
}

// Times c.call(), and with `backward` the gradients of every leaf, which count as twice the forward FLOPs and bytes.
inline void time_case(benchmark::State& state, const Case& c, bool backward) {
  const at::AutoGradMode grad_mode(backward);
  for (const at::Tensor& leaf : c.leaves) leaf.set_requires_grad(backward);
  const auto once = [&] {
    const at::Tensor y = c.call();
    if (!backward) return wait_for(y);
    torch::autograd::backward({y}, {at::ones_like(y)});
    for (const at::Tensor& leaf : c.leaves) {
      wait_for(leaf.grad());
      leaf.mutable_grad().reset();
    }
  };
  once();
  for (auto _ : state) once();
  const double passes = backward ? 3 : 1;
  const auto rate = [](double amount) { return benchmark::Counter(amount, benchmark::Counter::kIsIterationInvariantRate); };
  state.counters["tokens/s"] = rate(c.tokens);
  if (c.flops > 0) state.counters["FLOP/s"] = rate(passes * c.flops);
  if (c.bytes > 0) state.counters["bytes/s"] = rate(passes * c.bytes);
}

inline std::string dtype_word(at::ScalarType type) { return type == at::kBFloat16 ? "bf16" : "fp32"; }

// Runs what was registered. Unless told otherwise each case is run several times, all cases interleaved at random, and medians are shown:
// what is compared then meets the same noise.
inline int run(int argc, char** argv) {
  std::vector<std::string> words(argv, argv + argc);
  const auto unless_given = [&](const std::string& flag, const std::string& value) {
    for (const std::string& word : words)
      if (word.starts_with("--benchmark_" + flag)) return;
    words.push_back("--benchmark_" + flag + "=" + value);
  };
  unless_given("repetitions", "5");
  unless_given("enable_random_interleaving", "true");
  unless_given("report_aggregates_only", "true");
  unless_given("min_time", "0.1");
  std::vector<char*> pointers;
  for (std::string& word : words) pointers.push_back(word.data());
  int count = static_cast<int>(pointers.size());
  benchmark::Initialize(&count, pointers.data());
  if (benchmark::ReportUnrecognizedArguments(count, pointers.data())) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace tessera::benchmarks
