// TOML -> Config.
#include "config/config.hpp"

#include <algorithm>
#include <fstream>
#include <set>

#include <fmt/format.h>

#include "config/read_table.hpp"

namespace tessera {

namespace {
using Kind = TomlNode::Kind;

class Loader {
 public:
  Loader(TomlNode root, const std::string& name, const Registry& registry, Issues issues) : root_(std::move(root)), registry_(registry), issues_(std::move(issues)) {
    config_.source = name;
  }

  Config load() {
    check_top_level();
    for (const ConfigTable& table : config_tables()) read_core(table);
    read_mixture();
    set_run_defaults();
    std::vector<PatternProblem> problems;
    config_.pattern = parse_pattern(config_.model.hybrid_override_pattern, problems);
    read_elements("blocks", blocks_);
    read_elements("heads", heads_);
    read_symbols();
    const TomlNode* model = table("model");
    if (model && model->find("hybrid_override_pattern") && !has_issue(kPatternKey)) check_pattern(config_.model.hybrid_override_pattern, kPatternKey, issues_);
    bind_layers();
    bind_head();
    check_block_types();
    check_config(config_, make_mesh(config_.parallelism), issues_);
    if (table("data") && !has_data(config_)) check_default_data();
    for (Issue& issue : issues_.list())
      if (issue.place.empty()) issue.place = place_of(issue.key);
    issues_.raise();
    return std::move(config_);
  }

 private:
  // One table below [blocks] or [heads].
  struct Element {
    std::string name;
    const ElementType* type = nullptr;  // nullptr: unknown, and already reported
    ConfigPtr config;
    const TomlNode* node = nullptr;
    bool required = false;              // its required keys have been asked for
  };
  struct SymbolEntry {
    std::string block;
    bool shared = false;
  };

  void add(std::string key, std::string rule, std::string help, std::string place) {
    issues_.add({std::move(key), std::move(rule), std::move(help), std::move(place)});
  }

  bool has_issue(const std::string& key) const {
    return std::any_of(issues_.list().begin(), issues_.list().end(), [&](const Issue& issue) { return issue.key == key; });
  }

  std::string place_of(const std::string& key) const {
    const TomlNode& node = root_.at(key);
    // A block without a table is there because of the pattern.
    const bool absent = &node == &root_ || (key.starts_with("blocks.") && &node == root_.find("blocks")) || (key.starts_with("heads.") && &node == root_.find("heads"));
    if (absent && (key.starts_with("blocks.") || key.starts_with("heads."))) return root_.at("model.hybrid_override_pattern").place;
    return absent ? root_.place : node.place;
  }

  void check_top_level() {
    std::vector<std::string> known{"symbols", "blocks", "heads"};
    for (const ConfigTable& table : config_tables())
      if (table.name.find('.') == std::string::npos) known.push_back(table.name);
    for (const auto& [key, node] : root_.entries) {
      if (std::find(known.begin(), known.end(), key) == known.end()) add(shorten(toml_key(key)), "unknown table", did_you_mean(key, known, "tables"), node.key_place);
      else if (node.kind != Kind::kTable) add(key, "must be a table, got " + node.describe(), fmt::format("[{}]", key), node.place);
    }
  }

  const TomlNode* table(const std::string& name) const {
    const TomlNode* node = &root_;
    for (size_t begin = 0; node && node->kind == Kind::kTable && begin <= name.size();) {
      const size_t end = std::min(name.find('.', begin), name.size());
      node = node->find(name.substr(begin, end - begin));
      begin = end + 1;
    }
    return node && node->kind == Kind::kTable ? node : nullptr;
  }

  void read_fields(const std::string& path, const TomlNode& node, const Fields& fields, void* values, const std::vector<std::string>& also = {}) {
    tessera::read_fields(path, node, fields, values, issues_, also);
  }
  void require(const std::string& path, const TomlNode* node, const Fields& fields, const std::string& place) { tessera::require_fields(path, node, fields, place, issues_); }

