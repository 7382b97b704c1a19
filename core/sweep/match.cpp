#include "sweep/match.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "config/read_table.hpp"
#include "plan/active.hpp"
#include "sweep/line.hpp"
#include "sweep/patterns.hpp"

namespace tessera {

namespace {

using Kind = TomlNode::Kind;
constexpr int64_t kReach = 64;            // how far a key bends by default
constexpr int64_t kMostTried = 1'000'000;
constexpr int64_t kAll = 256, kAllOfSecond = 16;  // so many values are all tried
constexpr int64_t kNeighbours = 8;
constexpr int64_t kFirstKeys = 8;         // values of the first key of two that are tried in any case
constexpr const char* kPatternKey = "model.hybrid_override_pattern";
constexpr const char* kBendHelp = "bend = [\"blocks.mlp.intermediate_size\"], or { key = \"...\", multiple_of = 8 }; a key of a block or a head, model.hidden_size, or model.hybrid_override_pattern";

// `blocks.mlp.intermediate_size` -> blocks, mlp, intermediate_size; empty parts where the key has none.
struct KeyParts {
  std::string table, name, field;
};
KeyParts split(const std::string& key) {
  const size_t first = key.find('.'), last = key.rfind('.');
  if (first == std::string::npos) return {};
  KeyParts parts{.table = key.substr(0, first), .field = key.substr(last + 1)};
  if (last > first) parts.name = key.substr(first + 1, last - first - 1);
  if (parts.name.size() > 1 && parts.name.front() == '"' && parts.name.back() == '"') parts.name = parts.name.substr(1, parts.name.size() - 2);
  return parts;
}

bool can_bend(const std::string& key) {
  const KeyParts parts = split(key);
  if (key == kPatternKey || key == "model.hidden_size") return true;
  return (parts.table == "blocks" || parts.table == "heads") && !parts.name.empty() && !parts.field.empty();
}

std::string number(double value) { return std::abs(value) < 1e15 && value == std::floor(value) ? fmt::format("{:.0f}", value) : fmt::format("{:.6g}", value); }

// A key on a configuration whose values may be overwritten.
class Bend {
 public:
  Bend(const BendKey& key, Config& config) : key_(key), config_(&config) {
    const KeyParts parts = split(key.key);
    if (key.key == kPatternKey) {
      pattern_ = config.pattern.text;
      own_ = 1;
    } else if (key.key == "model.hidden_size") {
      own_ = config.model.hidden_size;
    } else if (parts.table == "heads") {
      if (!config.head || config.head->name != parts.name) return;
      find(*config.head->type, config.head->config, parts.field);
    } else {
      const auto at = std::find_if(config.bindings.begin(), config.bindings.end(), [&](const Binding& b) { return b.name == parts.name; });
      if (at == config.bindings.end()) return;
      block_ = at->type;
      find(*at->type, at->config, parts.field);
    }
    used_ = true;
    const int64_t step = key.multiple_of;
    if (own_ == 0 && (key.min == 0 || key.max == 0)) throw Error(ExitCode::kUsage, fmt::format("match.bend: {} is 0 in the configuration", key.key), "give its min and max");
    const int64_t low = key.min ? key.min : std::max<int64_t>(1, own_ / kReach), high = key.max ? key.max : own_ * kReach;
    first_ = (low + step - 1) / step * step;
    count_ = high < first_ ? 0 : (high - first_) / step + 1;
    if (count_ == 0)
      throw Error(ExitCode::kUsage, fmt::format("match.bend: {} has no multiple of {} in [{}, {}]", key.key, step, low, high), "widen min and max, or lower multiple_of");
  }

  // Whether the configuration has the key.
  bool used() const { return used_; }
  const std::string& key() const { return key_.key; }
  int64_t own() const { return own_; }
  int64_t count() const { return count_; }
  int64_t value(int64_t i) const { return first_ + i * key_.multiple_of; }
  double place(double value) const { return (value - static_cast<double>(first_)) / static_cast<double>(key_.multiple_of); }

