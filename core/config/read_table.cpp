#include "config/read_table.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>

namespace tessera {

namespace {

// `value` as the field's own alternative: integers are taken where numbers are wanted, an empty list is a list of anything.
Value widened(const Field& field, const Value& value) {
  const Value& like = field.default_value;
  if (const auto* v = std::get_if<int64_t>(&value); v && std::holds_alternative<double>(like)) return static_cast<double>(*v);
  if (const auto* v = std::get_if<std::vector<int64_t>>(&value)) {
    if (std::holds_alternative<std::vector<double>>(like)) return std::vector<double>(v->begin(), v->end());
    if (std::holds_alternative<std::vector<std::string>>(like) && v->empty()) return std::vector<std::string>{};
  }
  return value;
}

}  // namespace

std::string join(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& word : words) out += (out.empty() ? "" : ", ") + word;
  return out.empty() ? "none" : out;
}

std::string did_you_mean(const std::string& word, const std::vector<std::string>& known, const char* kind) {
  const std::string near = nearest(word, known);
  return (near.empty() ? "" : fmt::format("did you mean '{}'? ", near)) + fmt::format("{}: {}", kind, join(known));
}

void read_fields(const std::string& path, const TomlNode& node, const Fields& fields, void* values, Issues& issues, const std::vector<std::string>& also) {
  for (const auto& [key, value] : node.entries) {
    if (std::find(also.begin(), also.end(), key) != also.end()) continue;
    const std::string name = path + "." + shorten(toml_key(key));
    const Field* field = fields.find(key);
    if (!field) {
      auto known = fields.keys();
      known.insert(known.end(), also.begin(), also.end());
      issues.add({name, "unknown key", did_you_mean(key, known, "keys"), value.key_place});
      continue;
    }
    if (value.kind != TomlNode::Kind::kValue) {
      issues.add({name, fmt::format("must be {} {}, got {}", std::holds_alternative<int64_t>(field->default_value) ? "an" : "a", type_name(field->default_value), value.describe()), "",
                  value.place});
      continue;
    }
    const Value wide = widened(*field, value.value);
    const std::string rule = broken_rule(*field, wide);
    if (rule.empty()) field->set(values, wide);
    else issues.add({name, rule, "", value.place});
  }
}

void require_fields(const std::string& path, const TomlNode* node, const Fields& fields, const std::string& place, Issues& issues) {
  for (const Field& field : fields.list)
    if (field.required_ && !(node && node->find(field.key)))
      issues.add({path + "." + field.key, "required key is missing", fmt::format("{} = {}: {}", field.key, domain(field), field.doc), place});
}

std::string read_config_text(const std::filesystem::path& file) {
  if (file.empty()) throw Error(ExitCode::kUsage, "the name of the configuration file is empty");
  std::error_code code;
  const auto status = std::filesystem::status(file, code);
  if (std::filesystem::is_directory(status)) throw Error(ExitCode::kUsage, file.string() + ": error: is a folder, not a configuration file");
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status))
    throw Error(ExitCode::kUsage, file.string() + ": error: is a device or pipe, not a configuration file");
  std::ifstream in(file, std::ios::binary);
  if (!in) throw Error(ExitCode::kUsage, file.string() + ": error: the configuration file cannot be opened");
  constexpr size_t kEnough = (1 << 20) + 1;  // what parse_toml refuses
  std::string text(kEnough, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(in.gcount()));
  return text;
}

}  // namespace tessera
