#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>

#include "hf/hf_config.hpp"
#include "hf/hf_json.hpp"
#include "hf/hf_words.hpp"

namespace tessera {

namespace {

using nlohmann::json;

json to_json(const Value& value) {
  return std::visit(
      [](const auto& v) -> json {
        using T = std::decay_t<decltype(v)>;
        if constexpr (std::is_same_v<T, double>) {
          return hf_json_number(v);
        } else if constexpr (std::is_same_v<T, std::vector<double>>) {
          json out = json::array();
          for (double x : v) out.push_back(hf_json_number(x));
          return out;
        } else {
          return v;
        }
      },
      value);
}

// 1 and 1.0, and the spellings of infinity, are the same value.
bool same_meaning(const json& a, const json& b) {
  const auto x = hf_number(a), y = hf_number(b);
  if (x && y) return *x == *y;
  if (!a.is_array() || !b.is_array()) return a == b;
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const json& p, const json& q) { return same_meaning(p, q); });
}

class Exporter {
 public:
  Exporter(const Config& config, const Registry& registry, const json* source, std::vector<std::string>& notes)
      : config_(config), registry_(registry), notes_(notes), out_(source ? *source : json::object()), fresh_(!source) {}

  json run() {
    if (fresh_) out_["model_type"] = hf::kModelType, out_["architectures"] = {"NemotronHForCausalLM"};
    for (const Field& field : hf::model_fields().list) write(field, field.get(&config_.model), "model." + field.key);
    for (const Binding& binding : config_.bindings) element(*binding.type, binding.config, "blocks." + binding.name);
    for (const Binding& binding : config_.bindings) claim(binding);
    stacks();
    head();
    issues_.raise();
    return std::move(out_);
  }

 private:
  void issue(const std::string& key, const std::string& rule, const std::string& help = {}) { issues_.add(key, rule + ", which HF's config.json cannot say", help); }

  // Under the spellings that the source used, or the first.
  void write(const Field& field, const Value& value, const std::string& name) {
    const json text = to_json(value);
    std::vector<std::string> keys;
    for (const std::string& key : field.hf_keys_)
      if (hf::present(out_, key)) keys.push_back(key);
    if (keys.empty()) keys.push_back(field.hf_keys_.front());
    for (const std::string& key : keys) {
      const auto [owner, first] = owners_.emplace(key, name);
      if (hf::present(out_, key) && same_meaning(out_[key], text)) continue;
      if (first) out_[key] = text;
      else issue(name, fmt::format("is {} where {} is {}, and '{}' means both", to_toml(value), owner->second, hf_json_text(out_[key]), key));
    }
  }

  void element(const ElementType& type, const ConfigPtr& config, const std::string& table) {
    const auto& set = type.hf().set;
    for (const Field& field : type.fields().list) {
      const std::string name = table + "." + field.key;
      const Value value = field.get(config.get());
      const auto meant = std::find_if(set.begin(), set.end(), [&](const auto& entry) { return entry.first == field.key; });
      const Value& usual = meant == set.end() ? field.default_value : meant->second;
      if (!field.hf_keys_.empty()) {
        const bool said = std::any_of(field.hf_keys_.begin(), field.hf_keys_.end(), [&](const std::string& key) { return hf::present(out_, key); });
        // What the source leaves unsaid, or HF always means, is written only where it is another value.
        if ((fresh_ && meant == set.end()) || said || !same_value(value, usual)) write(field, value, name);
      } else if (!same_value(value, usual)) {
        if (hf::unsaid(type, field)) notes_.push_back(fmt::format("left out, HF's results do not depend on it: {} = {}", name, to_toml(value)));
        else issue(name, fmt::format("is {} and not {}", to_toml(value), to_toml(usual)));
      }
    }
    for (const auto& [key, value] : type.hf().must_be)
      if (fresh_ && !same_value(value, int64_t{0})) out_[key] = to_json(value);  // 0 is how a block says null
  }

