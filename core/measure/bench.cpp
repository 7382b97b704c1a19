#include "measure/bench.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/randint.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <nlohmann/json.hpp>

#include "infer/generate.hpp"
#include "metrics/exchange_metrics.hpp"
#include "metrics/machine.hpp"
#include "model/model.hpp"
#include "parallel/reports.hpp"
#include "plan/memory.hpp"
#include "plan/traffic.hpp"
#include "train/setup.hpp"
#include "train/step.hpp"

namespace tessera {

using nlohmann::json;

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

// Those of this data rank; ranks that share rows draw the same.
std::vector<Batch> random_batches(const Config& config, at::Device device, const Mesh& mesh, int64_t data_rank) {
  std::vector<Batch> out;
  const TrainingConfig& t = config.training;
  const at::Generator generator = at::detail::createCPUGenerator(static_cast<uint64_t>(data_rank));
  for (int64_t i = 0; i < num_micro_batches(config, mesh); ++i)
    out.push_back({.ids_n = at::randint(config.model.vocab_size, {t.local_batch_size * t.seq_len}, generator, at::TensorOptions(at::kLong)).to(device),
                   .spans = Spans::uniform(t.local_batch_size, t.seq_len)});
  return out;
}

using PartSteps = std::map<std::string, std::vector<StepClock::Seconds>>;  // by part, the timed steps

// Medians over this rank's steps.
json part_medians(const PartSteps& times) {
  json out = json::object();
  for (const auto& [name, steps] : times)
    for (const StepClock::Phase phase : {StepClock::kForward, StepClock::kRecompute, StepClock::kBackward}) {
      std::vector<double> values;
      for (const StepClock::Seconds& step : steps) values.push_back(step[phase]);
      out[name].push_back(median(std::move(values)));
    }
  return out;
}

// Declared work beside the times that the ranks measured. The optimizer reads the parameter, its gradient and two moments, and writes three of them.
std::vector<PartTime> part_times(const ModelPlan& plan, const Documents& documents, double bytes_per_element, const std::vector<json>& reports) {
  std::map<std::string, PartTime> by_name;
  const auto share = 1 / static_cast<double>(reports.size());
  for (const json& report : reports)
    for (const auto& [name, seconds] : report["parts"].items()) {
      PartTime& part = by_name[name];
      part.name = name;
      part.forward_s += share * seconds[StepClock::kForward].get<double>(), part.recompute_s += share * seconds[StepClock::kRecompute].get<double>();
      part.backward_s += share * seconds[StepClock::kBackward].get<double>();
    }
  for (const CostRow& row : cost_rows(plan, documents))
    if (auto part = by_name.find(row.name); part != by_name.end())
      part->second.num_layers = row.num_layers, part->second.flops = 3 * row.cost.flops(), part->second.bytes = 3 * bytes_per_element * row.cost.bytes;
  if (auto part = by_name.find("optimizer"); part != by_name.end()) part->second.bytes = 7.0 * 4 * static_cast<double>(totals(plan).trained);
  std::vector<PartTime> out;
  for (auto& [name, part] : by_name) out.push_back(std::move(part));
  std::stable_sort(out.begin(), out.end(), [](const PartTime& a, const PartTime& b) { return a.seconds() > b.seconds(); });
  return out;
}

// What each rank reports; in a single process its own.
std::vector<json> all_reports(const MeshGroups* ranks, at::Device device, const json& own) {
  if (!ranks) return {own};
  ranks->whereabouts().place = "the figures of the ranks";
  return gather_reports(*ranks->all(), device, json::to_cbor(own));
}

struct TrainTimes {
  std::vector<double> step_s, wait_s, pipeline_wait_s;
  PartSteps parts;
  std::map<std::string, int64_t> sent_bytes;  // of the last step, by group
};

TrainTimes time_training(Model& model, const Config& config, const std::vector<Batch>& batches, int64_t steps) {
  const MeshGroups* ranks = model.store().ranks();
  Optimizer optimizer(model.store(), config.optimizer);
  StepClock clock(model.store().device());
  model.set_clock(&clock);
  TrainTimes times;
  for (int64_t step = 0; step <= steps; ++step) {
    const Exchanged before = ranks ? exchanged(*ranks) : Exchanged{};
    const double s = timed([&] { train_step(model, optimizer, batches, config.optimizer.lr, config.training.max_norm); });
    const auto measured = clock.stop();
    const Exchanged during = ranks ? exchanged(*ranks) - before : Exchanged{};
    times.sent_bytes = during.sent_bytes;
    if (step == 0) continue;
    times.step_s.push_back(s), times.wait_s.push_back(during.wait_s), times.pipeline_wait_s.push_back(during.pipeline_wait_s);
    for (const auto& [name, seconds] : measured) times.parts[name].push_back(seconds);
  }
  model.set_clock(nullptr);
  return times;
}

}  // namespace