  void read_core(const ConfigTable& core) {
    const TomlNode* node = table(core.name);
    void* values = core.of(config_);
    if (node) {
      read_fields(core.name, *node, core.fields, values, core.name == "data" ? std::vector<std::string>{"mixture", "task"} : std::vector<std::string>{});
      for (const auto& [key, value] : node->entries)
        if (const std::string why = no_effect(config_, core.name, key); !why.empty()) add(core.name + "." + key, why, "remove it", value.key_place);
    }
    if (node || !root_.find(core.name)) require(core.name, node, core.fields, node ? node->place : root_.place);
  }

  void read_mixture() {
    const TomlNode* data = table("data");
    if (const TomlNode* task = data ? data->find("task") : nullptr; task && task->kind != Kind::kTable)
      add("data.task", "must be a table, got " + task->describe(), "[data.task]", task->place);
    const TomlNode* list = data ? data->find("mixture") : nullptr;
    if (!list) return;
    if (list->kind != Kind::kTables) {
      add("data.mixture", "must be an array of tables, got " + list->describe(), "[[data.mixture]]", list->place);
      return;
    }
    const auto schema = data_component_schema();
    for (size_t i = 0; i < list->entries.size(); ++i) {
      DataComponent& component = config_.data.mixture.emplace_back();
      read_fields(fmt::format("data.mixture[{}]", i), list->entries[i].node, schema, &component);
    }
  }

  // A [data] table that says nothing but defaults is meant all the same.
  void check_default_data() {
    for (const Issue& issue : issues_.list())
      if (issue.key.starts_with("data.")) return;
    Issues own;
    check_data(config_.data, own);
    for (const Issue& issue : own.list()) issues_.add("data." + issue.key, issue.rule, issue.help);
  }

  void set_run_defaults() {
    if (config_.run.name.empty()) config_.run.name = std::filesystem::path(config_.source).stem().string();
    if (config_.run.folder.empty()) config_.run.folder = "runs/" + config_.run.name;
  }

  const ElementType* find_type(const std::string& kind, const std::string& type) const {
    if (kind == "blocks") return registry_.block(type);
    return registry_.head(type);
  }
  std::vector<std::string> type_names(const std::string& kind) const {
    std::vector<std::string> names;
    if (kind == "blocks") for (const BlockType* t : registry_.blocks()) names.emplace_back(t->type());
    else for (const HeadType* t : registry_.heads()) names.emplace_back(t->type());
    return names;
  }

  // Every table below [blocks] or [heads], used or not.
  void read_elements(const std::string& kind, std::vector<Element>& elements) {
    const TomlNode* all = table(kind);
    if (!all) return;
    const char* noun = kind == "blocks" ? "block" : "head";
    for (const auto& [name, node] : all->entries) {
      const std::string path = kind + "." + shorten(toml_key(name));
      Element element{.name = name, .node = &node};
      if (node.kind != Kind::kTable) {
        add(path, "must be a table, got " + node.describe(), fmt::format("[{}]", path), node.place);
        elements.push_back(element);
        continue;
      }
      const TomlNode* type = node.find("type");
      const std::string* word = type && type->kind == Kind::kValue ? std::get_if<std::string>(&type->value) : nullptr;
      if (type && !word) add(path + ".type", "must be a string, got " + type->describe(), fmt::format("{} types: {}", noun, join(type_names(kind))), type->place);
      const std::string wanted = word ? *word : name;
      if (!type || word) element.type = find_type(kind, wanted);
      if (element.type) {
        element.config = element.type->make_config();
        read_fields(path, node, element.type->fields(), element.config.get(), {"type"});
      } else if (word) {
        add(path + ".type", fmt::format("unknown {} type {}", noun, shorten(to_toml(Value(wanted)))), did_you_mean(wanted, type_names(kind), "loaded types"), type->place);
      } else if (!type) {
        add(path, fmt::format("unknown {} type", noun), did_you_mean(wanted, type_names(kind), "loaded types") + "; a variant says `type = \"...\"`", node.place);
      }
      elements.push_back(element);
    }
  }

  Element* find(std::vector<Element>& elements, const std::string& name) {
    const auto at = std::find_if(elements.begin(), elements.end(), [&](const Element& e) { return e.name == name; });
    return at == elements.end() ? nullptr : &*at;
  }

