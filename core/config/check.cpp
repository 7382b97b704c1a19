// Rules on a Config, wherever it came from.
#include <algorithm>
#include <numeric>
#include <set>

#include <fmt/format.h>

#include "config/config.hpp"
#include "data/tasks/task.hpp"

namespace tessera {

namespace {
constexpr int64_t kMostLayers = 10'000;   // of all stacks: each is planned by itself
constexpr double kMostElements = 0x1p60;  // of all tensors
constexpr double kMostRanks = 0x1p30;

// Keys that are named already: a rule that rests on one of them would repeat the mistake, or compute with a value that was never read.
class Known {
 public:
  explicit Known(const Issues& issues) {
    for (const Issue& issue : issues.list()) keys_.insert(issue.key);
  }
  bool has(const std::string& key) const { return keys_.contains(key); }
  // Whether a key of `table`, or the table itself, is named.
  bool has_table(const std::string& table) const {
    const auto at = keys_.lower_bound(table + ".");
    return keys_.contains(table) || (at != keys_.end() && at->starts_with(table + "."));
  }

 private:
  std::set<std::string> keys_;
};

void check_fields(const std::string& table, const Fields& fields, const void* values, const Known& known, Issues& issues) {
  for (const Field& field : fields.list) {
    const std::string key = table + "." + field.key;
    if (known.has(key) || known.has(table)) continue;
    const Value value = field.get(values);
    if (field.required_ && same_value(value, field.default_value)) issues.add(key, "required key is missing", field.doc);
    else if (const std::string rule = broken_rule(field, value); !rule.empty()) issues.add(key, rule);
  }
}

// Gives the block's own rules their table and turns what a plugin throws into an error that names it.
template <class F>
void ask(const std::string& table, const ElementType& type, const char* what, Issues& issues, F rules) {
  Issues own;
  try {
    rules(own);
  } catch (const std::exception& error) {
    throw Error(ExitCode::kPlugin, fmt::format("{}: block type '{}' failed in {}: {}", table, type.type(), what, error.what()));
  }
  for (Issue issue : own.list()) {
    const bool full = issue.key.find('.') != std::string::npos;
    if (!full) issue.key = issue.key.empty() ? table : table + "." + issue.key;
    issues.add(std::move(issue));
  }
}

void check_element(const std::string& table, const ElementType& type, const ConfigPtr& config, const Env& env, Issues& issues) {
  const size_t before = issues.list().size();
  check_fields(table, type.fields(), config.get(), Known(issues), issues);
  if (issues.list().size() != before) return;
  ask(table, type, "check", issues, [&](Issues& own) { type.check(config, env, own); });
  if (issues.list().size() != before) return;
  ask(table, type, "params", issues, [&](Issues& own) {
    for (const Param& param : type.params(config, env)) {
      std::string why;
      if (!local_shape(param, env.mesh, &why)) own.add("", "does not fit the mesh: " + why);
    }
  });
}

void check_schedule(const Config& c, const Known& known, Issues& issues) {
  const double ratio = c.lr_scheduler.decay_ratio;
  if (ratio < 0 && ratio != -1 && !known.has("lr_scheduler.decay_ratio"))
    issues.add("lr_scheduler.decay_ratio", fmt::format("must be in [0, 1], or -1, got {}", ratio));
}

void check_batch(const TrainingConfig& t, const Mesh& mesh, const Known& known, Issues& issues) {
  if (known.has("training.local_batch_size") || known.has("training.global_batch_size") || t.global_batch_size == 0 || t.local_batch_size < 1) return;
  const int64_t ranks = mesh.dp_replicate * mesh.dp_shard;
  // Divisions, since a product of user numbers may overflow.
  const int64_t micro = t.global_batch_size / ranks;
  if (t.global_batch_size % ranks == 0 && micro % t.local_batch_size == 0) return;
  const bool fits = t.local_batch_size <= t.global_batch_size / ranks;
  const int64_t step = fits ? t.local_batch_size * ranks : 0;
  std::string help;
  if (fits) help = fmt::format("nearest: {}, {}", t.global_batch_size / step * step, (t.global_batch_size / step + 1) * step);
  issues.add("training.global_batch_size",
             ranks == 1 ? fmt::format("must be a multiple of local_batch_size, got {} % {} = {}", t.global_batch_size, t.local_batch_size, t.global_batch_size % t.local_batch_size)
                        : fmt::format("must be a multiple of local_batch_size x data ranks, got {} of {} x {}", t.global_batch_size, t.local_batch_size, ranks),
             help);
}

void check_mesh(const Config& c, const Mesh& mesh, const Known& known, Issues& issues) {
  if (c.parallelism.data_parallel_shard_degree == 0) issues.add("parallelism.data_parallel_shard_degree", "must be at least 1, or -1 for the ranks that are left, got 0");
  if (known.has_table("parallelism")) return;
  double world = 1;
  for (const int64_t axis : {mesh.pp, mesh.dp_replicate, mesh.dp_shard, mesh.cp, mesh.tp}) world *= static_cast<double>(axis);
  if (world > kMostRanks) return issues.add("parallelism", fmt::format("must make at most {:.0f} ranks, got pp {} x dp_replicate {} x dp_shard {} x cp {} x tp {} = {:.0f}", kMostRanks,
                                                                       mesh.pp, mesh.dp_replicate, mesh.dp_shard, mesh.cp, mesh.tp, world));
  const int64_t experts = mesh.ep * mesh.etp, ranks = mesh.dp_shard * mesh.cp * mesh.tp;
  if (ranks % experts != 0)
    issues.add("parallelism.expert_parallel_degree",
               fmt::format("expert_parallel_degree x expert_tensor_parallel_degree must divide data_parallel_shard_degree x context_parallel_degree x "
                           "tensor_parallel_degree, got {} % {} = {}", ranks, experts, ranks % experts));
  const int64_t layers = static_cast<int64_t>(c.pattern.main.size()), stages = c.pattern.num_stages;
  if (stages > 1 && stages % mesh.pp != 0)
    issues.add("parallelism.pipeline_parallel_degree", fmt::format("the pattern's stages must be a multiple of it, got {} % {} = {}", stages, mesh.pp, stages % mesh.pp),
               fmt::format("cut the pattern into {} stages with `|`, or leave the cut to the layers' costs with no `|`", mesh.pp));
  if (stages == 1 && mesh.pp > layers && layers > 0)
    issues.add("parallelism.pipeline_parallel_degree", fmt::format("must be at most the number of layers, got {} > {}", mesh.pp, layers), fmt::format("nearest: {}", layers));
}

void check_load(const CheckpointConfig& c, Issues& issues) {
  for (const std::string& entry : c.initial_load_map)
    if (entry.find('=') == std::string::npos) issues.add("checkpoint.initial_load_map", fmt::format("each entry must be \"from=to\", got {}", shorten(to_toml(Value(entry)))));
}

// What a task asks of the other tables.
void check_task_fits(const Config& c, const Known& known, Issues& issues) {
  const Task* task = find_task(c.data.source);
  if (!task || known.has_table("data")) return;
  if (const int64_t ids = task->num_ids(c.data.task); c.model.vocab_size < ids && !known.has("model.vocab_size"))
    issues.add("model.vocab_size", fmt::format("must hold the {} ids of data.source = \"{}\", got {}", ids, task->name, c.model.vocab_size), fmt::format("nearest: {}", ids));
  if (const int64_t length = c.data.task.length, rest = c.training.seq_len % length; rest != 0 && !known.has("training.seq_len"))
    issues.add("training.seq_len", fmt::format("rows must hold whole documents of data.task.length tokens, got {} % {} = {}", c.training.seq_len, length, rest),
               fmt::format("nearest: {}{}", c.training.seq_len > length ? fmt::format("{}, ", c.training.seq_len - rest) : "", c.training.seq_len - rest + length));
}

int64_t num_layers(const Config& config, int64_t num_sets) {
  return static_cast<int64_t>(config.pattern.main.size() + config.pattern.head.size() * static_cast<size_t>(num_sets));
}

// Of the head: how often its inner stack stands in the model.
int64_t num_head_sets(const HeadBinding& head) {
  int64_t sets = 0;
  for (const HeadPass& pass : head.type->passes(head.config)) sets = std::max(sets, pass.weight_set + 1);
  return sets;
}

double num_elements_of(const ParamTable& params) {
  double sum = 0;
  for (const Param& param : params) {
    double product = 1;
    for (const int64_t size : param.shape) product *= static_cast<double>(size);
    sum += product;
  }
  return sum;
}

// Elements are counted in 64 bits from here on. Asks blocks whose own rules hold.
void check_size(const Config& c, const Env& env, Issues& issues) {
  const int64_t sets = c.head ? num_head_sets(*c.head) : 0;
  if (const int64_t layers = num_layers(c, sets); layers > kMostLayers)
    return issues.add("heads." + c.head->name, fmt::format("must make at most {} layers, got {} + {} sets of {} = {}", kMostLayers, c.pattern.main.size(), sets, c.pattern.head.size(), layers));
  double elements = static_cast<double>(c.model.vocab_size) * static_cast<double>(c.model.hidden_size) * (c.model.tie_embeddings ? 1 : 2);
  const auto stack = [&](const std::vector<PatternLayer>& layers, double times) {
    std::map<char, double> counts;
    for (const PatternLayer& layer : layers) ++counts[layer.symbol];
    for (const auto& [symbol, count] : counts) {
      const Binding& b = c.binding(symbol);
      elements += times * count * (num_elements_of(b.type->params(b.config, env)) + static_cast<double>(c.model.hidden_size));
    }
  };
  stack(c.pattern.main, 1);
  stack(c.pattern.head, static_cast<double>(sets));
  if (c.head) elements += static_cast<double>(sets) * num_elements_of(c.head->type->params(c.head->config, env));
  if (elements > kMostElements)
    issues.add("model", fmt::format("must have at most {:.0f} parameters (2^60), got {:.4g} in {} layers of hidden_size {}", kMostElements, elements, num_layers(c, sets), c.model.hidden_size));
}

bool same_data(const DataConfig& a, const DataConfig& b) {
  const auto fields = data_schema();
  return a.mixture.empty() && b.mixture.empty() &&
         std::all_of(fields.list.begin(), fields.list.end(), [&](const Field& f) { return same_value(f.get(&a), f.get(&b)); });
}
}  // namespace

bool has_data(const Config& config) { return !same_data(config.data, DataConfig{}); }

void check_config(const Config& config, const Mesh& mesh, Issues& issues) {
  const Known known(issues);
  for (const ConfigTable& table : config_tables()) check_fields(table.name, table.fields, table.of(const_cast<Config&>(config)), known, issues);
  if (const std::string key = "model.hybrid_override_pattern"; !known.has(key) && !config.model.hybrid_override_pattern.empty())
    check_pattern(config.model.hybrid_override_pattern, key, issues);
  if (const int64_t layers = num_layers(config, 1); layers > kMostLayers)
    issues.add("model.hybrid_override_pattern", fmt::format("must have at most {} layers, got {}", kMostLayers, layers));
  check_schedule(config, known, issues);
  check_batch(config.training, mesh, known, issues);
  check_mesh(config, mesh, known, issues);
  check_load(config.checkpoint, issues);
  if (config.activation_checkpoint.mode == "selective" && config.activation_checkpoint.block_types.empty() && !known.has("activation_checkpoint.block_types"))
    issues.add("activation_checkpoint.block_types", "must name at least one block with mode = \"selective\"");
  if (has_data(config) && !known.has_table("data")) {
    Issues own;
    check_data(config.data, own);
    if (own.empty()) check_task_fits(config, known, issues);
    for (Issue issue : own.list()) {
      issue.key = "data." + issue.key;
      issues.add(std::move(issue));
    }
  }
  // A block reads the model's sizes: they must be sound before it is asked.
  const Known sound(issues);
  if (sound.has_table("model") || sound.has_table("parallelism")) return;
  const Env env = make_env(config, mesh);
  std::set<std::string> seen;
  for (const Binding& b : config.bindings) {
    const std::string table = "blocks." + b.name;
    if (b.type && b.config && seen.insert(b.name).second && !known.has_table(table)) check_element(table, *b.type, b.config, env, issues);
  }
  if (config.head && config.head->type && config.head->config) {
    const std::string table = "heads." + config.head->name;
    if (!known.has_table(table)) check_element(table, *config.head->type, config.head->config, env, issues);
  }
  if (issues.empty()) check_size(config, env, issues);
}

Env make_env(const Config& config, const Mesh& mesh) {
  const ModelConfig& m = config.model;
  return {.hidden_size = m.hidden_size, .vocab_size = m.vocab_size, .num_layers = static_cast<int64_t>(config.pattern.main.size()),
          .norm_eps = m.norm_eps, .init_std = m.init_std, .mesh = mesh};
}

Mesh make_mesh(const ParallelismConfig& p, int64_t world_size) {
  const auto degree = [](int64_t d) { return std::clamp<int64_t>(d, 1, 1 << 20); };
  Mesh mesh{.pp = degree(p.pipeline_parallel_degree), .dp_replicate = degree(p.data_parallel_replicate_degree), .cp = degree(p.context_parallel_degree),
            .tp = degree(p.tensor_parallel_degree), .ep = degree(p.expert_parallel_degree), .etp = degree(p.expert_tensor_parallel_degree)};
  const bool rest = p.data_parallel_shard_degree < 1;
  // Five factors of up to 2^20 may overflow 64 bits, so they are compared as doubles first.
  const double others = 1.0 * mesh.pp * mesh.dp_replicate * mesh.cp * mesh.tp;
  if (!rest) mesh.dp_shard = degree(p.data_parallel_shard_degree);
  else if (world_size <= 0) mesh.dp_shard = mesh.ep * mesh.etp / std::gcd(mesh.ep * mesh.etp, mesh.cp * mesh.tp);
  else if (others <= world_size) mesh.dp_shard = std::max<int64_t>(1, world_size / (mesh.pp * mesh.dp_replicate * mesh.cp * mesh.tp));
  if (world_size > 0 && others * mesh.dp_shard != world_size)
    throw Error(ExitCode::kUsage, fmt::format("the degrees of [parallelism] must make the number of ranks, got pp {} x dp_replicate {} x dp_shard {} x cp {} x tp {} = {:.0f} for {} ranks",
                                              mesh.pp, mesh.dp_replicate, mesh.dp_shard, mesh.cp, mesh.tp, others * mesh.dp_shard, world_size),
                "start that many ranks, or set parallelism.data_parallel_shard_degree = -1 for the ranks that are left");
  return mesh;
}

std::string no_effect(const Config& c, const std::string& table, const std::string& key) {
  if (table == "lr_scheduler" && (key == "min_lr_factor" || key == "decay_ratio") && c.lr_scheduler.decay_type == "constant")
    return "has no effect with lr_scheduler.decay_type = \"constant\"";
  if (table == "activation_checkpoint" && key == "block_types" && c.activation_checkpoint.mode != "selective")
    return fmt::format("has no effect with activation_checkpoint.mode = {}", to_toml(Value(c.activation_checkpoint.mode)));
  const Task* task = table == "data.task" ? find_task(c.data.source) : nullptr;
  if (table == "data.task" && (!task || std::find(task->keys.begin(), task->keys.end(), key) == task->keys.end()))
    return fmt::format("has no effect with data.source = {}", to_toml(Value(c.data.source)));
  if (table == "checkpoint" && key.starts_with("initial_load_") && key != "initial_load_path" && c.checkpoint.initial_load_path.empty())
    return "has no effect without checkpoint.initial_load_path";
  return {};
}

const Binding& Config::binding(char symbol) const {
  for (const Binding& b : bindings)
    if (b.symbol == symbol) return b;
  throw Error(ExitCode::kRuntime, fmt::format("symbol '{}' is not bound to a block", symbol));
}

int64_t global_batch_rows(const Config& config, const Mesh& mesh) {
  const TrainingConfig& t = config.training;
  return t.global_batch_size ? t.global_batch_size : t.local_batch_size * mesh.dp_replicate * mesh.dp_shard;
}

}  // namespace tessera
