#include "measure/bench.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <chrono>

#include "infer/generate.hpp"
#include "metrics/machine.hpp"
#include "model/model.hpp"
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

// One layer of each binding, forward and backward on a micro-batch of random activations.
std::vector<BlockTime> block_times(const Config& config, const ModelPlan& plan, Store& store, int64_t rounds) {
  std::vector<BlockTime> out;
  const int64_t n = config.training.local_batch_size * config.training.seq_len;
  const Spans spans = Spans::uniform(config.training.local_batch_size, config.training.seq_len);
  const Documents documents{{.length = config.training.seq_len, .count = config.training.local_batch_size}};
  for (const LayerPlan& layer : plan.layers) {
    auto found = std::find_if(out.begin(), out.end(), [&](const BlockTime& row) { return row.name == layer.binding; });
    if (found != out.end()) {
      ++found->num_layers;
      continue;
    }
    const Cost cost = layer.type->cost(layer.config, plan.env, documents);
    BlockTime row{.name = layer.binding, .num_layers = 1, .flops = cost.flops(), .bytes = cost.bytes * (store.compute_dtype() == at::kBFloat16 ? 2 : 4)};
    const auto block = layer.type->make(layer.config, plan.env);
    std::vector<double> forward, backward;
    const std::string& prefix = plan.layers[static_cast<size_t>(layer.weights_of)].prefix;
    for (int64_t round = 0; round <= rounds; ++round) {
      at::AutoGradMode grad_mode(true);
      at::Tensor x_nd = at::randn({n, config.model.hidden_size}, at::TensorOptions(store.compute_dtype()).device(store.device())).set_requires_grad(true);
      Context ctx(spans);
      ctx.set_mesh(plan.env.mesh);
      ctx.set_training(true);
      at::Tensor y_nd;
      const double f = timed([&] { y_nd = block->forward(x_nd, store.gather(prefix), ctx); });
      const at::Tensor dy_nd = at::randn_like(y_nd);
      const double b = timed([&] { torch::autograd::backward({y_nd}, {dy_nd}); });
      if (round) forward.push_back(f), backward.push_back(b);  // the first round warms up
    }
    row.forward_s = median(forward), row.backward_s = median(backward);
    out.push_back(row);
  }
  store.zero_grad();
  return out;
}

}  // namespace

BenchResult bench(const Config& config, const BenchOptions& options) {
  apply_runtime(config.training);
  const at::Device device = choose_device(config.training.device);
  const at::ScalarType dtype = choose_dtype(config.training.dtype, device);
  const ModelPlan plan = make_plan(config);
  Store store(plan, device, dtype, config.training.freeze);
  store.initialise(config.training.seed);
  Model model(plan, store, recomputed_bindings(config.activation_checkpoint));
  Optimizer optimizer(store, config.optimizer);

  BenchResult result{.config = config.source, .dtype = dtype_name(dtype), .device = device.str(), .params = totals(plan).trained};
  const std::vector<Batch> batches = random_batches(config, device);
  std::vector<double> times;
  if (options.steps > 0) for (int64_t step = 0; step <= options.steps; ++step) {
    const double s = timed([&] { train_step(model, optimizer, batches, config.optimizer.lr, config.training.max_norm); });
    if (step) times.push_back(s);
  }
  const int64_t tokens = global_batch_rows(config) * config.training.seq_len;
  result.train_step_s = median(times);
  result.train_tokens_per_s = static_cast<double>(tokens) / result.train_step_s;
  const Documents documents{{.length = config.training.seq_len, .count = global_batch_rows(config)}};
  for (const CostRow& row : cost_rows(plan, documents)) result.train_flops_per_s += 3 * row.cost.flops() / result.train_step_s;
  result.peak_bytes = peak_memory_bytes();

  if (options.decode_tokens > 0) {
    const at::Tensor ids = at::randint(config.model.vocab_size, {options.decode_batch * options.decode_context}, at::TensorOptions(at::kLong));
    std::vector<std::vector<int64_t>> prompts;
    for (int64_t i = 0; i < options.decode_batch; ++i) {
      const int64_t* begin = ids.const_data_ptr<int64_t>() + i * options.decode_context;
      prompts.emplace_back(begin, begin + options.decode_context);
    }
    GenerateOptions generate_options{.max_new_tokens = 2};
    generate(model, prompts, generate_options);
    generate_options.max_new_tokens = 1;
    const double prefill = timed([&] { generate(model, prompts, generate_options); });
    generate_options.max_new_tokens = options.decode_tokens + 1;
    const double all = timed([&] { generate(model, prompts, generate_options); });
    result.prefill_tokens_per_s = static_cast<double>(options.decode_batch * options.decode_context) / prefill;
    result.decode_tokens_per_s = static_cast<double>(options.decode_batch * options.decode_tokens) / std::max(all - prefill, 1e-9);
  }
  result.matrix_peak = measure_matrix_peak(dtype, device);
  result.memory_peak = measure_memory_peak(device);
  result.blocks = block_times(config, plan, store, options.steps);
  return result;
}

}  // namespace tessera
