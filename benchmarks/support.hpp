// What the benchmark programs share: a case is an operator call with its inputs, timed forward or forward and backward.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zero.h>
#include <ATen/ops/zeros.h>
#include <benchmark/benchmark.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdlib>
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

// Where the inputs of operators lie: on the GPU with TESSERA_BENCH_DEVICE=cuda.
inline at::Device bench_device() {
  static const char* const word = std::getenv("TESSERA_BENCH_DEVICE");
  return word && std::string_view(word) == "cuda" ? at::Device(at::kCUDA, 0) : at::Device(at::kCPU);
}

// Times what one call of `once` takes on the device's stream, by events, the L2 cache overwritten before. The host's part is hidden behind that write.
inline void time_by_events(benchmark::State& state, at::Device device, const std::function<void()>& once) {
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  at::Tensor cache = at::zeros({int64_t{256} << 20}, at::TensorOptions(device).dtype(at::kByte));
  for (auto _ : state) {
    c10::Event begin(stream.device_type(), c10::EventFlag::BACKEND_DEFAULT), end(stream.device_type(), c10::EventFlag::BACKEND_DEFAULT);
    cache.zero_();
    begin.record(stream);
    once();
    end.record(stream);
    end.synchronize();
    state.SetIterationTime(begin.elapsedTime(end) / 1000);
  }
}

// Times c.call(), and with `backward` the gradients of every leaf, which count as twice the forward FLOPs and bytes.
inline void time_case(benchmark::State& state, const Case& c, bool backward) {
  const at::AutoGradMode grad_mode(backward);
  for (const at::Tensor& leaf : c.leaves) leaf.set_requires_grad(backward);
  at::Device device = at::kCPU;
  const auto once = [&] {
    const at::Tensor y = c.call();
    device = y.device();
    if (!backward) return;
    torch::autograd::backward({y}, {at::ones_like(y)});
    for (const at::Tensor& leaf : c.leaves) leaf.mutable_grad().reset();
  };
  once();
  if (device.is_cuda()) {
    time_by_events(state, device, once);
  } else {
    for (auto _ : state) once();
  }
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
