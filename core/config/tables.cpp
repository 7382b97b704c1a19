// The core's tables: one row a key.
#include "config/config.hpp"

namespace tessera {

namespace {
constexpr double kMany = 1e9;  // rows or steps: beyond it, products of two sizes would leave 64 bits
constexpr double kAny = 0x1p63;  // a seed is any integer

template <class T, T Config::*kMember>
void* member(Config& config) {
  return &(config.*kMember);
}

Fields run() {
  Schema<RunConfig> s;
  s.field("name", &RunConfig::name, "name of the run; by default the name of the configuration file");
  s.field("folder", &RunConfig::folder, "folder that the run writes to; by default runs/<name>");
  return s;
}

Fields model() {
  using C = ModelConfig;
  Schema<C> s;
  s.field("hybrid_override_pattern", &C::hybrid_override_pattern, "the stack: a letter a layer, `|` cuts pipeline stages, `/` starts the head's inner stack").required();
  s.field("dialect", &C::dialect, "which blocks the letters mean where [symbols] does not say").choices({"card", "nemotron"});
  s.field("vocab_size", &C::vocab_size, "number of token ids").unit("tokens").range(1, kMany);
  s.field("hidden_size", &C::hidden_size, "width of the residual stream").required().range(1, kMany);
  s.field("norm_eps", &C::norm_eps, "added to the mean square in every norm").above(0);
  s.field("tie_embeddings", &C::tie_embeddings, "one matrix serves as embedding and lm_head");
  s.field("init_std", &C::init_std, "standard deviation of initial matrices; projections into the residual stream: divided by sqrt(layers)").range(0);
  s.field("residual_in_fp32", &C::residual_in_fp32, "keeps the residual stream in fp32 whatever the compute dtype");
  return s;
}

Fields training() {
  using C = TrainingConfig;
  Schema<C> s;
  s.field("local_batch_size", &C::local_batch_size, "rows of one micro-batch of one data rank").unit("rows").range(1, kMany);
  s.field("global_batch_size", &C::global_batch_size, "rows of an optimizer step, gradients are accumulated up to it; 0: local_batch_size x data ranks").unit("rows").range(0, kMany);
  s.field("seq_len", &C::seq_len, "length of a row").unit("tokens").range(1, kMany);
  s.field("steps", &C::steps, "optimizer steps of the run").unit("steps").range(1, kMany);
  s.field("device", &C::device, "auto: a GPU where there is one").choices({"auto", "cpu", "cuda"});
  s.field("dtype", &C::dtype, "compute dtype; auto: what this machine is fast in").choices({"auto", "float32", "bfloat16"});
  s.field("seed", &C::seed, "of initial values and data order").range(0, kAny);
  s.field("max_norm", &C::max_norm, "gradients are scaled down to this norm; 0: never").range(0);
  s.field("deterministic", &C::deterministic, "the same run gives the same numbers, bit for bit");
  s.field("on_nonfinite", &C::on_nonfinite, "what a non-finite gradient norm does: end the run, or leave the step out").choices({"stop", "skip"});
  s.field("freeze", &C::freeze, "parameters that are not trained, by name or prefix: \"embedding\", \"layers.3.\"");
  s.field("num_threads", &C::num_threads, "CPU threads; 0: all cores").range(0, 4096);
  return s;
}

Fields validation() {
  using C = ValidationConfig;
  Schema<C> s;
  s.field("interval", &C::interval, "steps between measurements of the held-out loss; 0: never").unit("steps").range(0, kMany);
  s.field("tokens", &C::tokens, "held-out tokens that are measured").unit("tokens").range(1, 1e12);
  return s;
}

Fields optimizer() {
  using C = OptimizerConfig;
  Schema<C> s;
  s.field("name", &C::name, "the optimizer").choices({"AdamW"});
  s.field("lr", &C::lr, "learning rate after the warm-up").range(0);
  s.field("beta1", &C::beta1, "decay of the mean of gradients").range(0, 1);
  s.field("beta2", &C::beta2, "decay of the mean of squared gradients").range(0, 1);
  s.field("eps", &C::eps, "added to the root of the mean square").above(0);
  s.field("weight_decay", &C::weight_decay, "decoupled, on matrices only; multiplied by the learning rate").range(0);
  return s;
}

Fields lr_scheduler() {
  using C = LrSchedulerConfig;
  Schema<C> s;
  s.field("warmup_steps", &C::warmup_steps, "steps over which the learning rate rises from 0; a shorter run ends inside them").unit("steps").range(0, kMany);
  s.field("decay_type", &C::decay_type, "shape of the decay at the end").choices({"constant", "cosine", "linear", "sqrt"});
  s.field("decay_ratio", &C::decay_ratio, "share of the steps that decay, as far as the warm-up leaves them; -1: all after it").range(-1, 1);
  s.field("min_lr_factor", &C::min_lr_factor, "learning rate at the end, as a share of lr").range(0, 1);
  return s;
}

Fields activation_checkpoint() {
  using C = ActivationCheckpointConfig;
  Schema<C> s;
  s.field("mode", &C::mode, "which layers are recomputed in the backward pass").choices({"none", "full", "selective"});
  s.field("block_types", &C::block_types, "selective: the blocks, by their name below [blocks], whose layers are recomputed");
  return s;
}

Fields metrics() {
  using C = MetricsConfig;
  Schema<C> s;
  s.field("tensorboard", &C::tensorboard, "writes TensorBoard events beside metrics.jsonl");
  s.field("log_interval", &C::log_interval, "steps between lines on the terminal; metrics.jsonl has every step").unit("steps").range(1, kMany);
  s.field("detail_interval", &C::detail_interval, "steps between expert load, imbalance and residual norms; 0: never").unit("steps").range(0, kMany);
  return s;
}

Fields profiling() {
  Schema<ProfilingConfig> s;
  s.field("enable", &ProfilingConfig::enable, "writes a trace of some steps");
  s.field("step", &ProfilingConfig::step, "the first that is traced").unit("steps").range(1, kMany);
  s.field("num_steps", &ProfilingConfig::num_steps, "how many are traced, into one file").unit("steps").range(1, 1000);
  return s;
}

Fields plugins() {
  Schema<PluginsConfig> s;
  s.field("paths", &PluginsConfig::paths, "folders or files with more plugins, relative to the working folder");
  return s;
}

Fields parallelism() {
  using C = ParallelismConfig;
  Schema<C> s;
  const auto degree = [&](const char* key, int64_t C::*at, const char* doc) { s.field(key, at, doc).unit("ranks").range(1, 1 << 20); };
  degree("data_parallel_replicate_degree", &C::data_parallel_replicate_degree, "copies of the model, each with its own data");
  s.field("data_parallel_shard_degree", &C::data_parallel_shard_degree, "ranks that share one copy's parameters, each with its own data; -1: the ranks that are left")
      .unit("ranks").range(-1, 1 << 20);
  degree("tensor_parallel_degree", &C::tensor_parallel_degree, "ranks that share each layer's matrices");
  degree("context_parallel_degree", &C::context_parallel_degree, "ranks that share each row's tokens");
  degree("pipeline_parallel_degree", &C::pipeline_parallel_degree, "ranks that share the layers, cut at the pattern's `|`");
  degree("expert_parallel_degree", &C::expert_parallel_degree, "ranks that share the experts");
  degree("expert_tensor_parallel_degree", &C::expert_tensor_parallel_degree, "ranks that share each expert's matrices");
  s.field("reshard_after_forward", &C::reshard_after_forward, "ranks give a layer's gathered parameters back after its forward pass and gather them again for the backward pass");
  s.field("reduce_dtype", &C::reduce_dtype, "in which gradients are summed over ranks: float32, or training.dtype").choices({"float32", "compute"});
  s.field("timeout_seconds", &C::timeout_seconds, "a collective that takes longer ends the run with exit code 5").unit("seconds").range(1, 1 << 20);
  return s;
}

Fields checkpoint() {
  using C = CheckpointConfig;
  Schema<C> s;
  s.field("interval", &C::interval, "steps between checkpoints; 0: at the end and when stopped only").unit("steps").range(0, kMany);
  s.field("keep_latest_k", &C::keep_latest_k, "older checkpoints are deleted; 0: none is").range(0, kMany);
  s.field("async_mode", &C::async_mode, "disabled: steps wait for a save; async: it is written from a copy in host memory while they go on").choices({"disabled", "async"});
  s.field("initial_load_path", &C::initial_load_path, "checkpoint whose weights the run starts from");
  s.field("initial_load_in_hf", &C::initial_load_in_hf, "that checkpoint has the layout of HF transformers");
  s.field("initial_load_partial", &C::initial_load_partial, "its tensors may be missing or unexpected: what was and was not loaded is printed");
  s.field("initial_load_map", &C::initial_load_map, "\"from=to\" prefixes of its tensor names; the first that fits is applied");
  return s;
}
}  // namespace

const std::vector<ConfigTable>& config_tables() {
  static const std::vector<ConfigTable> tables{
      {"run", "where the run writes", run(), member<RunConfig, &Config::run>},
      {"model", "the stack and what is common to its layers", model(), member<ModelConfig, &Config::model>},
      {"training", "batches, steps, device", training(), member<TrainingConfig, &Config::training>},
      {"validation", "held-out loss during training", validation(), member<ValidationConfig, &Config::validation>},
      {"optimizer", "what a step does", optimizer(), member<OptimizerConfig, &Config::optimizer>},
      {"lr_scheduler", "the learning rate over the steps: warm-up, constant, decay", lr_scheduler(), member<LrSchedulerConfig, &Config::lr_scheduler>},
      {"activation_checkpoint", "memory for time: layers that are recomputed in the backward pass", activation_checkpoint(),
       member<ActivationCheckpointConfig, &Config::activation_checkpoint>},
      {"data", "what is trained on", data_schema(), member<DataConfig, &Config::data>},
      {"data.task", "the documents of a task", task_schema(), [](Config& config) -> void* { return &config.data.task; }},
      {"metrics", "what is written and how often", metrics(), member<MetricsConfig, &Config::metrics>},
      {"profiling", "a trace of some steps", profiling(), member<ProfilingConfig, &Config::profiling>},
      {"plugins", "where block types come from", plugins(), member<PluginsConfig, &Config::plugins>},
      {"parallelism", "the mesh of ranks", parallelism(), member<ParallelismConfig, &Config::parallelism>},
      {"checkpoint", "what is saved, and what the run starts from", checkpoint(), member<CheckpointConfig, &Config::checkpoint>},
  };
  return tables;
}

}  // namespace tessera