  // The element of this name, made with defaults when it has no table and its name is a type. Asks for its required keys.
  Element* use(const std::string& kind, std::vector<Element>& elements, const std::string& name) {
    Element* element = find(elements, name);
    if (!element) {
      const ElementType* type = find_type(kind, name);
      if (!type) return nullptr;
      element = &elements.emplace_back(Element{.name = name, .type = type, .config = type->make_config()});
    }
    if (element->type && !element->required) {
      const std::string path = kind + "." + toml_key(name);
      require(path, element->node, element->type->fields(), element->node ? element->node->place : place_of(path));
    }
    element->required = true;
    return element;
  }

  void read_symbols() {
    const TomlNode* node = table("symbols");
    if (!node) return;
    Schema<SymbolEntry> schema;
    schema.field("block", &SymbolEntry::block, "name below [blocks]").required();
    schema.field("shared", &SymbolEntry::shared, "all layers of the letter use one set of weights");
    for (const auto& [key, value] : node->entries) {
      const std::string path = "symbols." + shorten(toml_key(key));
      std::vector<PatternProblem> problems;
      const Pattern letter = parse_pattern(key, problems);
      if (!problems.empty() || letter.main.size() != 1 || letter.num_stages != 1 || letter.has_head) {
        add(path, "a symbol must be one printable ASCII character other than '|' and '/'", "", value.key_place);
        continue;
      }
      SymbolEntry entry;
      if (value.kind == Kind::kTable) {
        read_fields(path, value, schema, &entry);
        require(path, &value, schema, value.place);
      } else if (const auto* word = value.kind == Kind::kValue ? std::get_if<std::string>(&value.value) : nullptr) {
        entry.block = *word;
      } else {
        add(path, "must be a string or { block = \"...\", shared = true }, got " + value.describe(), "", value.place);
      }
      if (!entry.block.empty() && !find(blocks_, entry.block) && !registry_.block(entry.block)) {
        add(path, fmt::format("no block {}", shorten(to_toml(Value(entry.block)))), did_you_mean(entry.block, block_names(), "blocks"), value.place);
        entry.block.clear();
      }
      symbols_.emplace_back(key[0], entry);
    }
  }

  // Names that a binding may have: tables below [blocks], then loaded types.
  std::vector<std::string> block_names() const {
    std::vector<std::string> names;
    for (const Element& e : blocks_)
      if (e.type) names.push_back(e.name);
    for (const std::string& type : type_names("blocks"))
      if (std::find(names.begin(), names.end(), type) == names.end()) names.push_back(type);
    return names;
  }

  // Types that claim `symbol` in the model's dialect.
  std::vector<std::pair<const BlockType*, const Symbol*>> claims(char symbol) const {
    std::vector<std::pair<const BlockType*, const Symbol*>> out;
    for (const BlockType* type : registry_.blocks())
      for (const Symbol& s : type->info().symbols)
        if (s.dialect && s.symbol == symbol && config_.model.dialect == s.dialect) out.emplace_back(type, &s);
    return out;
  }

  // `'*' gqa, 'M' mamba2`: what the letters of the file's dialect and of [symbols] mean.
  std::string legend() const {
    std::map<char, std::string> bound;
    for (const BlockType* type : registry_.blocks())
      for (const Symbol& s : type->info().symbols)
        if (s.dialect && config_.model.dialect == s.dialect) bound[s.symbol] += (bound[s.symbol].empty() ? "" : " or ") + std::string(type->type());
    for (const auto& [symbol, entry] : symbols_)
      if (!entry.block.empty()) bound[symbol] = entry.block;
    std::vector<std::string> words;
    for (const auto& [symbol, name] : bound) words.push_back(fmt::format("'{}' {}", symbol, name));
    return join(words);
  }