  // What HF would take the binding's letter for must be the binding.
  void claim(const Binding& binding) {
    const std::string name = "blocks." + binding.name;
    const BlockType& type = *binding.type;
    const char letter = hf::letter_of(type);
    if (!letter || type.hf().layer_words.empty()) return issue(name, fmt::format("is a block of type {}", type.type()));
    if (!type.info().pre_norm || !type.info().residual) return issue(name, fmt::format("is a block of type {} without pre-norm or residual", type.type()));
    const BlockType* read = hf::type_of_letter(registry_, letter, out_);
    if (read != &type) issue(name, fmt::format("is a {} beside a {}", type.type(), read ? read->type() : "missing plugin"));
    for (const auto* part : {&config_.pattern.main, &config_.pattern.head})
      if (binding.shared && std::count_if(part->begin(), part->end(), [&](const PatternLayer& l) { return l.symbol == binding.symbol; }) > 1)
        issue(name, "shares one set of weights among its layers");
  }

  std::string letters(const std::vector<PatternLayer>& part) const {
    std::string out;
    for (const PatternLayer& layer : part) {
      const char letter = hf::letter_of(*config_.binding(layer.symbol).type);
      out += letter ? letter : '?';
    }
    return out;
  }

  // In every spelling that the source has, or as letters.
  template <size_t N>
  void stack(const char* const (&keys)[N], const std::vector<PatternLayer>& part) {
    const std::string text = letters(part);
    bool found = false;
    for (const char* key : keys) {
      if (!hf::present(out_, key)) continue;
      found = true;
      std::string read;
      if (out_[key].is_array())
        for (const json& word : out_[key]) {
          const BlockType* type = word.is_string() ? hf::type_of_word(registry_, word.get<std::string>(), out_) : nullptr;
          read += type ? hf::letter_of(*type) : '\0';
        }
      else if (out_[key].is_string()) read = out_[key].get<std::string>();
      if (read == text) continue;
      const bool words = out_[key].is_array();
      out_[key] = words ? json::array() : json(text);
      if (words)
        for (const PatternLayer& layer : part) out_[key].push_back(config_.binding(layer.symbol).type->hf().layer_words.at(0));
    }
    if (!found) out_[keys[0]] = text;
  }

  void stacks() {
    if (!issues_.empty()) return;
    stack(hf::kPatternKeys, config_.pattern.main);
    out_[hf::kNumLayers] = static_cast<int64_t>(config_.pattern.main.size());
    if (config_.pattern.num_stages > 1) notes_.push_back("left out: the pattern's pipeline stages '|'");
  }

  void head() {
    if (!config_.head) {
      if (fresh_ || hf::present(out_, hf::kNumHeadSets)) out_[hf::kNumHeadSets] = 0;
      return;
    }
    const HeadType& type = *config_.head->type;
    const std::string table = "heads." + config_.head->name;
    const auto passes = type.passes(config_.head->config);
    int64_t sets = 0;
    for (const HeadPass& pass : passes) sets = std::max(sets, pass.weight_set + 1);
    if (std::all_of(passes.begin(), passes.end(), [](const HeadPass& p) { return p.offset == p.shift + 1; })) element(type, config_.head->config, table);
    else issue(table, fmt::format("is a head of type {}", type.type()));
    if (static_cast<int64_t>(passes.size()) != sets)
      notes_.push_back(fmt::format("left out: {} makes {} passes with {} set of weights, and an import takes as many passes as sets",
                                   table, passes.size(), sets));
    if (!issues_.empty()) return;
    // A source that gave several passes and one set of weights keeps its number.
    const bool kept = hf::present(out_, hf::kNumHeadSets) && out_[hf::kNumHeadSets] == static_cast<int64_t>(passes.size());
    if (!kept) out_[hf::kNumHeadSets] = sets;
    if (letters(config_.pattern.head) != hf::kDefaultHeadPattern || fresh_ || hf::present(out_, hf::kHeadPatternKeys[0]) || hf::present(out_, hf::kHeadPatternKeys[1]))
      stack(hf::kHeadPatternKeys, config_.pattern.head);
  }

  const Config& config_;
  const Registry& registry_;
  std::vector<std::string>& notes_;
  json out_;
  bool fresh_;
  Issues issues_;
  std::map<std::string, std::string> owners_;  // HF key -> who wrote it
};

}  // namespace

json export_hf_config(const Config& config, const Registry& registry, const json* source, std::vector<std::string>& notes) {
  return Exporter(config, registry, source, notes).run();
}

}  // namespace tessera
