#include "sweep/sweep.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "config/read_table.hpp"
#include "data/hash.hpp"
#include "sweep/patterns.hpp"

namespace tessera {

namespace fs = std::filesystem;

namespace {

using Kind = TomlNode::Kind;
constexpr int64_t kMostPoints = 100'000;  // of one axis

class Reader {
 public:
  explicit Reader(const fs::path& file) : file_(file), root_(parse_toml(read_config_text(file), file.string())) {}

  Sweep read() {
    const std::vector<std::string> known{"sweep", "set", "axes", "match", "halving"};
    for (const auto& [key, node] : root_.entries)
      if (std::find(known.begin(), known.end(), key) == known.end()) issues_.add({shorten(toml_key(key)), "unknown table", did_you_mean(key, known, "tables"), node.key_place});
    const TomlNode* own = table("sweep", true);
    const auto schema = sweep_schema();
    if (own) read_fields("sweep", *own, schema, &sweep_.config, issues_), require_fields("sweep", own, schema, own->place, issues_);
    if (const TomlNode* halving = table("halving", false)) {
      sweep_.halving.emplace();
      const auto fields = halving_schema();
      read_fields("halving", *halving, fields, &*sweep_.halving, issues_);
      require_fields("halving", halving, fields, halving->place, issues_);
      if (!std::is_sorted(sweep_.halving->rungs.begin(), sweep_.halving->rungs.end(), std::less_equal<>())) issues_.add({"halving.rungs", "must rise", "", halving->place});
    }
    if (const TomlNode* match = table("match", false)) sweep_.match = read_match("match", *match, issues_);
    if (own && (sweep_.config.lr_rule != "none") != (sweep_.config.lr_width > 0))
      issues_.add({"sweep.lr_width", "goes with lr_rule, and lr_rule with it", "lr_rule = \"inverse_width\" and the hidden size for which optimizer.lr is meant", own->place});
    if (const TomlNode* sets = table("set", false)) add_sets("set", *sets, "", sweep_.sets);
    if (const TomlNode* axes = root_.find("axes"); axes && axes->kind == Kind::kTables)
      for (size_t i = 0; i < axes->entries.size(); ++i) add_axis(fmt::format("axes[{}]", i), axes->entries[i].node);
    else if (axes) issues_.add({"axes", "must be an array of tables, got " + axes->describe(), "[[axes]]", axes->place});
    check_keys();
    issues_.raise();
    sweep_.file = file_;
    sweep_.base = file_.parent_path() / sweep_.config.base;
    sweep_.folder = sweep_.config.folder.empty() ? fs::path("runs") / file_.stem() : fs::path(sweep_.config.folder);
    return std::move(sweep_);
  }

 private:
  const TomlNode* table(const std::string& name, bool required) {
    const TomlNode* node = root_.find(name);
    if (!node && required) issues_.add({name, "table is missing", fmt::format("[{}]\nbase = \"config.toml\"", name), root_.place});
    if (node && node->kind != Kind::kTable) issues_.add({name, "must be a table, got " + node->describe(), fmt::format("[{}]", name), node->place});
    return node && node->kind == Kind::kTable ? node : nullptr;
  }

  // `training = { steps = 5 }` and `"training.steps" = 5` alike.
  void add_sets(const std::string& path, const TomlNode& node, const std::string& prefix, std::vector<Setting>& sets) {
    for (const auto& [key, value] : node.entries) {
      const std::string name = prefix + (key.find('.') != std::string::npos ? key : toml_key(key));
      if (value.kind == Kind::kTable) add_sets(path, value, name + ".", sets);
      else if (const auto text = value_text(path + "." + name, value)) sets.push_back({name, *text});
    }
  }

  // The value as TOML.
  std::optional<std::string> value_text(const std::string& path, const TomlNode& node) {
    if (node.kind == Kind::kValue) return to_toml(node.value);
    issues_.add({path, "must be a value, got " + node.describe(), "", node.place});
    return {};
  }

