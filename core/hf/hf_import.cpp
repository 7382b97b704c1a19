#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>

#include "checkpoint/file.hpp"
#include "hf/hf_config.hpp"
#include "hf/hf_json.hpp"
#include "hf/hf_words.hpp"

namespace tessera {

namespace {

using nlohmann::json;

std::string short_text(const json& value) {
  std::string text = hf_json_text(value);
  text.pop_back();
  std::erase(text, '\n');
  return shorten(text);
}

bool fits_int64(const json& x) { return x.is_number_integer() && !(x.is_number_unsigned() && x.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)); }

// `json` as the alternative that `like` holds; nullopt when it is of another type.
std::optional<Value> to_value(const json& j, const Value& like) {
  auto list = [&]<class T>(std::vector<T> out, auto one) -> std::optional<Value> {
    if (!j.is_array()) return std::nullopt;
    for (const json& item : j) {
      auto value = one(item);
      if (!value) return std::nullopt;
      out.push_back(*value);
    }
    return Value(std::move(out));
  };
  auto integer = [](const json& x) { return fits_int64(x) ? std::optional(x.get<int64_t>()) : std::nullopt; };
  auto text = [](const json& x) { return x.is_string() ? std::optional(x.get<std::string>()) : std::nullopt; };
  auto wrap = [](auto optional) -> std::optional<Value> { return optional ? std::optional<Value>(*optional) : std::nullopt; };
  if (std::holds_alternative<bool>(like)) return j.is_boolean() ? std::optional<Value>(j.get<bool>()) : std::nullopt;
  if (std::holds_alternative<int64_t>(like)) return wrap(integer(j));
  if (std::holds_alternative<double>(like)) return wrap(hf_number(j));
  if (std::holds_alternative<std::string>(like)) return wrap(text(j));
  if (std::holds_alternative<std::vector<int64_t>>(like)) return list(std::vector<int64_t>(), integer);
  if (std::holds_alternative<std::vector<double>>(like)) return list(std::vector<double>(), hf_number);
  return list(std::vector<std::string>(), text);
}

class Importer {
 public:
  Importer(const std::filesystem::path& file, const Registry& registry, const std::vector<std::string>& waived, std::vector<std::string>& notes)
      : file_(file), registry_(registry), waived_(waived), notes_(notes) {
    constexpr int64_t kMaxBytes = 4 << 20;
    const std::string text = read_file(file, kMaxBytes);
    json_ = parse_hf_json(text, file.string());
    places_ = hf_key_places(text, file.string());
  }

  Config run() {
    check_values(hf::must_be());
    issues_.raise();  // of another model nothing else is worth saying
    Config config;
    config.source = file_.string();
    config.run.name = std::filesystem::absolute(file_).parent_path().filename().string();
    config.run.folder = "runs/" + config.run.name;
    config.model.dialect = hf::kDialect;
    fill(hf::model_fields(), &config.model, "model");
    const std::string main = stack(hf::kPatternKeys, true);
    config.model.hybrid_override_pattern = main + head_stack();
    check_num_layers(static_cast<int64_t>(main.size()));
    issues_.raise();
    std::vector<PatternProblem> problems;
    config.pattern = parse_pattern(config.model.hybrid_override_pattern, problems);
    for (const PatternProblem& problem : problems) issue(pattern_key_, problem.rule);
    bind(config);
    unknown_keys();
    issues_.raise();
    check(config);
    tell();
    return config;
  }

 private:
  std::string place(const std::string& key) const {
    const auto found = places_.find(key);
    return found == places_.end() ? file_.string() + ":1:1" : found->second;
  }
  void issue(const std::string& key, const std::string& rule, const std::string& help = {}) { issues_.add({key, rule, help, place(key)}); }

  // Sets the fields that the file speaks of; returns the keys of those it does not.
  std::vector<std::string> fill(const Fields& fields, void* config, const std::string& table) {
    std::vector<std::string> silent;
    for (const Field& field : fields.list) {
      std::string from;
      for (const std::string& key : field.hf_keys_) {
        claimed_.insert(key);
        if (!hf::present(json_, key)) continue;
        used_.insert(key);
        if (!from.empty()) {
          if (json_[key] != json_[from]) issue(key, fmt::format("must equal {}, which means the same, got {} and {}", from, short_text(json_[key]), short_text(json_[from])));
          continue;
        }
        from = key;
        const auto value = to_value(json_[key], field.default_value);
        if (!value) {
          const bool integer = std::holds_alternative<int64_t>(field.default_value);
          issue(key, fmt::format("must be {} {}, got {}", integer ? "an" : "a", integer ? domain(field) : type_name(field.default_value), short_text(json_[key])));
        } else if (const std::string rule = broken_rule(field, *value); !rule.empty()) {
          issue(key, rule);
        } else {
          field.set(config, *value);
        }
      }
      if (!from.empty()) continue;
      if (field.required_ && !field.hf_keys_.empty()) issue(field.hf_keys_.front(), fmt::format("is missing: {}.{} has no default", table, field.key));
      else silent.push_back(field.key);
    }
    return silent;
  }

