// Config -> TOML.
#include <set>

#include <fmt/format.h>

#include "config/config.hpp"
#include "config/toml_tree.hpp"

namespace tessera {

namespace {
std::string entries(const Fields& fields, const void* values) {
  std::string out;
  for (const Field& field : fields.list) out += fmt::format("{} = {}\n", toml_key(field.key), to_toml(field.get(values)));
  return out;
}

std::string element(const char* kind, const std::string& name, const ElementType& type, const ConfigPtr& config) {
  std::string out = fmt::format("\n[{}.{}]\n", kind, toml_key(name));
  if (name != type.type()) out += fmt::format("type = {}\n", to_toml(Value(std::string(type.type()))));
  return out + entries(type.fields(), config.get());
}
}  // namespace

std::string to_toml(const Config& config) {
  std::string out;
  for (const ConfigTable& table : config_tables()) {
    if (table.name == "data" && !has_data(config)) continue;
    const void* values = table.of(const_cast<Config&>(config));
    std::string lines;
    for (const Field& field : table.fields.list)
      if (no_effect(config, table.name, field.key).empty()) lines += fmt::format("{} = {}\n", toml_key(field.key), to_toml(field.get(values)));
    if (!lines.empty()) out += fmt::format("{}[{}]\n{}", out.empty() ? "" : "\n", table.name, lines);
    if (table.name != "data") continue;
    for (const DataComponent& component : config.data.mixture) out += "\n[[data.mixture]]\n" + entries(data_component_schema(), &component);
  }
  if (!config.bindings.empty()) out += "\n[symbols]\n";
  for (const Binding& b : config.bindings) {
    const std::string name = to_toml(Value(b.name));
    out += fmt::format("{} = {}\n", toml_key(std::string(1, b.symbol)), b.shared ? fmt::format("{{ block = {}, shared = true }}", name) : name);
  }
  std::set<std::string> seen;
  for (const Binding& b : config.bindings)
    if (seen.insert(b.name).second) out += element("blocks", b.name, *b.type, b.config);
  if (config.head) out += element("heads", config.head->name, *config.head->type, config.head->config);
  return out;
}

}  // namespace tessera