  void set(int64_t value) {
    if (!pattern_.empty()) {
      std::vector<PatternProblem> problems;
      config_->pattern = parse_pattern(text(value), problems);
      config_->model.hybrid_override_pattern = config_->pattern.text;
    } else if (field_) {
      field_->set(values_.get(), Value(value));
    } else {
      config_->model.hidden_size = value;
    }
  }
  // The field's and the block's own rules: they cost less than all rules.
  void check(const Env& env, Issues& issues) const {
    if (!field_) return;
    Issues own;
    if (const std::string rule = broken_rule(*field_, field_->get(values_.get())); !rule.empty()) own.add(field_->key, rule);
    try {
      if (block_ && own.empty()) block_->check(values_, env, own);
    } catch (const std::exception&) {
      // check_config tells it with the block's name
    }
    const std::string table = key_.key.substr(0, key_.key.size() - field_->key.size());
    for (const Issue& issue : own.list()) issues.add(table + issue.key, issue.rule);
  }
  std::string text(int64_t value) const { return pattern_.empty() ? fmt::format("{}", value) : repeat_pattern(pattern_, value); }
  std::string toml(int64_t value) const { return pattern_.empty() ? text(value) : to_toml(Value(text(value))); }
  std::string shown(int64_t value) const { return pattern_.empty() ? fmt::format("{} = {}", key_.key, value) : fmt::format("{} x {}", value, shorten(pattern_)); }

 private:
  void find(const ElementType& type, const ConfigPtr& values, const std::string& name) {
    field_ = type.fields().find(name);
    values_ = values;
    if (!field_) throw Error(ExitCode::kUsage, fmt::format("match.bend: {}: unknown key", key_.key), did_you_mean(name, type.fields().keys(), "keys"));
    const Value value = field_->get(values.get());
    if (!std::holds_alternative<int64_t>(value)) throw Error(ExitCode::kUsage, fmt::format("match.bend: {} must be a key of integers, it is a {}", key_.key, type_name(value)));
    own_ = std::get<int64_t>(value);
  }

