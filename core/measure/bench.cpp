#include "measure/bench.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randint.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "data/loader.hpp"
#include "infer/generate.hpp"
#include "measure/self_check.hpp"
#include "memory/kept_blocks.hpp"
#include "memory/tensor_bytes.hpp"
#include "metrics/exchange_metrics.hpp"
#include "metrics/machine.hpp"
#include "model/model.hpp"
#include "parallel/reports.hpp"
#include "plan/memory.hpp"
#include "plugin/program.hpp"
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

// The process's own memory, or what its tensors take of a GPU's.
int64_t held_bytes(at::Device device) { return device.is_cpu() ? current_memory_bytes() : tensor_bytes(device).now; }

double median(std::vector<double> values) { return Samples{std::move(values)}.median(); }

// Those of this data rank; ranks that share rows draw the same.
std::vector<Batch> random_batches(const Config& config, const Mesh& mesh, int64_t data_rank) {
  std::vector<Batch> out;
  const TrainingConfig& t = config.training;
  const at::Generator generator = at::detail::createCPUGenerator(static_cast<uint64_t>(data_rank));
  for (int64_t i = 0; i < num_micro_batches(config, mesh); ++i)
    out.push_back({.ids_n = at::randint(config.model.vocab_size, {t.local_batch_size * t.seq_len}, generator, at::TensorOptions(at::kLong)),
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

// What the store holds, by part.
std::map<std::string, double> state_bytes(Store& store) {
  const ModelPlan& plan = store.plan();
  std::map<std::string, std::string> part_of{{kEmbeddingUnit, "embedding"}, {kOutputUnit, "lm_head"}};
  for (const LayerPlan& layer : plan.layers) part_of[layer.prefix] = layer.binding;
  if (plan.head)
    for (const HeadSet& set : plan.head->sets) {
      part_of[set.prefix] = plan.head->name;
      for (const LayerPlan& layer : set.layers) part_of[layer.prefix] = layer.binding;
    }
  std::map<std::string, double> out;
  for (const FlatGroup& group : store.groups())
    for (const at::Tensor* flat : {&group.data, &group.grad, &group.compute, &group.exp_avg, &group.exp_avg_sq})
      if (flat->defined()) out[part_of.at(group.unit)] += static_cast<double>(flat->nbytes());
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
  for (const json& report : reports)
    for (const auto& [name, bytes] : report["memory"].items())
      if (auto part = by_name.find(name); part != by_name.end())
        part->second.state_bytes += share * bytes[0].get<double>(), part->second.kept_bytes += share * bytes[1].get<double>(), part->second.working_bytes += share * bytes[2].get<double>();
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

// One configuration among those that take turns.
class Subject {
 public:
  Subject(const Config& config, const BenchOptions& options, const MeshGroups* ranks, std::vector<std::string> unchecked)
      : config_(config), options_(options), ranks_(ranks), mesh_(ranks ? ranks->mesh() : Mesh{}), device_(choose_device(config.training.device, ranks)),
        dtype_(choose_dtype(config.training.dtype, device_, ranks)), plan_(make_plan(config, mesh_)) {
    config_.training.dtype = dtype_name(dtype_);
    result_ = {.config = config.source, .dtype = dtype_name(dtype_), .device = device_.str(), .routing = options.routing, .params = totals(plan_).trained, .unchecked = std::move(unchecked)};
    if (device_.is_cpu() && !ranks) require_memory(plan_, options.steps > 0 ? &config.training : nullptr);
    release_kept_blocks();
    const int64_t others = held_bytes(device_);
    device_.is_cpu() ? forget_peak_memory() : forget_most_tensor_bytes(device_);
    store_ = std::make_unique<Store>(plan_, device_, dtype_, config.training.freeze, ranks,
                                     StoreOptions{.reshard_after_forward = config.parallelism.reshard_after_forward, .reduce_in_fp32 = config.parallelism.reduce_dtype == "float32"});
    store_->initialise(config.training.seed);
    model_ = std::make_unique<Model>(plan_, *store_, recomputed_bindings(config.activation_checkpoint), config.training.seed);
    model_->set_balanced_routing(options.routing == "balanced");
    if (options.steps > 0) {
      optimizer_ = std::make_unique<Optimizer>(*store_, config.optimizer);
      batches_ = random_batches(config, mesh_, data_rank(ranks));
      open_input();
      warm_up();
    }
    taken_bytes_ = (device_.is_cpu() ? peak_memory_bytes() : tensor_bytes(device_).most) - others;
    if (options.steps > 0) measure_memory();
  }

  // One timed training step; where others took their turns since the last one, behind another that brings back into the caches what a run has there.
  void train(bool alone) {
    if (!alone) step();
    StepClock clock(device_);
    model_->set_clock(&clock);
    const Exchanged before = ranks_ ? exchanged(*ranks_) : Exchanged{};
    const double input_s = input();
    if (loader_) parts_["input"].push_back({input_s, 0, 0});
    step_s_.values.push_back(input_s + step());
    for (const auto& [name, seconds] : clock.stop()) parts_[name].push_back(seconds);
    const Exchanged during = ranks_ ? exchanged(*ranks_) - before : Exchanged{};
    sent_bytes_ = during.sent_bytes;
    wait_s_.push_back(during.wait_s), pipeline_wait_s_.push_back(during.pipeline_wait_s);
    model_->set_clock(nullptr);
  }

  // A prompt, and new tokens behind it.
  void decode() {
    const auto [prefill, decoding] = time_decoding(options_.decode_batch, options_.decode_context, options_.decode_tokens);
    prefill_.push_back(prefill), decoding_.push_back(decoding);
  }

  BenchResult finish(int64_t base_bytes) {
    for (const int64_t context : options_.contexts) measure_context(context);
    const json own{{"step_s", step_s_.values}, {"wait_s", median(wait_s_)}, {"pipeline_wait_s", median(pipeline_wait_s_)}, {"parts", part_medians(parts_)},
                   {"memory", memory_}, {"peak_bytes", base_bytes + taken_bytes_}, {"sent_bytes", by_axis(sent_bytes_, mesh_)}};
    const std::vector<json> reports = all_reports(ranks_, device_, own);
    for (const json& report : reports) result_.peak_bytes = std::max(result_.peak_bytes, report["peak_bytes"].get<int64_t>());
    if (options_.steps > 0) add_training(reports);
    result_.prefill_tokens_per_s = median(prefill_), result_.decode_tokens_per_s = median(decoding_);
    if (!options_.peaks) return std::move(result_);
    for (const json& peaks : all_reports(ranks_, device_, {measure_matrix_peak(dtype_, device_), measure_memory_peak(device_)}))
      result_.matrix_peak += peaks[0].get<double>(), result_.memory_peak += peaks[1].get<double>();
    return std::move(result_);
  }

 private:
  double step() {
    return timed([&] { train_step(*model_, *optimizer_, batches_, config_.optimizer.lr, config_.training.max_norm); });
  }

  // The data of the configuration; where there are none, or none here, the rest is measured without.
  void open_input() {
    if (!has_data(config_)) return void(result_.no_input = "the configuration has no data");
    try {
      loader_ = std::make_unique<Loader>(Dataset::open(config_.data, config_.model.vocab_size, {{"libtorch", libtorch_include().string()}}), config_.training.seq_len);
    } catch (const Error& error) {
      result_.no_input = error.what();
    }
  }

  // Reads a batch as training does, which nothing is computed from: seconds.
  double input() {
    if (!loader_) return 0;
    return timed([&] { next_batches(*loader_, config_, mesh_, data_rank(ranks_), 0); });
  }

  // One more forward and backward pass over the batch.
  void measure_memory() {
    StepClock clock(device_, StepClock::kMemory);
    model_->set_clock(&clock);
    accumulate(*model_, batches_);
    model_->set_clock(nullptr);
    store_->zero_grad();
    const auto micro = static_cast<int64_t>(batches_.size());
    for (const auto& [name, bytes] : clock.stop_memory()) memory_[name] = {0, bytes.kept / micro, bytes.most};
    for (const auto& [name, bytes] : state_bytes(*store_)) {
      if (!memory_.contains(name)) memory_[name] = {0, 0, 0};
      memory_[name][0] = bytes;
    }
  }

  // Until a step takes no less than nine tenths of the fastest before it; alike on all ranks, whose steps end together.
  void warm_up() {
    constexpr int64_t kMost = 10;
    double fastest = step();
    for (result_.warm_up_steps = 1; result_.warm_up_steps < kMost; ++result_.warm_up_steps) {
      double s = step();
      if (ranks_ && ranks_->all()) {
        const at::Tensor slowest = at::full({1}, s, at::TensorOptions(at::kDouble).device(device_));
        ranks_->all()->all_reduce(slowest, Reduce::kMax);
        s = slowest.item<double>();
        if (result_.warm_up_steps == 1) fastest = std::numeric_limits<double>::infinity();  // the first step's time is each rank's own
      }
      const bool settled = s >= 0.9 * fastest;
      fastest = std::min(fastest, s);
      if (settled) break;
    }
  }

  void add_training(const std::vector<json>& reports) {
    const Documents documents{{.length = config_.training.seq_len, .count = global_batch_rows(config_, mesh_)}};
    result_.step_s.values = reports[0]["step_s"].get<std::vector<double>>();
    result_.train_step_s = result_.step_s.median();
    result_.train_tokens_per_s = static_cast<double>(num_tokens(documents)) / result_.train_step_s;
    for (const CostRow& row : cost_rows(plan_, documents)) result_.train_flops_per_s += 3 * row.cost.flops() / result_.train_step_s;
    result_.parts = part_times(plan_, documents, dtype_ == at::kBFloat16 ? 2 : 4, reports);
    for (size_t rank = 0; ranks_ && rank < reports.size(); ++rank) {
      const json& report = reports[rank];
      RankTime time{.place = place_text(mesh_, static_cast<int64_t>(rank)), .wait_s = report["wait_s"].get<double>(), .pipeline_wait_s = report["pipeline_wait_s"].get<double>(),
                    .peak_bytes = report["peak_bytes"].get<int64_t>(), .sent_bytes = report["sent_bytes"].get<std::map<std::string, int64_t>>(),
                    .planned_bytes = by_axis(plan_traffic(plan_, config_, mesh_, static_cast<int64_t>(rank)).by_group(), mesh_)};
      time.compute_s = median(report["step_s"].get<std::vector<double>>()) - time.wait_s - time.pipeline_wait_s;
      result_.ranks.push_back(std::move(time));
    }
  }

  // Tokens/s of the prompts' pass and of decoding.
  std::pair<double, double> time_decoding(int64_t sequences, int64_t context, int64_t tokens) {
    const at::Tensor ids = at::randint(config_.model.vocab_size, {sequences * context}, at::detail::createCPUGenerator(0), at::TensorOptions(at::kLong));
    std::vector<std::vector<int64_t>> prompts;
    for (int64_t i = 0; i < sequences; ++i) {
      const int64_t* begin = ids.const_data_ptr<int64_t>() + i * context;
      prompts.emplace_back(begin, begin + context);
    }
    // The first token ends the prompt's pass; each step gives one token a sequence, the last sequence's ends it.
    std::vector<double> ends;
    const auto start = std::chrono::steady_clock::now();
    generate(*model_, prompts, {.max_new_tokens = tokens + 1}, [&](size_t sequence, int64_t) {
      if (sequence + 1 == prompts.size()) ends.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    });
    return {static_cast<double>(sequences * context) / ends.front(), static_cast<double>(sequences * tokens) / (ends.back() - ends.front())};
  }

  void measure_context(int64_t context) {
    std::vector<double> prefill, decoding;
    for (int round = 0; round < 3; ++round) {
      const auto [a, b] = time_decoding(1, context, std::max<int64_t>(1, options_.decode_tokens));
      prefill.push_back(a), decoding.push_back(b);
    }
    DecodeState state(plan_, 1, device_, store_->compute_dtype(), ranks_);
    state.reserve(context);
    result_.contexts.push_back({.context = context, .prefill_tokens_per_s = median(prefill), .decode_tokens_per_s = median(decoding), .state_bytes = state.bytes()});
  }

  Config config_;
  BenchOptions options_;
  const MeshGroups* ranks_;
  Mesh mesh_;
  at::Device device_;
  at::ScalarType dtype_;
  ModelPlan plan_;
  std::unique_ptr<Store> store_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<Optimizer> optimizer_;
  std::vector<Batch> batches_;
  std::unique_ptr<Loader> loader_;  // nullptr: no input is measured
  json memory_ = json::object();    // by part: state, kept and working bytes
  BenchResult result_;
  Samples step_s_;
  std::vector<double> wait_s_, pipeline_wait_s_, prefill_, decoding_;
  PartSteps parts_;
  std::map<std::string, int64_t> sent_bytes_;  // of the last step, by group
  int64_t taken_bytes_ = 0;                    // by its weights and its first steps
};

}  // namespace

double Samples::quantile(double q) const {
  if (values.empty()) return 0;
  std::vector<double> sorted = values;
  std::sort(sorted.begin(), sorted.end());
  const double at = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(at);
  return sorted[below] + (at - static_cast<double>(below)) * (sorted[std::min(below + 1, sorted.size() - 1)] - sorted[below]);
}

std::vector<BenchResult> bench(const std::vector<Config>& configs, const BenchOptions& options, const MeshGroups* ranks) {
  const Mesh mesh = ranks ? ranks->mesh() : Mesh{};
  Issues issues;
  for (const Config& config : configs) check_config(config, mesh, issues);
  issues.raise();
  if (mesh.cp > 1 && !options.contexts.empty()) throw Error(ExitCode::kUsage, "--contexts: context-parallel ranks do not decode", "measure them on another mesh");
  apply_runtime(configs.front().training, ranks ? ranks->world().local_size : 1);
  std::vector<std::vector<std::string>> unchecked(configs.size());
  for (size_t i = 0; i < configs.size() && options.check && !ranks; ++i) {
    const at::Device device = choose_device(configs[i].training.device);
    unchecked[i] = check_blocks(configs[i], choose_dtype(configs[i].training.dtype, device), device).too_large;
  }
  release_kept_blocks();
  const int64_t base_bytes = held_bytes(choose_device(configs.front().training.device, ranks));
  std::vector<std::unique_ptr<Subject>> subjects;
  for (size_t i = 0; i < configs.size(); ++i) subjects.push_back(std::make_unique<Subject>(configs[i], options, ranks, std::move(unchecked[i])));
  for (int64_t round = 0; round < options.steps; ++round)
    for (const auto& subject : subjects) subject->train(subjects.size() == 1);
  constexpr int kDecodeRounds = 3;
  for (int round = 0; round < kDecodeRounds && options.decode_tokens > 0 && mesh.cp == 1; ++round)
    for (const auto& subject : subjects) subject->decode();
  std::vector<BenchResult> results;
  for (const auto& subject : subjects) results.push_back(subject->finish(base_bytes));
  return results;
}

}  // namespace tessera