  void add_axis(const std::string& path, const TomlNode& node) {
    SweepAxis axis{.place = node.place};
    const std::vector<std::string> forms{"values", "range", "log_range", "zip", "patterns"};
    std::vector<std::string> known{"key", "when"};
    known.insert(known.end(), forms.begin(), forms.end());
    std::string form;
    for (const auto& [key, value] : node.entries) {
      if (std::find(known.begin(), known.end(), key) == known.end()) issues_.add({path + "." + shorten(toml_key(key)), "unknown key", did_you_mean(key, known, "keys"), value.key_place});
      if (std::find(forms.begin(), forms.end(), key) == forms.end()) continue;
      if (!form.empty()) issues_.add({path, fmt::format("has both {} and {}", form, key), "one axis, one form", value.key_place});
      form = key;
    }
    const TomlNode *key = node.find("key"), *points = form.empty() ? nullptr : node.find(form);
    if (!points) return issues_.add({path, "says no values", "values = [...], range = { from, to, step }, log_range = { from, to, count }, zip = { key = [...], ... }, or patterns = [...]", node.place});
    if (form == "zip" || form == "patterns") {
      if (key) issues_.add({path + ".key", fmt::format("has no effect with {}, which says its keys", form), "remove it", key->key_place});
      if (form == "zip") add_zip(path + ".zip", *points, axis);
      else add_patterns(path + ".patterns", *points, axis);
    } else {
      const auto* name = key && key->kind == Kind::kValue ? std::get_if<std::string>(&key->value) : nullptr;
      if (!name || name->empty()) return issues_.add({path + ".key", "must be the name of a key", "key = \"optimizer.lr\"", key ? key->place : node.place});
      axis.keys = {*name};
      std::vector<std::string> values = form == "values" ? list(path + ".values", *points) : range(path + "." + form, *points, form == "log_range");
      for (std::string& value : values) axis.points.push_back({{*name, std::move(value)}});
    }
    if (const TomlNode* when = node.find("when")) add_when(path + ".when", *when, axis);
    sweep_.axes.push_back(std::move(axis));
  }

  std::vector<std::string> list(const std::string& path, const TomlNode& node) {
    std::vector<std::string> out;
    const bool array = node.kind == Kind::kTables || node.kind == Kind::kOther || (node.kind == Kind::kValue && node.value.index() >= Value(std::vector<int64_t>{}).index());
    if (!array || (node.kind == Kind::kOther && node.entries.empty())) {
      issues_.add({path, "must be an array, got " + node.describe(), "", node.place});
      return out;
    }
    if (node.entries.empty()) issues_.add({path, "is empty: the sweep would have no trials", "remove the axis, or name a value", node.place});
    for (const auto& [index, value] : node.entries)
      if (const auto text = value_text(fmt::format("{}[{}]", path, index), value)) out.push_back(*text);
    return out;
  }

  void add_zip(const std::string& path, const TomlNode& node, SweepAxis& axis) {
    if (node.kind != Kind::kTable || node.entries.empty()) return issues_.add({path, "must be a table of keys and their values, got " + node.describe(), "zip = { \"model.hidden_size\" = [64, 128], \"optimizer.lr\" = [3e-3, 1e-3] }", node.place});
    for (const auto& [key, values] : node.entries) {
      const auto texts = list(path + "." + shorten(toml_key(key)), values);
      if (axis.keys.empty()) axis.points.resize(texts.size());
      axis.keys.push_back(key);
      if (texts.size() != axis.points.size()) {
        issues_.add({path + "." + shorten(toml_key(key)), fmt::format("has {} values, '{}' has {}", texts.size(), axis.keys[0], axis.points.size()), "keys that go together have as many values each", values.place});
        continue;
      }
      for (size_t i = 0; i < texts.size(); ++i) axis.points[i].push_back({key, texts[i]});
    }
  }

  void add_patterns(const std::string& path, const TomlNode& node, SweepAxis& axis) {
    const SweptPatterns patterns = read_patterns(path, node, issues_);
    sweep_.notes.insert(sweep_.notes.end(), patterns.notes.begin(), patterns.notes.end());
    axis.keys = {"model.hybrid_override_pattern"};
    const bool dialects = std::any_of(patterns.list.begin(), patterns.list.end(), [](const SweptPattern& p) { return !p.dialect.empty(); });
    if (dialects) axis.keys.emplace_back("model.dialect");
    for (const SweptPattern& pattern : patterns.list) {
      axis.points.push_back({{axis.keys[0], to_toml(Value(pattern.text))}});
      if (!pattern.dialect.empty()) axis.points.back().push_back({"model.dialect", to_toml(Value(pattern.dialect))});
    }
  }

