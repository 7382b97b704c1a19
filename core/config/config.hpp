// The configuration of a run as typed structs: read once from TOML (or made by an import), then passed down.
#pragma once
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "data/config.hpp"
#include "pattern/pattern.hpp"
#include "plugin/registry.hpp"

namespace tessera {

struct RunConfig {
  std::string name;    // default: the configuration file's stem
  std::string folder;  // default: runs/<name>
};

struct ModelConfig {
  std::string hybrid_override_pattern;
  std::string dialect = "card";
  int64_t vocab_size = 256;
  int64_t hidden_size = 0;
  double norm_eps = 1e-5;
  bool tie_embeddings = false;
  double init_std = 0.02;
  bool residual_in_fp32 = false;
};

struct TrainingConfig {
  int64_t local_batch_size = 1;   // rows of one micro-batch of one data rank
  int64_t global_batch_size = 0;  // rows of an optimizer step; 0: local_batch_size x data ranks
  int64_t seq_len = 512;          // tokens of a row
  int64_t steps = 1000;
  std::string device = "auto";    // auto, cpu, cuda
  std::string dtype = "auto";     // auto, float32, bfloat16
  int64_t seed = 0;
  double max_norm = 1.0;          // gradient clipping; 0: none
  bool deterministic = true;
  std::string on_nonfinite = "stop";  // stop, skip
  std::vector<std::string> freeze;    // parameter names or prefixes, `layers.3.`, `embedding`
  int64_t num_threads = 0;        // 0: all cores
};

struct ValidationConfig {
  int64_t interval = 0;  // steps; 0: never
  int64_t tokens = 65536;
};

struct OptimizerConfig {
  std::string name = "AdamW";
  double lr = 1e-3;
  double beta1 = 0.9, beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;
};

struct LrSchedulerConfig {
  int64_t warmup_steps = 0;
  std::string decay_type = "constant";  // constant, cosine, linear, sqrt: the shape of the decay
  double decay_ratio = -1;              // share of the steps that decay; -1: all after the warm-up. Below 1 gives warmup-stable-decay
  double min_lr_factor = 0;             // lr at the end, as a share of lr
};

struct ActivationCheckpointConfig {
  std::string mode = "none";            // none, full, selective
  std::vector<std::string> block_types; // selective: bindings whose layers are recomputed
};

struct MetricsConfig {
  bool tensorboard = true;
  int64_t log_interval = 1;       // steps between lines on the terminal; metrics.jsonl has every step
  int64_t detail_interval = 0;    // steps between expert load, imbalance and residual norms; 0: never
};

struct ProfilingConfig {
  bool enable = false;
  int64_t step = 10;              // the first step that is traced, from 1
  int64_t num_steps = 1;          // steps traced
};

struct PluginsConfig {
  std::vector<std::string> paths;
};

struct ParallelismConfig {
  int64_t data_parallel_replicate_degree = 1;
  int64_t data_parallel_shard_degree = -1;  // -1: the ranks that are left
  int64_t tensor_parallel_degree = 1;
  int64_t context_parallel_degree = 1;
  int64_t pipeline_parallel_degree = 1;
  int64_t expert_parallel_degree = 1;
  int64_t expert_tensor_parallel_degree = 1;
  bool reshard_after_forward = true;        // parameters that ranks share are given back between forward and backward pass
  std::string reduce_dtype = "float32";     // float32, compute: in which gradients are summed over ranks
  int64_t timeout_seconds = 600;            // a collective that takes longer ends the run
};

struct CheckpointConfig {
  int64_t interval = 0;           // steps; 0: at the end and when stopped only
  int64_t keep_latest_k = 3;      // 0: all
  std::string async_mode = "disabled";  // disabled, async: written from a copy while training goes on
  std::string initial_load_path;  // warm start: weights only
  bool initial_load_in_hf = false;
  bool initial_load_partial = false;       // tensors may be missing or unexpected; what was and was not loaded is printed
  std::vector<std::string> initial_load_map;  // "from=to" prefixes of tensor names, the first that fits
};

// A letter bound to a block: the binding's name is its table below [blocks].
struct Binding {
  char symbol = 0;
  std::string name;
  const BlockType* type = nullptr;
  ConfigPtr config;
  bool shared = false;  // all layers of this letter use one set of weights
};

struct HeadBinding {
  std::string name;
  const HeadType* type = nullptr;
  ConfigPtr config;
};

struct Config {
  std::string source;  // the file it came from, for messages
  RunConfig run;
  ModelConfig model;
  TrainingConfig training;
  ValidationConfig validation;
  OptimizerConfig optimizer;
  LrSchedulerConfig lr_scheduler;
  ActivationCheckpointConfig activation_checkpoint;
  DataConfig data;
  MetricsConfig metrics;
  ProfilingConfig profiling;
  PluginsConfig plugins;
  ParallelismConfig parallelism;
  CheckpointConfig checkpoint;
  Pattern pattern;                      // of model.hybrid_override_pattern
  std::vector<Binding> bindings;        // of the letters that the pattern uses, in order of first use
  std::optional<HeadBinding> head;      // set when the pattern has a `/` part
  const Binding& binding(char symbol) const;
};

// A core table: its name in TOML, its fields, and where it lives in Config. One list serves reading, writing, `describe`, `--set` and the reference.
struct ConfigTable {
  std::string name, doc;
  Fields fields;
  void* (*of)(Config& config);
};
const std::vector<ConfigTable>& config_tables();

// Where the plugins of a configuration are looked for ([plugins] paths), before its blocks can be read.
// Also reads the file's syntax: throws Error(kUsage) `file:line:col: error: ...` on malformed TOML or a missing file.
std::vector<std::string> plugin_paths(const std::filesystem::path& file, const std::vector<std::string>& sets);

// Reads, checks and resolves. `sets` are `a.b=c` texts (c as TOML; a bare word is a string), applied in order through the same schemas.
// Throws one Error(kUsage) with every mistake of the file: unknown keys with the nearest, types, ranges, pattern, bindings, block checks.
Config load_config(const std::filesystem::path& file, const std::vector<std::string>& sets, const Registry& registry);
// The same from text; `name` stands for the file in messages.
Config parse_config(const std::string& toml, const std::string& name, const std::vector<std::string>& sets, const Registry& registry);

// Every rule of every field, between tables, and of the blocks on `mesh`, for a configuration made in memory as well. Rules are left out
// for keys and tables that `issues` already names. [data] is checked unless it is all default: who reads data calls check_data.
void check_config(const Config& config, const Mesh& mesh, Issues& issues);

// Whether [data] says anything. A configuration without it can be planned and measured, not trained.
bool has_data(const Config& config);

// The degrees of [parallelism]. `world_size` 0: not known yet, and a shard degree of -1 counts as the smallest that the others admit.
// Else throws Error(kUsage) when the degrees do not make `world_size` ranks.
Mesh make_mesh(const ParallelismConfig& parallelism, int64_t world_size = 0);

// Why a key of a core table has no effect in `config` ("has no effect with ..."), or "" when it has.
std::string no_effect(const Config& config, const std::string& table, const std::string& key);

// The resolved configuration as TOML: every key that has an effect; parsing it gives the same Config. Blocks that the pattern does not use are left out.
std::string to_toml(const Config& config);

Env make_env(const Config& config, const Mesh& mesh);

// Rows of an optimizer step: training.global_batch_size, or local_batch_size x data ranks where it is 0.
int64_t global_batch_rows(const Config& config, const Mesh& mesh = {});

}  // namespace tessera