  // The block that the dialect gives the letter: the claimant that has a table, else the one without a condition. "" after an issue.
  std::string name_in_dialect(const PatternLayer& layer) {
    const std::string where = fmt::format("'{}' at position {}", layer.symbol, layer.position);
    const std::string shown = "\n" + show_position(config_.pattern.text, layer.position);
    const auto all = claims(layer.symbol);
    if (all.empty()) {
      add(kPatternKey, fmt::format("unknown symbol {}{}", where, shown), "bound symbols: " + legend(), place_of(kPatternKey));
      return {};
    }
    std::vector<std::string> names, with_table, plain;
    for (const auto& [type, symbol] : all) {
      names.emplace_back(type->type());
      if (const TomlNode* tables = table("blocks"); tables && tables->find(type->type())) with_table.emplace_back(type->type());
      if (!symbol->when) plain.emplace_back(type->type());
    }
    if (with_table.size() == 1) return with_table[0];
    if (with_table.empty() && plain.size() == 1) return plain[0];
    if (names.size() == 1) return names[0];
    add(kPatternKey, fmt::format("symbol {} may mean {}{}", where, join(names), shown),
        fmt::format("say which in [symbols]: {} = \"{}\"", toml_key(std::string(1, layer.symbol)), names[0]), place_of(kPatternKey));
    return {};
  }

  void bind_layers() {
    std::set<char> seen;
    for (const auto* layers : {&config_.pattern.main, &config_.pattern.head}) {
      for (const PatternLayer& layer : *layers) {
        if (!seen.insert(layer.symbol).second) continue;
        const auto entry = std::find_if(symbols_.begin(), symbols_.end(), [&](const auto& s) { return s.first == layer.symbol; });
        const std::string name = entry != symbols_.end() ? entry->second.block : name_in_dialect(layer);
        const Element* element = name.empty() ? nullptr : use("blocks", blocks_, name);
        if (element && element->type)
          config_.bindings.push_back({layer.symbol, name, static_cast<const BlockType*>(element->type), element->config, entry != symbols_.end() && entry->second.shared});
      }
    }
  }

  void bind_head() {
    if (!config_.pattern.has_head) return;
    const std::string place = place_of(kPatternKey);
    const auto types = type_names("heads");
    std::string name;
    if (heads_.size() == 1) name = heads_[0].name;
    else if (heads_.empty() && types.size() == 1) name = types[0];
    else if (heads_.empty() && types.empty()) add(kPatternKey, "the '/' part needs a head, and no head type is loaded", "", place);
    else if (heads_.empty()) add(kPatternKey, "the '/' part may mean several heads", fmt::format("add the table of one: [heads.{}]; loaded types: {}", types[0], join(types)), place);
    else add(kPatternKey, fmt::format("the '/' part takes one head, got the tables of {}", heads_.size()), "keep one table below [heads]", place);
    if (name.empty()) return;
    if (const Element* head = use("heads", heads_, name); head && head->type) config_.head = {name, static_cast<const HeadType*>(head->type), head->config};
  }

  void check_block_types() {
    const auto names = block_names();
    for (const std::string& word : config_.activation_checkpoint.block_types)
      if (std::find(names.begin(), names.end(), word) == names.end())
        add("activation_checkpoint.block_types", fmt::format("no block {}", shorten(to_toml(Value(word)))), did_you_mean(word, names, "blocks"), "");
  }

  static constexpr const char* kPatternKey = "model.hybrid_override_pattern";
  TomlNode root_;
  const Registry& registry_;
  Issues issues_;
  Config config_;
  std::vector<Element> blocks_, heads_;
  std::vector<std::pair<char, SymbolEntry>> symbols_;
};

}  // namespace

std::vector<std::string> plugin_paths(const std::filesystem::path& file, const std::vector<std::string>& sets) {
  TomlNode root = parse_toml(read_config_text(file), file.string());
  Issues ignored;  // reported by load_config, which reads the file again with the blocks known
  for (const std::string& set : sets) apply_set(root, set, ignored);
  const TomlNode& paths = root.at("plugins.paths");
  const auto* list = paths.kind == Kind::kValue ? std::get_if<std::vector<std::string>>(&paths.value) : nullptr;
  return list ? *list : std::vector<std::string>{};
}

Config load_config(const std::filesystem::path& file, const std::vector<std::string>& sets, const Registry& registry) {
  return parse_config(read_config_text(file), file.string(), sets, registry);
}

Config parse_config(const std::string& toml, const std::string& name, const std::vector<std::string>& sets, const Registry& registry) {
  TomlNode root = parse_toml(toml, name);
  Issues issues;
  for (const std::string& set : sets) apply_set(root, set, issues);
  return Loader(std::move(root), name, registry, std::move(issues)).load();
}

}  // namespace tessera