  void add_when(const std::string& path, const TomlNode& node, SweepAxis& axis) {
    if (node.kind != Kind::kTable) return issues_.add({path, "must be a table of keys and values, got " + node.describe(), "when = { \"optimizer.name\" = \"AdamW\" }", node.place});
    for (const auto& [key, value] : node.entries) {
      const std::string name = path + "." + shorten(toml_key(key));
      const bool earlier = std::any_of(sweep_.axes.begin(), sweep_.axes.end(), [&](const SweepAxis& a) { return std::find(a.keys.begin(), a.keys.end(), key) != a.keys.end(); });
      if (!earlier) issues_.add({name, "is no key of an earlier axis", "a condition looks at what an axis before this one sets", value.key_place});
      const bool array = value.kind == Kind::kOther || (value.kind == Kind::kValue && value.value.index() >= Value(std::vector<int64_t>{}).index());
      if (array) axis.when.emplace_back(key, list(name, value));
      else if (const auto text = value_text(name, value)) axis.when.emplace_back(key, std::vector<std::string>{*text});
    }
  }

  std::vector<std::string> range(const std::string& path, const TomlNode& node, bool log) {
    struct Bounds {
      double from = 0, to = 0, step = 0;
      int64_t count = 0;
    } b;
    Schema<Bounds> schema;
    constexpr double kAny = 1e300;
    schema.field("from", &Bounds::from, "the first value").required().range(-kAny, kAny);
    schema.field("to", &Bounds::to, "the last value").required().range(-kAny, kAny);
    if (log) schema.field("count", &Bounds::count, "how many").required().range(2, kMostPoints);
    else schema.field("step", &Bounds::step, "between values").required().range(-kAny, kAny);
    if (node.kind != Kind::kTable) {
      issues_.add({path, "must be a table, got " + node.describe(), log ? "{ from = 1e-4, to = 1e-2, count = 5 }" : "{ from = 64, to = 256, step = 64 }", node.place});
      return {};
    }
    const size_t before = issues_.list().size();
    read_fields(path, node, schema, &b, issues_);
    require_fields(path, &node, schema, node.place, issues_);
    if (issues_.list().size() > before) return {};
    const bool integers = std::all_of(node.entries.begin(), node.entries.end(), [](const TomlEntry& e) { return std::holds_alternative<int64_t>(e.node.value); });
    std::vector<double> values;
    if (log) {
      if (!(b.from > 0 && b.to > 0)) issues_.add({path, fmt::format("from and to must be above 0, got {} and {}", b.from, b.to), "", node.place});
      else
        for (int64_t i = 0; i < b.count; ++i)
          values.push_back(i == 0 ? b.from : i == b.count - 1 ? b.to : b.from * std::pow(b.to / b.from, static_cast<double>(i) / static_cast<double>(b.count - 1)));
    } else if (b.step == 0 || (b.to - b.from) / b.step < 0) {
      issues_.add({path, fmt::format("never gets from {} to {} in steps of {}", b.from, b.to, b.step), "", node.place});
    } else if (const double steps = std::floor((b.to - b.from) / b.step * (1 + 1e-12) + 1e-9); steps >= kMostPoints) {
      issues_.add({path, fmt::format("has {:.0f} values, at most {}", steps + 1, kMostPoints), "", node.place});
    } else {
      for (int64_t i = 0; i <= static_cast<int64_t>(steps); ++i) values.push_back(b.from + static_cast<double>(i) * b.step);
    }
    std::vector<std::string> out;
    // Ten digits: 0.1 + 2 x 0.1 is 0.3.
    for (const double value : values) out.push_back(integers ? to_toml(Value(static_cast<int64_t>(std::llround(value)))) : to_toml(Value(std::stod(fmt::format("{:.10g}", value)))));
    out.erase(std::unique(out.begin(), out.end()), out.end());
    return out;
  }