  BendKey key_;
  Config* config_;
  bool used_ = false;
  std::string pattern_;            // of the key that repeats it
  const Field* field_ = nullptr;   // of a block or head
  const BlockType* block_ = nullptr;
  ConfigPtr values_;
  int64_t own_ = 0, first_ = 0, count_ = 0;
};

// What a configuration costs by the values of its keys.
class Problem {
 public:
  Problem(const MatchRule& rule, const Config& config, const StepTime& step_time) : rule_(rule), step_time_(step_time), config_(config), mesh_(make_mesh(config.parallelism)) {
    std::map<void*, ConfigPtr> copies;
    for (Binding& b : config_.bindings) {
      ConfigPtr& copy = copies[b.config.get()];
      if (!copy) copy = b.type->copy_config(b.config);
      b.config = copy;
    }
    if (config_.head) config_.head->config = config_.head->type->copy_config(config_.head->config);
    for (const BendKey& key : rule.bend) {
      if (!can_bend(key.key)) throw Error(ExitCode::kUsage, fmt::format("match.bend: {} cannot bend", shorten(key.key)), kBendHelp);
      Bend bend(key, config_);
      if (bend.used()) bends_.push_back(std::move(bend));
      else notes_.push_back(fmt::format("{} stays as it is: {} has no such layer", key.key, shorten(to_toml(Value(config.pattern.text)))));
    }
    // What changes nothing stays as it is.
    for (size_t i = bends_.size(); i-- > 0;) {
      std::vector<int64_t> values = own();
      Line line(bends_[i].count(), bends_[i].place(static_cast<double>(bends_[i].own())), [&, i](int64_t at) {
        values[i] = bends_[i].value(at);
        return cost(values);
      });
      if (!line.flat() || line.seen().size() < 2) continue;
      cost(own());
      notes_.push_back(fmt::format("{} stays as it is: {} do not change with it", bends_[i].key(), rule.of));
      bends_.erase(bends_.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
  Problem(const Problem&) = delete;

  std::vector<Bend>& bends() { return bends_; }
  const std::vector<std::string>& notes() const { return notes_; }
  int64_t tried() const { return tried_; }
  // The first mistake of the last configuration that was not legal.
  const std::string& mistake() const { return mistake_; }
  std::vector<int64_t> own() const {
    std::vector<int64_t> values;
    for (const Bend& bend : bends_) values.push_back(bend.own());
    return values;
  }

  // None where the values are not legal.
  std::optional<double> cost(const std::vector<int64_t>& values) {
    if (++tried_ > kMostTried)
      throw Error(ExitCode::kUsage, fmt::format("match: more than {} configurations of {} would have to be tried", kMostTried, shorten(to_toml(Value(config_.pattern.text)))),
                  "give min, max and multiple_of of the keys that bend");
    for (size_t i = 0; i < values.size(); ++i) bends_[i].set(values[i]);
    const Env env = make_env(config_, mesh_);
    Issues issues;
    for (const Bend& bend : bends_) bend.check(env, issues);
    if (issues.empty()) check_config(config_, mesh_, issues);
    if (issues.empty()) return match_metric(rule_.of, config_, step_time_);
    mistake_ = issues.list()[0].key + ": " + issues.list()[0].rule;
    return {};
  }

 private:
  const MatchRule& rule_;
  const StepTime& step_time_;
  Config config_;
  Mesh mesh_;
  std::vector<Bend> bends_;
  std::vector<std::string> notes_;
  std::string mistake_;
  int64_t tried_ = 0;
};

struct Found {
  std::vector<int64_t> values;
  double cost = 0;
  std::string proof;
};

std::optional<Found> match_one(Problem& problem, double target) {
  const Bend& bend = problem.bends()[0];
  Line line(bend.count(), bend.place(static_cast<double>(bend.own())), [&](int64_t i) { return problem.cost({bend.value(i)}); });
  const auto best = line.nearest(target, kAll, kNeighbours);
  if (!best) return {};
  Found found{.values = {bend.value(*best)}, .cost = *line.at(*best)};
  if (line.tried_all()) {
    found.proof = fmt::format("all {} values of {} were tried, {} are legal", bend.count(), bend.key(), line.seen().size());
    return found;
  }
  // The legal values about the target.
  const auto at = line.seen().find(*best);
  const bool rises = line.seen().begin()->second < line.seen().rbegin()->second, above = found.cost >= target;
  auto other = at;
  if (above == rises) other = at == line.seen().begin() ? line.seen().end() : std::prev(at);
  else ++other;
  const std::string how = fmt::format("the metric {} with the key at all {} values looked at", rises ? "rises" : "falls", line.seen().size());
  if (other == line.seen().end()) found.proof = fmt::format("{} is the last legal value of its range, and {}", bend.shown(found.values[0]), how);
  else found.proof = fmt::format("the next legal value, {}, gives {}, and {}", bend.shown(bend.value(other->first)), number(other->second), how);
  return found;
}

std::optional<Found> match_two(Problem& problem, double target, double tolerance) {
  const Bend &first = problem.bends()[0], &second = problem.bends()[1];
  const double own = static_cast<double>(first.own()), own_second = static_cast<double>(second.own());
  // Both scaled alike.
  const auto partner = [&](int64_t i) {
    const double wanted = second.place(own_second * (own ? static_cast<double>(first.value(i)) / own : 1));
    return static_cast<int64_t>(std::clamp(std::round(wanted), 0.0, static_cast<double>(second.count() - 1)));
  };
  Line alike(first.count(), first.place(own), [&](int64_t i) -> std::optional<double> {
    const int64_t middle = partner(i);
    for (const int64_t by : {0, 1, -1, 2, -2, 3, -3, 4, -4})
      if (middle + by >= 0 && middle + by < second.count())
        if (const auto cost = problem.cost({first.value(i), second.value(middle + by)})) return cost;
    return {};
  });
  // What the first key gives with the smallest and the largest legal value of the second: beyond the places where these are nearest to the target every pair is farther off.
  const auto edge = [&](bool smallest) {
    return Line(first.count(), first.place(own), [&, smallest](int64_t i) -> std::optional<double> {
      for (int64_t j = 0; j < second.count(); ++j)
        if (const auto cost = problem.cost({first.value(i), second.value(smallest ? j : second.count() - 1 - j)})) return cost;
      return {};
    });
  };
  Line low = edge(true), high = edge(false);
  const auto at_low = low.nearest(target, 0, kNeighbours), at_high = high.nearest(target, 0, kNeighbours);
  if (!at_low || !at_high) return {};
  const auto low_direction = low.direction(), high_direction = high.direction();
  const bool bounded = low_direction && high_direction && *low_direction * *high_direction >= 0;
  const int64_t begin = bounded ? std::max<int64_t>(0, std::min(*at_low, *at_high) - kNeighbours) : 0;
  const int64_t end = bounded ? std::min(first.count(), std::max(*at_low, *at_high) + kNeighbours + 1) : first.count();
  const int64_t start = std::clamp(alike.guess(target).value_or(*at_low), begin, end - 1);
  std::optional<Found> best;
  int64_t legal = 0;
  const auto error = [&](double cost) { return std::abs(cost - target); };
  const auto look = [&](int64_t i) {
    Line line(second.count(), second.place(own_second), [&](int64_t j) { return problem.cost({first.value(i), second.value(j)}); });
    const auto at = line.nearest(target, kAllOfSecond, 0);
    if (!at) return;
    ++legal;
    if (!best || error(*line.at(*at)) < error(best->cost)) best = Found{.values = {first.value(i), second.value(*at)}, .cost = *line.at(*at)};
  };
  for (int64_t away = 0; away < end - begin; ++away) {
    if (start + away < end) look(start + away);
    if (away > 0 && start - away >= begin) look(start - away);
    if (best && (best->cost == target || (legal >= kFirstKeys && error(best->cost) <= tolerance * target))) break;
  }
  if (!best) return {};
  best->proof = fmt::format("for {} legal values of {} from {} to {} the nearest of {} was looked for", legal, first.key(), first.value(begin), first.value(end - 1), second.key());
  if (end - begin < first.count())
    best->proof += fmt::format("; beyond them every value is farther off, since the metric does not turn with {} at any of {} values looked at", first.key(), low.seen().size() + high.seen().size());
  return best;
}

// "base", or a number above 0.
void read_target(const std::string& path, const TomlNode& node, MatchRule& rule, Issues& issues) {
  if (node.kind == Kind::kValue && same_value(node.value, Value(std::string("base")))) return;
  const auto* whole = node.kind == Kind::kValue ? std::get_if<int64_t>(&node.value) : nullptr;
  const auto* real = node.kind == Kind::kValue ? std::get_if<double>(&node.value) : nullptr;
  if (whole || real) rule.target = whole ? static_cast<double>(*whole) : *real;
  if (!rule.target || !(*rule.target > 0) || std::isinf(*rule.target)) issues.add({path, "must be \"base\" or a number above 0, got " + node.describe(), "", node.place});
}

void read_bend(const std::string& path, const TomlNode& node, MatchRule& rule, Issues& issues) {
  BendKey bend;
  const auto* word = node.kind == Kind::kValue ? std::get_if<std::string>(&node.value) : nullptr;
  const size_t before = issues.list().size();
  if (word) {
    bend.key = *word;
  } else if (node.kind == Kind::kTable) {
    const auto schema = bend_schema();
    read_fields(path, node, schema, &bend, issues);
    require_fields(path, &node, schema, node.place, issues);
    if (bend.min && bend.max && bend.min > bend.max) issues.add({path + ".min", fmt::format("must be at most max, got {} > {}", bend.min, bend.max), "", node.find("min")->place});
  } else {
    issues.add({path, "must be a key or a table with one, got " + node.describe(), kBendHelp, node.place});
  }
  if (issues.list().size() == before && !can_bend(bend.key)) issues.add({path, fmt::format("{} cannot bend", shorten(to_toml(Value(bend.key)))), kBendHelp, node.place});
  for (const BendKey& other : rule.bend)
    if (other.key == bend.key && issues.list().size() == before) issues.add({path, fmt::format("{} bends already", bend.key), "name two keys", node.place});
  rule.bend.push_back(bend);
}

}  // namespace

Schema<BendKey> bend_schema() {
  Schema<BendKey> s;
  s.field("key", &BendKey::key, "a key of a block or a head, model.hidden_size, or model.hybrid_override_pattern, whose main part is then repeated").required();
  s.field("multiple_of", &BendKey::multiple_of, "only multiples of it are tried").range(1);
  s.field("min", &BendKey::min, "smallest value; 0: a 64th of what the configuration has").range(0);
  s.field("max", &BendKey::max, "largest value; 0: 64 times what the configuration has").range(0);
  return s;
}

Schema<MatchRule> match_schema() {
  Schema<MatchRule> s;
  s.field("of", &MatchRule::of, "what is made equal").required().choices({"params", "active_params", "flops", "step_time", "state_bytes"});
  s.field("tolerance", &MatchRule::tolerance, "largest distance from the target, as a share of it; what is beyond is not compared").range(0, 1);
  return s;
}

MatchRule read_match(const std::string& path, const TomlNode& node, Issues& issues) {
  MatchRule rule;
  if (node.kind != Kind::kTable) {
    issues.add({path, "must be a table, got " + node.describe(), fmt::format("[{}]", path), node.place});
    return rule;
  }
  const auto schema = match_schema();
  read_fields(path, node, schema, &rule, issues, {"target", "bend"});
  require_fields(path, &node, schema, node.place, issues);
  if (const TomlNode* target = node.find("target")) read_target(path + ".target", *target, rule, issues);
  const TomlNode* bend = node.find("bend");
  const bool one = bend && (bend->kind == Kind::kTable || (bend->kind == Kind::kValue && bend->entries.empty() && std::holds_alternative<std::string>(bend->value)));
  if (!bend) issues.add({path + ".bend", "required key is missing", kBendHelp, node.place});
  else if (one) read_bend(path + ".bend", *bend, rule, issues);
  else if (bend->entries.empty() || bend->entries.size() > 2) issues.add({path + ".bend", fmt::format("must name one or two keys, got {}", bend->entries.empty() ? bend->describe() : fmt::format("{}", bend->entries.size())), kBendHelp, bend->place});
  else
    for (const auto& [index, element] : bend->entries) read_bend(fmt::format("{}.bend[{}]", path, index), element, rule, issues);
  return rule;
}

double match_metric(const std::string& of, const Config& config, const StepTime& step_time) {
  if (of == "step_time") {
    if (!step_time) throw Error(ExitCode::kUsage, "match: step_time needs a calibration of this machine, and there is none", "match params, active_params, flops or state_bytes");
    return step_time(make_plan(config, make_mesh(config.parallelism)), config);
  }
  const ModelPlan plan = make_plan(config);
  const int64_t length = config.training.seq_len;
  double sum = 0;
  if (of == "params") return static_cast<double>(totals(plan).trained);
  if (of == "active_params") return active_parameters(plan);
  if (of == "flops") {
    for (const CostRow& row : cost_rows(plan, {{.length = length, .count = 1}})) sum += row.cost.flops();
    return sum / static_cast<double>(length);
  }
  if (of != "state_bytes") throw Error(ExitCode::kUsage, fmt::format("match: nothing is known of {}", shorten(to_toml(Value(of)))), "params, active_params, flops, step_time or state_bytes");
  const double element = config.training.dtype == "bfloat16" ? 2 : 4;
  for (const LayerPlan& layer : plan.layers)
    for (const State& state : layer.states)
      sum += static_cast<double>(num_elements(state.shape)) * (state.fp32 ? 4 : element) * (state.per == State::Per::kToken ? static_cast<double>(length) : 1);
  return sum;
}

Match match_config(const MatchRule& rule, const Config& config, double target, const StepTime& step_time) {
  const std::string pattern = shorten(to_toml(Value(config.pattern.text)));
  if (!(target > 0)) throw Error(ExitCode::kUsage, fmt::format("match: the target must be above 0, got {} {}", number(target), rule.of), "the base configuration has none: give a number");
  Problem problem(rule, config, step_time);
  auto& bends = problem.bends();
  std::optional<Found> found;
  if (bends.empty()) found = Found{.cost = match_metric(rule.of, config, step_time), .proof = "no key that may bend changes it"};
  else found = bends.size() == 1 ? match_one(problem, target) : match_two(problem, target, rule.tolerance);
  Match match{.target = target, .notes = problem.notes(), .tried = problem.tried()};
  if (!found) {
    match.proof = "none of the values is legal" + (problem.mistake().empty() ? "" : ", the last one because of " + problem.mistake());
    match.refusal = fmt::format("match: {} has no legal value of {}: {}", pattern, bends.size() == 1 ? bends[0].key() : bends[0].key() + " and " + bends[1].key(), match.proof);
    return match;
  }
  match.value = found->cost;
  match.proof = found->proof;
  std::string with;
  for (size_t i = 0; i < bends.size(); ++i) {
    match.sets.emplace_back(bends[i].key(), bends[i].toml(found->values[i]));
    with += (with.empty() ? ", with " : " and ") + bends[i].shown(found->values[i]);
  }
  match.text = fmt::format("{} {}, {:+.2f} % of {}{}", rule.of, number(match.value), 100 * match.error(), number(target), with);
  if (std::abs(match.error()) > rule.tolerance)
    match.refusal = fmt::format("match: {} comes no nearer than {}, tolerance {:g} %: {}", pattern, match.text, 100 * rule.tolerance, match.proof);
  return match;
}

}  // namespace tessera