  ConfigPtr element(const ElementType& type, const std::string& table) {
    ConfigPtr config = type.make_config();
    for (const auto& [key, value] : type.hf().set)
      if (const Field* field = type.fields().find(key)) field->set(config.get(), value);
    const auto silent = fill(type.fields(), config.get(), table);
    check_values(type.hf().must_be);
    silent_.push_back({table, &type, config, silent});
    return config;
  }

  void check_values(const std::vector<std::pair<std::string, Value>>& rules) {
    for (const auto& [key, wanted] : rules) {
      claimed_.insert(key);
      if (!used_.insert(key).second || !hf::present(json_, key)) continue;  // two blocks may have the same rule
      const auto value = to_value(json_[key], wanted);
      if (value && same_value(*value, wanted)) continue;
      issue(key, fmt::format("only {} is supported, got {}", to_toml(wanted), short_text(json_[key])));
    }
  }

  std::string letters(const std::string& key) {
    claimed_.insert(key), used_.insert(key);
    const json& value = json_[key];
    std::string out;
    if (value.is_string()) {
      out = value.get<std::string>();
      for (char letter : out)
        if (letter == '|' || letter == '/') issue(key, fmt::format("HF's patterns hold letters of layers alone, got '{}'", letter));
      return out;
    }
    if (!value.is_array()) {
      issue(key, fmt::format("must be a string of letters or a list of words, got {}", short_text(value)));
      return {};
    }
    for (const json& word : value) {
      const BlockType* type = word.is_string() ? hf::type_of_word(registry_, word.get<std::string>(), json_) : nullptr;
      if (!type) issue(key, fmt::format("no loaded block is called {} in HF's lists", short_text(word)), words());
      else out += hf::letter_of(*type);
    }
    return out;
  }

  std::string words() const {
    std::set<std::string> all;
    for (const BlockType* type : registry_.blocks()) all.insert(type->hf().layer_words.begin(), type->hf().layer_words.end());
    return fmt::format("words of the loaded blocks: {}", fmt::join(all, ", "));
  }

  // The letters of the first spelling that is there; others that are there must say the same.
  template <size_t N>
  std::string stack(const char* const (&keys)[N], bool needed) {
    std::string text, from;
    for (const char* key : keys) {
      claimed_.insert(key);
      if (!hf::present(json_, key)) continue;
      const std::string other = letters(key);
      if (from.empty()) text = other, from = key;
      else if (other != text) issue(key, fmt::format("says '{}' where {} says '{}'", shorten(other), from, shorten(text)));
    }
    if (from.empty() && needed) issue(keys[0], fmt::format("is missing: one of {} must give the layers", fmt::join(keys, ", ")));
    if (needed) pattern_key_ = from;
    return text;
  }

  std::string head_stack() {
    const std::string part = stack(hf::kHeadPatternKeys, false);
    claimed_.insert(hf::kNumHeadSets);
    if (!hf::present(json_, hf::kNumHeadSets)) return {};
    used_.insert(hf::kNumHeadSets);
    const json& sets = json_[hf::kNumHeadSets];
    if (!fits_int64(sets) || sets.get<int64_t>() < 0) {
      issue(hf::kNumHeadSets, fmt::format("must be an integer in [0, 2^63), got {}", short_text(sets)));
      return {};
    }
    num_head_sets_ = sets.get<int64_t>();
    if (num_head_sets_ == 0) return {};
    if (part.empty()) notes_.push_back(fmt::format("{} names no layers of its own: '{}' is meant", hf::kNumHeadSets, hf::kDefaultHeadPattern));
    return "/" + (part.empty() ? hf::kDefaultHeadPattern : part);
  }

  void check_num_layers(int64_t length) {
    claimed_.insert(hf::kNumLayers), used_.insert(hf::kNumLayers);
    if (!hf::present(json_, hf::kNumLayers) || pattern_key_.empty()) return;
    const json& n = json_[hf::kNumLayers];
    if (!fits_int64(n) || n.get<int64_t>() != length)
      issue(hf::kNumLayers, fmt::format("must equal the number of layers of {}, {}, got {}", pattern_key_, length, short_text(n)));
  }

  void bind(Config& config) {
    auto add = [&](const std::vector<PatternLayer>& layers) {
      for (const PatternLayer& layer : layers) {
        if (std::any_of(config.bindings.begin(), config.bindings.end(), [&](const Binding& b) { return b.symbol == layer.symbol; })) continue;
        const BlockType* type = hf::type_of_letter(registry_, layer.symbol, json_);
        if (!type) {
          issue(pattern_key_, fmt::format("no loaded block has the letter '{}' in HF's dialect", layer.symbol), letters_help());
          continue;
        }
        const std::string name(type->type());
        config.bindings.push_back({.symbol = layer.symbol, .name = name, .type = type, .config = element(*type, "blocks." + name)});
      }
    };
    add(config.pattern.main);
    add(config.pattern.head);
    if (!config.pattern.has_head) return;
    if (registry_.heads().empty()) return issue(hf::kNumHeadSets, "needs a head, and no loaded plugin has one");
    const HeadType* type = registry_.heads().front();
    const std::string name(type->type());
    const ConfigPtr head = element(*type, "heads." + name);
    if (const Field* depths = type->fields().find("depths")) {
      depths->set(head.get(), Value(num_head_sets_));
      if (const std::string rule = broken_rule(*depths, Value(num_head_sets_)); !rule.empty()) issue(hf::kNumHeadSets, rule);
    }
    config.head = HeadBinding{.name = name, .type = type, .config = head};
  }