  // No key twice; the seed and the folder are the sweep's.
  void check_keys() {
    std::map<std::string, std::string> seen;
    const auto take = [&](const std::string& key, const std::string& place, const char* where) {
      if (key.starts_with("run.")) issues_.add({key, "is the sweep's own", "remove it: each trial has a folder below [sweep] folder", place});
      if (key == "training.seed" && !sweep_.config.seeds.empty()) issues_.add({key, "is set by [sweep] seeds", "remove one of the two", place});
      const auto [at, added] = seen.emplace(key, where);
      if (!added) issues_.add({key, fmt::format("is set by {} and by {}", at->second, where), "a key is set once", place});
    };
    for (const Setting& set : sweep_.sets) take(set.key, root_.find("set")->place, "[set]");
    for (const SweepAxis& axis : sweep_.axes) {
      if (!axis.when.empty()) continue;  // two axes may share a key under conditions that exclude each other; a trial that has both is refused
      for (const std::string& key : axis.keys) take(key, axis.place, "an axis");
    }
  }

  fs::path file_;
  TomlNode root_;
  Issues issues_;
  Sweep sweep_;
};

// What an explicit configuration says, a line a key: comments, order and defaults do not count.
void flatten(const TomlNode& node, const std::string& path, std::vector<std::string>& lines) {
  if (node.kind == Kind::kTable || node.kind == Kind::kTables)
    for (const auto& [key, child] : node.entries) flatten(child, path + "." + key, lines);
  else lines.push_back(path + " = " + (node.kind == Kind::kValue ? to_toml(node.value) : node.text));
}

// The letters of a value that a file name may have.
std::string name_part(const Setting& setting) {
  const std::string key = setting.key.substr(setting.key.rfind('.') + 1);
  std::string value;
  for (const char c : setting.value)
    if (std::isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '+') value += c;
    else if (c == '*') value += 'x';
    else if (c == '-' || c == '_') value += '_';
  if (value.size() > 24) value.resize(24);
  return key == "hybrid_override_pattern" ? value : key + value;
}

}  // namespace

Schema<SweepConfig> sweep_schema() {
  using C = SweepConfig;
  Schema<C> s;
  s.field("base", &C::base, "configuration file that the axes vary, relative to the sweep's file").required();
  s.field("folder", &C::folder, "of the trials; default runs/<file's stem>");
  s.field("seeds", &C::seeds, "values of training.seed; none: that of the base").range(0);
  s.field("at_once", &C::at_once, "trials that run together on one machine, each with its share of the cores").range(1, 1024);
  s.field("ranks", &C::ranks, "processes of a trial, which [parallelism] divides").range(1, 1 << 16);
  s.field("lr_rule", &C::lr_rule, "how optimizer.lr follows model.hidden_size from lr_width on: times lr_width / hidden_size, or the root of that").choices({"none", "inverse_width", "inverse_sqrt_width"}).source("arXiv:2203.03466 for inverse_width");
  s.field("lr_width", &C::lr_width, "the hidden size for which optimizer.lr is meant").range(1);
  s.field("stop_above", &C::stop_above, "a trial ends as diverged when its loss exceeds this many times its first one; 0: never").range(0, 1e9);
  return s;
}

Schema<HalvingConfig> halving_schema() {
  using C = HalvingConfig;
  Schema<C> s;
  s.field("metric", &C::metric, "key of metrics.jsonl by which trials are ranked; the lower the better, the higher where it ends in accuracy");
  s.field("rungs", &C::rungs, "steps after which the worst trials end").unit("steps").required().range(1);
  s.field("keep", &C::keep, "share of the trials that go on behind each rung, at least one").above(0).range(0, 1);
  return s;
}

double Sweep::most_trials() const {
  double count = static_cast<double>(std::max<size_t>(1, config.seeds.size()));
  for (const SweepAxis& axis : axes) count *= static_cast<double>(std::max<size_t>(1, axis.points.size()));
  return count;
}

Sweep read_sweep(const fs::path& file) { return Reader(file).read(); }

std::vector<std::string> Trial::sets(const Sweep& sweep) const {
  std::vector<std::string> out;
  for (const Setting& set : sweep.sets) out.push_back(set.text());
  for (const auto* list : {&settings, &fitted})
    for (const Setting& set : *list) out.push_back(set.text());
  if (seeded) out.push_back(fmt::format("training.seed={}", seed));
  out.push_back("run.name=" + to_toml(Value(name)));
  out.push_back("run.folder=" + to_toml(Value(trial_folder(sweep, *this).string())));
  return out;
}

void fit(const Sweep& sweep, const Config& config, Trial& trial, const StepTime& step_time) {
  trial.fitted.clear();
  if (sweep.match) {
    const Match match = match_config(*sweep.match, config, *sweep.match->target, step_time);
    trial.match = match.text;
    trial.match_error = match.error();
    if (!match.refusal.empty()) throw Error(ExitCode::kUsage, match.refusal, "widen [match] tolerance, or bend a key with finer steps");
    for (const auto& [key, value] : match.sets) trial.fitted.push_back({key, value});
  }
  if (sweep.config.lr_rule == "none") return;
  int64_t width = config.model.hidden_size;
  for (const Setting& set : trial.fitted)
    if (set.key == "model.hidden_size") width = std::stoll(set.value);
  const double ratio = static_cast<double>(sweep.config.lr_width) / static_cast<double>(width);
  trial.fitted.push_back({"optimizer.lr", to_toml(Value(config.optimizer.lr * (sweep.config.lr_rule == "inverse_width" ? ratio : std::sqrt(ratio))))});
}

fs::path trial_folder(const Sweep& sweep, const Trial& trial) { return sweep.folder / "trials" / trial.name; }

std::vector<Trial> make_trials(const Sweep& sweep) {
  std::vector<std::vector<Setting>> points{{}};
  for (const SweepAxis& axis : sweep.axes) {
    std::vector<std::vector<Setting>> next;
    for (const auto& before : points) {
      const bool meant = std::all_of(axis.when.begin(), axis.when.end(), [&](const auto& condition) {
        return std::any_of(before.begin(), before.end(), [&](const Setting& s) {
          return s.key == condition.first && std::find(condition.second.begin(), condition.second.end(), s.value) != condition.second.end();
        });
      });
      if (!meant) {
        next.push_back(before);
        continue;
      }
      for (const auto& point : axis.points) {
        auto settings = before;
        for (const Setting& own : point) {
          if (std::any_of(before.begin(), before.end(), [&](const Setting& s) { return s.key == own.key; }))
            throw Error(ExitCode::kUsage, fmt::format("{}: error: axes: {} is set by an axis before this one too, for a trial that has both", axis.place, own.key), "make the conditions exclude each other");
          settings.push_back(own);
        }
        next.push_back(std::move(settings));
      }
    }
    points = std::move(next);
  }

  const TomlNode base = parse_toml(read_config_text(sweep.base), sweep.base.string());
  std::vector<int64_t> seeds = sweep.config.seeds.empty() ? std::vector<int64_t>{-1} : sweep.config.seeds;
  std::vector<Trial> trials;
  std::set<std::string> names;
  for (const auto& settings : points)
    for (const int64_t seed : seeds) {
      Trial trial{.settings = settings, .seed = std::max<int64_t>(0, seed), .seeded = seed >= 0};
      TomlNode tree = base;
      Issues issues;
      for (const Setting& set : sweep.sets) apply_set(tree, set.text(), issues);
      for (const Setting& set : settings) apply_set(tree, set.text(), issues);
      if (trial.seeded) apply_set(tree, fmt::format("training.seed={}", seed), issues);
      issues.raise();
      std::vector<std::string> lines;
      for (const auto& [key, node] : tree.entries)
        if (key != "run") flatten(node, key, lines);
      std::sort(lines.begin(), lines.end());
      Fingerprint digest;
      for (const std::string& line : lines) digest.add(line), digest.add("\n");
      digest.add(static_cast<uint64_t>(sweep.config.ranks));
      if (sweep.match) {
        digest.add(fmt::format("match {} {} {}", sweep.match->of, sweep.match->target.value_or(0), sweep.match->tolerance));
        for (const BendKey& bend : sweep.match->bend) digest.add(fmt::format("{} {} {} {}", bend.key, bend.multiple_of, bend.min, bend.max));
      }
      if (sweep.config.lr_width > 0) digest.add(fmt::format("lr {} {}", sweep.config.lr_rule, sweep.config.lr_width));
      for (const Setting& set : settings) trial.name += name_part(set) + "-";
      if (trial.name.size() > 80) trial.name.resize(80), trial.name += "-";
      if (trial.seeded) trial.name += fmt::format("s{}-", seed);
      trial.name += digest.text().substr(0, 10);
      if (!names.insert(trial.name).second)
        throw Error(ExitCode::kUsage, fmt::format("{}: error: two points of the sweep are the same trial, {}", sweep.file.string(), trial.name), "an axis names a value twice, or a seed is twice in the list");
      trials.push_back(std::move(trial));
    }
  return trials;
}

}  // namespace tessera
