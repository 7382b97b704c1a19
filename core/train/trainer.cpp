#include "train/trainer.hpp"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <iostream>
#include <nlohmann/json.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "checkpoint/file.hpp"
#include "checkpoint/saver.hpp"
#include "data/loader.hpp"
#include "hf/convert.hpp"
#include "metrics/events.hpp"
#include "metrics/exchange_metrics.hpp"
#include "metrics/machine.hpp"
#include "metrics/metrics_file.hpp"
#include "metrics/progress.hpp"
#include "metrics/starts.hpp"
#include "memory/tensor_bytes.hpp"
#include "model/model.hpp"
#include "parallel/agree.hpp"
#include "parallel/rendezvous.hpp"
#include "parallel/reports.hpp"
#include "parallel/watch.hpp"
#include "plan/memory.hpp"
#include "plan/traffic.hpp"
#include "plugin/program.hpp"
#include "tessera/build_key.hpp"
#include "train/diagnosis.hpp"
#include "train/evaluate.hpp"
#include "train/profile.hpp"
#include "train/setup.hpp"
#include "train/signals.hpp"
#include "train/step.hpp"

namespace tessera {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

// What the first rank says.
std::string from_first(const World& world, const std::string& about, const std::string& text) {
  if (world.size == 1) return text;
  const std::string key = "from first/" + about;
  if (world.rank == 0) world.store->set(key, std::vector<uint8_t>(text.begin(), text.end()));
  const std::vector<uint8_t> said = world.store->get(key);
  return {said.begin(), said.end()};
}

std::string plugin_files(const Registry& registry) {
  std::string text;
  for (const Registry::Plugin& plugin : registry.plugins()) text += fmt::format("{} {:08x}\n", plugin.file.filename().string(), file_crc32(plugin.file));
  return text;
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

class Run {
 public:
  Run(const Config& config, const Registry& registry, const TrainOptions& options, const World& world, const Mesh& mesh)
      : config_(config), registry_(registry), options_(options), world_(world), mesh_(mesh), folder_(config.run.folder), checkpoints_(folder_ / "checkpoints") {
    options_.quiet = options_.quiet || !first();
  }

  // `groups` outlives the run: it gets the ranks' groups where there are several.
  int go(std::unique_ptr<MeshGroups>& groups) {
    if (!has_data(config_)) throw Error(ExitCode::kUsage, "data: the table is missing, so there is nothing to train on", "for example [data] source = \"bytes\" and path = \"{libtorch}/**/*.h\"");
    dataset_ = Dataset::open(config_.data, config_.model.vocab_size, {{"libtorch", libtorch_include().string()}});
    if (world_.size > 1) {
      agree(world_, {{"build", TESSERA_VERSION " " TESSERA_BUILD_KEY}, {"plugins", plugin_files(registry_)}, {"device", c10::DeviceTypeName(world_.compute.type(), /*lower_case=*/true)}, {"configuration", to_toml(config_)}, {"data", dataset_->hash()}});
      groups = std::make_unique<MeshGroups>(world_, mesh_);
      ranks_ = groups.get();
    }
    if (open_folder()) return 0;
    apply_runtime(config_.training, world_.local_size);
    device_ = world_.compute;
    // What `auto` measured once holds for the whole run: a resumed curve is the uninterrupted one.
    if (resume_from_ && config_.training.dtype == "auto") config_.training.dtype = checkpoint_config(*resume_from_, {}, registry_).training.dtype;
    dtype_ = choose_dtype(from_first(world_, "dtype", first() ? dtype_name(choose_dtype(config_.training.dtype, device_)) : ""), device_);
    config_.training.dtype = dtype_name(dtype_);
    plan_ = make_plan(config_, mesh_);
    if (device_.is_cpu() && !ranks_) require_memory(plan_, &config_.training, config_.checkpoint.async_mode == "async");
    const StoreOptions sharing{.reshard_after_forward = config_.parallelism.reshard_after_forward, .reduce_in_fp32 = config_.parallelism.reduce_dtype == "float32"};
    store_ = std::make_unique<Store>(plan_, device_, dtype_, config_.training.freeze, ranks_, sharing);
    optimizer_ = std::make_unique<Optimizer>(*store_, config_.optimizer);
    loader_ = std::make_unique<Loader>(dataset_, config_.training.seq_len);
    model_ = std::make_unique<Model>(plan_, *store_, recomputed_bindings(config_.activation_checkpoint), config_.training.seed);
    saver_ = std::make_unique<Saver>(config_, registry_, *store_, optimizer_.get(), config_.checkpoint.async_mode == "async");
    if (resume_from_) restore();
    else begin();
    if (first()) write_file(folder_ / "config.toml", to_toml(config_)), write_start();
    if (config_.validation.interval > 0) validation_ = open_validation(dataset_, config_.data, config_.training.seq_len, config_.validation.tokens);
    say_hello();
    return loop();
  }

 private:
  bool first() const { return world_.rank == 0; }

  // True when the run is finished already. The first rank looks and makes, the others learn what it found.
  bool open_folder() {
    std::string from;
    if (first()) {
      make_folder(folder_);
      lock_.emplace(folder_, "another process is training there", "wait until it ends, or choose another [run] folder or name");
      const auto complete = list_checkpoints(checkpoints_);
      if (!options_.resume && (fs::exists(folder_ / "metrics.jsonl") || !complete.empty()))
        throw Error(ExitCode::kUsage, fmt::format("{}: holds a run already", folder_.string()), "go on with it by --resume, or choose another [run] folder or name");
      if (options_.resume && complete.empty()) say(fmt::format("no complete checkpoint in {}: starting at step 0", checkpoints_.string()));
      if (options_.resume && !complete.empty()) from = complete.back().string();
    }
    from = from_first(world_, "resumed checkpoint", from);
    if (!from.empty()) {
      resume_from_ = open_checkpoint(from, /*optimizer=*/true, /*check=*/first());
      if (resume_from_->state.step >= config_.training.steps || (options_.until > 0 && resume_from_->state.step >= options_.until)) {
        say(fmt::format("{} is {}: {} of {} steps", folder_.string(), resume_from_->state.step >= config_.training.steps ? "finished" : "as far as it is to go", resume_from_->state.step,
                        config_.training.steps));
        return true;
      }
    }
    if (!first()) return false;
    make_folder(checkpoints_);
    for (const char* name : {"config.toml", "metrics.jsonl"}) AtomicFile::clear_leftovers(folder_ / name);
    return false;
  }

  void begin() {
    store_->initialise(config_.training.seed);
    const CheckpointConfig& c = config_.checkpoint;
    if (c.initial_load_path.empty()) return;
    LoadReport report;
    if (c.initial_load_in_hf) {
      report = load_hf(c.initial_load_path, plan_, *store_, c.initial_load_partial, c.initial_load_map);
      if (!c.initial_load_partial) hf_ = hf_state(c.initial_load_path, plan_);
    } else {
      const OpenCheckpoint from = open_checkpoint(c.initial_load_path);
      report = load_weights(from.model, *store_, c.initial_load_partial, c.initial_load_map);
      if (!c.initial_load_partial) hf_ = from.state.hf;
    }
    say(fmt::format("warm start from {}: {} tensors loaded, {} left at their initial values, {} of the file not used", c.initial_load_path, report.loaded,
                    report.missing.size() + report.misshapen.size(), report.unexpected.size()));
    for (const auto& [what, names] : {std::pair<const char*, const std::vector<std::string>&>{"not in the file", report.missing}, {"of another shape", report.misshapen}, {"not used", report.unexpected}})
      for (const std::string& name : names) say(fmt::format("  {}: {}", what, name));
  }

  void restore() {
    load_weights(resume_from_->model, *store_);
    load_optimizer(*resume_from_, *store_, *optimizer_);
    loader_->restore(resume_from_->state.data);
    step_ = resume_from_->state.step;
    tokens_ = resume_from_->state.tokens;
    hf_ = resume_from_->state.hf;
    say(fmt::format("resuming {} at step {}", folder_.string(), step_));
  }

  void write_start() const {
    json start = describe_start();
    start.update({{"step", step_}, {"device", device_.str()}, {"dtype", dtype_name(dtype_)}, {"threads", at::get_num_threads()}, {"ranks", world_.size}});
    append_start(folder_ / "starts.jsonl", start);
  }

  void say_hello() {
    const Totals sum = totals(plan_);
    std::string legend;
    for (const Binding& binding : config_.bindings) legend += fmt::format(" {} = {}", binding.symbol, binding.name);
    say(fmt::format("{}: pattern {} ({}:{}), {} parameters, {} on {}, {} threads", config_.run.name, plan_.pattern.text, config_.model.dialect, legend, sum.trained,
                    dtype_name(dtype_), device_.str(), at::get_num_threads()));
    if (ranks_) say(fmt::format("{} ranks: {}", world_.size, mesh_text(mesh_)));
    const int64_t per_step = global_rows() * config_.training.seq_len;
    const Documents documents{{.length = config_.training.seq_len, .count = global_rows()}};
    for (const CostRow& row : cost_rows(plan_, documents)) flops_per_token_ += 3 * row.cost.flops() / static_cast<double>(per_step);
    peak_flops_ = measure_matrix_peak(dtype_, device_);
  }

  int64_t global_rows() const { return global_batch_rows(config_, mesh_); }

  int loop() {
    const StopSignals signals;
    if (first()) metrics_.emplace(folder_ / "metrics.jsonl", step_);
    std::unique_ptr<EventFile> events;
    if (config_.metrics.tensorboard && first()) events = std::make_unique<EventFile>(folder_, step_);
    const bool live = isatty(STDERR_FILENO);
    const double began = seconds();
    const int64_t first_step = step_;
    std::optional<ExchangeMetrics> exchanges;
    if (ranks_ && ranks_->all()) exchanges.emplace(*ranks_, device_, plan_traffic(plan_, config_, mesh_, ranks_->place().rank).by_group());
    while (step_ < config_.training.steps) {
      const double start = seconds();
      if (exchanges) exchanges->begin();
      const std::vector<Batch> batches = next_batches(*loader_, config_, mesh_, data_rank(ranks_), tokens_);
      const double input_s = seconds() - start;
      const double lr = learning_rate(config_.optimizer, config_.lr_scheduler, step_, config_.training.steps);
      StepResult result;
      trace();
      result = train_step(*model_, *optimizer_, batches, lr, config_.training.max_norm);
      if (traced_ && step_ + 1 == config_.profiling.step + config_.profiling.num_steps - 1) end_trace();
      if (!result.finite) nonfinite(result, batches);
      ++step_;
      const int64_t step_tokens = global_rows() * config_.training.seq_len;
      tokens_ += step_tokens;
      const double elapsed = seconds() - start;
      json line{{"step", step_}, {"loss", result.loss}, {"total_loss", result.total_loss}, {"grad_norm", result.grad_norm}, {"lr", lr}, {"tokens", tokens_},
                {"tokens_per_s", static_cast<double>(step_tokens) / elapsed}, {"flops_per_s", flops_per_token_ * static_cast<double>(step_tokens) / elapsed},
                {"input_s", input_s}, {"peak_bytes", peak_memory_bytes()}};
      if (!device_.is_cpu()) line["device_peak_bytes"] = tensor_bytes(device_).most;
      for (const auto& [name, part] : result.parts) line[name] = part;
      if (!result.finite) line["skipped"] = true;
      if (exchanges) exchanges->end(line, elapsed, input_s);
      line.update(pause_), pause_.clear();
      const int64_t detail = config_.metrics.detail_interval;
      if (detail > 0 && step_ % detail == 0) add_details(line, result, batches);
      const bool last = step_ == config_.training.steps;
      if (validation_ && (step_ % config_.validation.interval == 0 || last || step_ == options_.until)) add_validation(line);
      write(step_, [&] {
        if (metrics_) metrics_->write(line);
        if (events) events->line(line);
      });
      if (!options_.quiet && (step_ % config_.metrics.log_interval == 0 || last || line.contains("val_loss")))
        progress(line, live, (seconds() - began) / static_cast<double>(step_ - first_step));
      const int64_t interval = config_.checkpoint.interval;
      int signal = received_by_any();
      const bool until = step_ == options_.until;
      if (!last && !signal && !until && (interval == 0 || step_ % interval != 0)) continue;
      save();
      signal = received_by_any();  // during the save too
      if (last || until || signal) finish_save();
      if (signal && !last) {
        say(fmt::format("stopped by {} after step {}: checkpoint saved; go on with --resume", signal == SIGINT ? "SIGINT" : "SIGTERM", step_));
        return 128 + signal;
      }
      if (until) break;
    }
    return 0;
  }

  // Begins a trace where the step to come is the first of it.
  void trace() {
    if (!config_.profiling.enable || step_ + 1 != config_.profiling.step) return;
    const int64_t first_step = step_ + 1, last = first_step + config_.profiling.num_steps - 1;
    traced_.emplace(folder_ / fmt::format("trace-{}{}{}.json", first_step, last > first_step ? fmt::format("-{}", last) : "", first() ? "" : fmt::format("-rank{}", world_.rank)));
    scopes_ = std::make_unique<StepClock>(device_, StepClock::kScopes);
    model_->set_clock(scopes_.get());
  }
  void end_trace() {
    scopes_->stop();
    model_->set_clock(nullptr);
    scopes_.reset();
    traced_.reset();
  }

  // All ranks stop after the same step: a signal that one of them received is one for all, and so is the failure of a save in flight, which this throws.
  int received_by_any() {
    int signal = StopSignals::received(), failed = saver_->failed();
    if (ranks_ && ranks_->all()) {
      at::Tensor host = at::empty({2}, at::kInt);
      host[0] = signal, host[1] = failed;
      const at::Tensor greatest = host.to(device_);
      ranks_->whereabouts().place = "the end of a step";
      ranks_->all()->all_reduce(greatest, Reduce::kMax);
      host = greatest.to(at::kCPU);
      signal = host[0].item<int>(), failed = host[1].item<int>();
    }
    if (failed) finish_save();
    return signal;
  }

  void nonfinite(const StepResult& result, const std::vector<Batch>& batches) {
    const bool loss = !std::isfinite(result.total_loss);
    const std::string place = diagnose_nonfinite(*model_, batches);
    const std::string message = fmt::format("step {}: the {} is {}, first at {}", step_ + 1, loss ? "loss" : "gradient norm", loss ? result.total_loss : result.grad_norm, place);
    if (config_.training.on_nonfinite == "skip") {
      say(message + ": step skipped");
      store_->zero_grad();
      return;
    }
    saver_->wait();
    const auto complete = list_checkpoints(checkpoints_);
    throw Error(ExitCode::kRuntime, message,
                complete.empty() ? "there is no checkpoint yet; lower optimizer.lr, lengthen lr_scheduler.warmup_steps, or skip such steps with training.on_nonfinite = \"skip\""
                                 : fmt::format("the last good checkpoint is {}; go on from it with --resume and a lower --set optimizer.lr=...", complete.back().string()));
  }

  void add_validation(json& line) {
    const Evaluation held_out = evaluate(*model_, *validation_, config_.training.local_batch_size);
    line["val_loss"] = held_out.loss;
    if (!held_out.accuracy) return;
    line["val_accuracy"] = *held_out.accuracy;
    for (const GroupAccuracy& group : held_out.by_group) line["val_accuracy_by"][fmt::format("{} {}", validation_->axis, group.group)] = group.accuracy();
  }

  // Expert load and imbalance of every layer that counts, and the residual stream's RMS by layer.
  void add_details(json& line, const StepResult& result, const std::vector<Batch>& batches) {
    json details = json::object();
    for (const auto& [prefix, counts] : result.counts)
      for (const auto& [name, count] : counts) {
        const at::Tensor host = count.to(at::kCPU, at::kDouble);
        const double mean = host.mean().item<double>();
        const std::string key = prefix + name;
        details[key + ".imbalance"] = mean > 0 ? host.max().item<double>() / mean : 0.0;
        details[key] = std::vector<double>(host.const_data_ptr<double>(), host.const_data_ptr<double>() + host.numel());
      }
    for (const auto& [layer, rms] : residual_norms(*model_, batches.front())) details["residual_rms"][fmt::format("{:06}", layer + 1)] = rms;
    details = of_all_stages(details);
    json rms = json::array();
    for (const json& layer : details["residual_rms"]) rms.push_back(layer);
    details["residual_rms"] = rms;
    line.update(details);
  }

  // What each stage says of its own layers, together.
  json of_all_stages(const json& own) const {
    if (!ranks_ || !ranks_->pipe()) return own;
    ranks_->whereabouts().place = "the details of a step";
    json together = json::object();
    for (const json& stage : gather_reports(*ranks_->pipe(), device_, json::to_cbor(own))) together.update(stage, /*merge_objects=*/true);
    return together;
  }

  void progress(const json& line, bool live, double seconds_per_step) {
    Progress p;
    p.step = step_;
    p.steps = config_.training.steps;
    p.loss = line["loss"].get<double>();
    if (line.contains("val_loss")) p.val_loss = line["val_loss"].get<double>();
    if (line.contains("val_accuracy")) p.val_accuracy = line["val_accuracy"].get<double>();
    p.grad_norm = line["grad_norm"].get<double>();
    p.tokens_per_s = line["tokens_per_s"].get<double>();
    p.flops_per_s = line["flops_per_s"].get<double>();
    p.peak_share = peak_flops_ > 0 ? p.flops_per_s / peak_flops_ : 0;
    p.memory_bytes = line["peak_bytes"].get<int64_t>();
    p.seconds_left = seconds_per_step * static_cast<double>(config_.training.steps - step_);
    const bool keep = line.contains("val_loss") || step_ == config_.training.steps;
    std::cerr << progress_text(p, live, keep) << std::flush;
  }

  // A write that fails ends the run: what was trained since the last checkpoint is lost, so the error says which that is.
  void write(int64_t step, const std::function<void()>& work) {
    try {
      work();
    } catch (const Error& error) {
      saver_->wait();
      const auto complete = list_checkpoints(checkpoints_);
      std::string help = error.help();
      if (!help.empty()) help += "; ";
      help += complete.empty() ? "there is no complete checkpoint yet" : fmt::format("the last complete checkpoint is {}, and --resume goes on from it", complete.back().string());
      throw Error(error.code(), fmt::format("step {}: {}", step, error.message()), help);
    }
  }

  void save() {
    const double began = seconds();
    const bool waits = saver_->in_flight();
    finish_save();
    if (waits) pause_["save_wait_s"] = seconds() - began;
    saving_ = step_;
    write(saving_, [&] {
      saver_->save(checkpoints_ / fmt::format("step-{}", step_), {.step = step_, .tokens = tokens_, .data = loader_->state(), .hf = hf_, .extra = nullptr},
                   [this] { metrics_->flush(); },
                   [this] {
                     if (first()) not_removed_ = prune_checkpoints(checkpoints_, config_.checkpoint.keep_latest_k);
                   });
    });
    if (!saver_->in_flight()) finish_save();
    pause_["save_s"] = seconds() - began;
  }
  void finish_save() {
    write(saving_, [&] { saver_->finish(); });
    if (const std::string text = std::exchange(not_removed_, ""); !text.empty()) say(text);
  }

  void say(const std::string& text) {
    if (!options_.quiet) std::cerr << text << std::endl;
  }

  Config config_;
  const Registry& registry_;
  TrainOptions options_;
  const World& world_;
  const MeshGroups* ranks_ = nullptr;  // nullptr: a single process
  Mesh mesh_;
  fs::path folder_, checkpoints_;
  std::optional<FolderLock> lock_;
  std::optional<OpenCheckpoint> resume_from_;
  at::Device device_ = at::kCPU;
  at::ScalarType dtype_ = at::kFloat;
  ModelPlan plan_;
  std::unique_ptr<Store> store_;
  std::unique_ptr<Optimizer> optimizer_;
  std::shared_ptr<const Dataset> dataset_;
  std::unique_ptr<Loader> loader_;
  std::unique_ptr<Model> model_;
  std::optional<Validation> validation_;
  json hf_;
  std::optional<MetricsFile> metrics_;
  int64_t step_ = 0, tokens_ = 0;
  int64_t saving_ = 0;              // the step that the last save is of
  std::string not_removed_;         // what it said of older ones
  json pause_ = json::object();     // what it cost the loop
  std::optional<Profile> traced_;
  std::unique_ptr<StepClock> scopes_;  // of the trace
  double flops_per_token_ = 0, peak_flops_ = 0;
  std::unique_ptr<Saver> saver_;  // its thread ends before what it reads
};

}  // namespace

int train(const Config& config, const Registry& registry, const TrainOptions& options) {
  std::signal(SIGPIPE, SIG_IGN);  // a run does not end because nobody reads its progress any more
  World world = rendezvous(std::chrono::seconds(config.parallelism.timeout_seconds));
  world.compute = choose_device(config.training.device, world.local_rank);
  const Mesh mesh = make_mesh(config.parallelism, world.size);  // refuses degrees that need another number of processes
  Issues issues;
  check_config(config, mesh, issues);
  issues.raise();
  std::unique_ptr<MeshGroups> groups;
  Watch watch(world);
  watch.set_mesh(mesh);
  return watch.run([&] { return Run(config, registry, options, world, mesh).go(groups); });
}

}  // namespace tessera