  std::string letters_help() const {
    std::vector<std::string> all;
    for (const BlockType* type : registry_.blocks())
      if (const char letter = hf::letter_of(*type)) all.push_back(fmt::format("'{}' {}", letter, type->type()));
    return fmt::format("loaded blocks: {}", fmt::join(all, ", "));
  }

  // Sorts the remaining keys into those that change nothing and those that nobody knows.
  void unknown_keys() {
    std::set<std::string> known(std::begin(hf::kKept), std::end(hf::kKept)), inert(std::begin(hf::kInert), std::end(hf::kInert));
    auto learn = [&](const ElementType& type) {
      inert.insert(type.hf().inert.begin(), type.hf().inert.end());
      for (const Field& field : type.fields().list) inert.insert(field.hf_keys_.begin(), field.hf_keys_.end());
      for (const auto& [key, value] : type.hf().must_be) inert.insert(key);
    };
    for (const BlockType* type : registry_.blocks()) learn(*type);
    for (const HeadType* type : registry_.heads()) learn(*type);
    std::vector<std::string> all(claimed_.begin(), claimed_.end()), unknown;
    all.insert(all.end(), inert.begin(), inert.end());
    for (const auto& [key, value] : json_.items()) {
      if (used_.contains(key)) continue;
      if (known.contains(key) || key.starts_with(hf::kInertPrefix) || claimed_.contains(key) || inert.contains(key)) {
        if (!known.contains(key)) without_effect_.push_back(key);
      } else if (std::find(waived_.begin(), waived_.end(), key) != waived_.end()) {
        notes_.push_back(fmt::format("waived: {} = {}", key, short_text(value)));
      } else {
        const std::string near = nearest(key, all);
        issue(key, fmt::format("unknown key, got {}", short_text(value)),
              (near.empty() ? "" : fmt::format("did you mean '{}'? ", near)) + fmt::format("to import without it: --waive {}", key));
      }
    }
  }

  void check(const Config& config) {
    Issues found;
    check_config(config, Mesh{}, found);
    for (Issue& found_issue : found.list()) {
      if (found_issue.key == "model.hybrid_override_pattern") found_issue.key = pattern_key_, found_issue.place = place(pattern_key_);
      for (const auto& entry : silent_) {
        if (!found_issue.key.starts_with(entry.table + ".")) continue;
        const Field* field = entry.type->fields().find(found_issue.key.substr(entry.table.size() + 1));
        if (!field || field->hf_keys_.empty()) continue;
        for (const std::string& key : field->hf_keys_)
          if (hf::present(json_, key)) found_issue.key = fmt::format("{} ({})", key, found_issue.key), found_issue.place = place(key);
        break;
      }
      if (found_issue.place.empty()) found_issue.place = file_.string() + ":1:1";
      issues_.add(std::move(found_issue));
    }
    issues_.raise();
  }

  void tell() {
    if (!without_effect_.empty()) notes_.push_back(fmt::format("kept, without effect: {}", fmt::join(without_effect_, ", ")));
    for (const auto& entry : silent_) {
      std::vector<std::string> values;
      for (const std::string& key : entry.silent) {
        const Field& field = *entry.type->fields().find(key);
        values.push_back(fmt::format("{} = {}", key, to_toml(field.get(entry.config.get()))));
      }
      if (!values.empty()) notes_.push_back(fmt::format("not in the file, chosen here: {}: {}", entry.table, fmt::join(values, ", ")));
    }
  }

  struct Element {
    std::string table;
    const ElementType* type;
    ConfigPtr config;
    std::vector<std::string> silent;
  };

  std::filesystem::path file_;
  const Registry& registry_;
  const std::vector<std::string>& waived_;
  std::vector<std::string>& notes_;
  json json_;
  std::map<std::string, std::string> places_;
  Issues issues_;
  std::set<std::string> used_, claimed_;  // keys whose value was taken; keys that a used table knows
  std::vector<std::string> without_effect_;
  std::vector<Element> silent_;
  std::string pattern_key_;
  int64_t num_head_sets_ = 0;
};

}  // namespace

Config import_hf_config(const std::filesystem::path& config_json, const Registry& registry, const std::vector<std::string>& waived,
                        std::vector<std::string>& notes) {
  return Importer(config_json, registry, waived, notes).run();
}

}  // namespace tessera
