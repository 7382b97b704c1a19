#include "measure/bench.hpp"

#include <ATen/ops/randint.h>

#include <algorithm>
#include <chrono>
#include <map>

#include "infer/generate.hpp"
#include "metrics/machine.hpp"
#include "model/model.hpp"
#include "plan/memory.hpp"
#include "train/setup.hpp"
#include "train/step.hpp"

namespace tessera {

namespace {

template <class F>
double timed(F run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0 : values[values.size() / 2];
}

std::vector<Batch> random_batches(const Config& config, at::Device device) {
  std::vector<Batch> out;
  const TrainingConfig& t = config.training;
  for (int64_t row = 0; row < global_batch_rows(config); row += t.local_batch_size)
    out.push_back({.ids_n = at::randint(config.model.vocab_size, {t.local_batch_size * t.seq_len}, at::TensorOptions(at::kLong)).to(device),
                   .spans = Spans::uniform(t.local_batch_size, t.seq_len)});
  return out;
}

// Declared work beside measured times. The optimizer reads the parameter, its gradient and two moments, and writes three of them.
std::vector<PartTime> part_times(const ModelPlan& plan, const Documents& documents, double bytes_per_element, const std::map<std::string, std::vector<StepClock::Seconds>>& times) {
  std::vector<PartTime> out;
  const auto phase = [](const std::vector<StepClock::Seconds>& steps, StepClock::Phase p) {
    std::vector<double> values;
    for (const StepClock::Seconds& step : steps) values.push_back(step[p]);
    return median(std::move(values));
  };
  for (const auto& [name, steps] : times)
    out.push_back({.name = name, .forward_s = phase(steps, StepClock::kForward), .recompute_s = phase(steps, StepClock::kRecompute), .backward_s = phase(steps, StepClock::kBackward)});
  for (const CostRow& row : cost_rows(plan, documents))
    for (PartTime& part : out)
      if (part.name == row.name) part.num_layers = row.num_layers, part.flops = 3 * row.cost.flops(), part.bytes = 3 * bytes_per_element * row.cost.bytes;
  for (PartTime& part : out)
    if (part.name == "optimizer") part.bytes = 7.0 * 4 * static_cast<double>(totals(plan).trained);
  std::stable_sort(out.begin(), out.end(), [](const PartTime& a, const PartTime& b) { return a.seconds() > b.seconds(); });
  return out;
}

}  // namespace

BenchResult bench(const Config& config, const BenchOptions& options) {
  apply_runtime(config.training);
  const at::Device device = choose_device(config.training.device);
  const at::ScalarType dtype = choose_dtype(config.training.dtype, device);
  const ModelPlan plan = make_plan(config);
  if (device.is_cpu()) require_memory(plan, options.steps > 0 ? &config.training : nullptr);
  Store store(plan, device, dtype, config.training.freeze);
  store.initialise(config.training.seed);
  Model model(plan, store, recomputed_bindings(config.activation_checkpoint));
  Optimizer optimizer(store, config.optimizer);

  BenchResult result{.config = config.source, .dtype = dtype_name(dtype), .device = device.str(), .params = totals(plan).trained};
  const std::vector<Batch> batches = random_batches(config, device);
  const Documents documents{{.length = config.training.seq_len, .count = global_batch_rows(config)}};
  if (options.steps > 0) {
    StepClock clock(device);
    model.set_clock(&clock);
    std::vector<double> times;
    std::map<std::string, std::vector<StepClock::Seconds>> parts;
    for (int64_t step = 0; step <= options.steps; ++step) {
      const double s = timed([&] { train_step(model, optimizer, batches, config.optimizer.lr, config.training.max_norm); });
      const auto measured = clock.stop();
      if (step == 0) continue;
      times.push_back(s);
      for (const auto& [name, seconds] : measured) parts[name].push_back(seconds);
    }
    model.set_clock(nullptr);
    const int64_t tokens = global_batch_rows(config) * config.training.seq_len;
    result.train_step_s = median(times);
    result.train_tokens_per_s = static_cast<double>(tokens) / result.train_step_s;
    for (const CostRow& row : cost_rows(plan, documents)) result.train_flops_per_s += 3 * row.cost.flops() / result.train_step_s;
    result.parts = part_times(plan, documents, dtype == at::kBFloat16 ? 2 : 4, parts);
  }
  result.peak_bytes = peak_memory_bytes();

  if (options.decode_tokens > 0) {
    const at::Tensor ids = at::randint(config.model.vocab_size, {options.decode_batch * options.decode_context}, at::TensorOptions(at::kLong));
    std::vector<std::vector<int64_t>> prompts;
    for (int64_t i = 0; i < options.decode_batch; ++i) {
      const int64_t* begin = ids.const_data_ptr<int64_t>() + i * options.decode_context;
      prompts.emplace_back(begin, begin + options.decode_context);
    }
    // The first token ends the prompt's pass; each step gives one token a sequence, the last sequence's ends it.
    GenerateOptions generate_options{.max_new_tokens = 2};
    generate(model, prompts, generate_options);
    generate_options.max_new_tokens = options.decode_tokens + 1;
    std::vector<double> steps;
    const auto start = std::chrono::steady_clock::now();
    generate(model, prompts, generate_options, [&](size_t sequence, int64_t) {
      if (sequence + 1 == prompts.size()) steps.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    });
    result.prefill_tokens_per_s = static_cast<double>(options.decode_batch * options.decode_context) / steps.front();
    result.decode_tokens_per_s = static_cast<double>(options.decode_batch * options.decode_tokens) / (steps.back() - steps.front());
  }
  result.matrix_peak = measure_matrix_peak(dtype, device);
  result.memory_peak = measure_memory_peak(device);
  return result;
}

}  // namespace tessera