BenchResult bench(const Config& config, const BenchOptions& options, const MeshGroups* ranks) {
  const Mesh mesh = ranks ? ranks->mesh() : Mesh{};
  Issues issues;
  check_config(config, mesh, issues);
  issues.raise();
  apply_runtime(config.training, ranks ? ranks->world().local_size : 1);
  const at::Device device = choose_device(config.training.device, ranks);
  const at::ScalarType dtype = choose_dtype(config.training.dtype, device, ranks);
  Config resolved = config;
  resolved.training.dtype = dtype_name(dtype);
  const ModelPlan plan = make_plan(config, mesh);
  if (device.is_cpu() && !ranks) require_memory(plan, options.steps > 0 ? &config.training : nullptr);
  Store store(plan, device, dtype, config.training.freeze, ranks,
              {.reshard_after_forward = config.parallelism.reshard_after_forward, .reduce_in_fp32 = config.parallelism.reduce_dtype == "float32"});
  store.initialise(config.training.seed);
  Model model(plan, store, recomputed_bindings(config.activation_checkpoint), config.training.seed);

  BenchResult result{.config = config.source, .dtype = dtype_name(dtype), .device = device.str(), .params = totals(plan).trained};
  TrainTimes times;
  if (options.steps > 0) times = time_training(model, config, random_batches(config, device, mesh, data_rank(ranks)), options.steps);
  const json own{{"step_s", times.step_s}, {"wait_s", median(times.wait_s)}, {"pipeline_wait_s", median(times.pipeline_wait_s)}, {"parts", part_medians(times.parts)},
                 {"peak_bytes", peak_memory_bytes()}, {"sent_bytes", by_axis(times.sent_bytes, mesh)}};
  const std::vector<json> reports = all_reports(ranks, device, own);
  for (const json& report : reports) result.peak_bytes = std::max(result.peak_bytes, report["peak_bytes"].get<int64_t>());
  if (options.steps > 0) {
    const Documents documents{{.length = config.training.seq_len, .count = global_batch_rows(config, mesh)}};
    result.train_step_s = median(reports[0]["step_s"].get<std::vector<double>>());
    result.train_tokens_per_s = static_cast<double>(num_tokens(documents)) / result.train_step_s;
    for (const CostRow& row : cost_rows(plan, documents)) result.train_flops_per_s += 3 * row.cost.flops() / result.train_step_s;
    result.parts = part_times(plan, documents, dtype == at::kBFloat16 ? 2 : 4, reports);
    for (size_t rank = 0; ranks && rank < reports.size(); ++rank) {
      const json& report = reports[rank];
      RankTime time{.place = place_text(mesh, static_cast<int64_t>(rank)), .wait_s = report["wait_s"].get<double>(), .pipeline_wait_s = report["pipeline_wait_s"].get<double>(),
                    .peak_bytes = report["peak_bytes"].get<int64_t>(), .sent_bytes = report["sent_bytes"].get<std::map<std::string, int64_t>>(),
                    .planned_bytes = by_axis(plan_traffic(plan, resolved, mesh, static_cast<int64_t>(rank)).by_group(), mesh)};
      time.compute_s = median(report["step_s"].get<std::vector<double>>()) - time.wait_s - time.pipeline_wait_s;
      result.ranks.push_back(std::move(time));
    }
  }

  if (options.decode_tokens > 0 && mesh.cp == 1) {
    const at::Tensor ids = at::randint(config.model.vocab_size, {options.decode_batch * options.decode_context}, at::detail::createCPUGenerator(0), at::TensorOptions(at::kLong));
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
  for (const json& peaks : all_reports(ranks, device, {measure_matrix_peak(dtype, device), measure_memory_peak(device)}))
    result.matrix_peak += peaks[0].get<double>(), result.memory_peak += peaks[1].get<double>();
  return result;
}

}  // namespace tessera
