#include "hf/hf_json.hpp"

#include <fmt/format.h>

#include <cctype>
#include <cmath>

#include "checkpoint/file.hpp"
#include "tessera/error.hpp"
#include "tessera/schema.hpp"

namespace tessera {

namespace {
constexpr std::string_view kNumbers[] = {"-Infinity", "Infinity", "NaN"};
constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";
constexpr const char* kBare = "__bare__";
constexpr const char* kFloat = "__float__";

bool word_char(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

// Replaces the bare words outside strings; everything else, errors included, stays for the parser to judge.
std::string without_bare_numbers(std::string_view text) {
  std::string out;
  bool in_string = false;
  for (size_t i = 0; i < text.size();) {
    if (in_string) {
      if (text[i] == '\\' && i + 1 < text.size()) out += text[i++];
      else if (text[i] == '"') in_string = false;
      out += text[i++];
      continue;
    }
    if (text[i] == '"') in_string = true;
    size_t taken = 0;
    for (std::string_view word : kNumbers) {
      if (text.substr(i, word.size()) != word) continue;
      const bool begins = i == 0 || !word_char(text[i - 1]), ends = i + word.size() == text.size() || !word_char(text[i + word.size()]);
      if (!begins || !ends) continue;
      out += fmt::format("{{\"{}\":\"{}\"}}", kBare, word);
      taken = word.size();
      break;
    }
    if (!taken) out += text[i], taken = 1;
    i += taken;
  }
  return out;
}

const std::string* special(const nlohmann::json& json) {
  if (!json.is_object() || json.size() != 1) return nullptr;
  for (const char* key : {kBare, kFloat})
    if (auto found = json.find(key); found != json.end() && found->is_string()) return found->get_ptr<const std::string*>();
  return nullptr;
}

void append(std::string& out, const nlohmann::json& json, int indent) {
  const std::string line = "\n" + std::string(static_cast<size_t>(indent) + 2, ' '), last = "\n" + std::string(static_cast<size_t>(indent), ' ');
  if (const std::string* word = special(json); word && json.contains(kBare)) {
    out += *word;
  } else if (json.is_object() && !json.empty()) {
    out += '{';
    for (auto item = json.begin(); item != json.end(); ++item) {
      out += (item == json.begin() ? "" : ",") + line + nlohmann::json(item.key()).dump() + ": ";
      append(out, item.value(), indent + 2);
    }
    out += last + "}";
  } else if (json.is_array() && !json.empty()) {
    out += '[';
    for (size_t i = 0; i < json.size(); ++i) {
      out += (i ? "," : "") + line;
      append(out, json[i], indent + 2);
    }
    out += last + "]";
  } else {
    out += json.dump();
  }
}
}  // namespace

nlohmann::json parse_hf_json(std::string_view text, const std::string& place) {
  if (text.starts_with(kByteOrderMark)) text.remove_prefix(kByteOrderMark.size());
  nlohmann::json json;
  try {
    json = strict_json(without_bare_numbers(text), place, 32);
  } catch (const Error& error) {
    throw Error(ExitCode::kUsage, error.message(), error.help());
  }
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (!json.is_object() || text[first] != '{') throw Error(ExitCode::kUsage, fmt::format("{}: must be a JSON object, got {}", place, shorten(std::string(text.substr(first)))));
  return json;
}

nlohmann::json read_hf_json(const std::filesystem::path& file) { return parse_hf_json(read_file(file, int64_t{64} << 20), file.string()); }

std::map<std::string, std::string> hf_key_places(std::string_view text, const std::string& file) {
  std::map<std::string, std::string> places;
  int64_t line = 1, column = 0, depth = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    ++column;
    if (text[i] == '\n') ++line, column = 0;
    if (text[i] == '{' || text[i] == '[') ++depth;
    if (text[i] == '}' || text[i] == ']') --depth;
    if (text[i] != '"') continue;
    size_t end = i + 1;
    while (end < text.size() && text[end] != '"') end += text[end] == '\\' ? 2 : 1;
    const size_t after = text.find_first_not_of(" \t\r\n", end + 1);
    if (depth == 1 && after != std::string_view::npos && text[after] == ':')
      places.emplace(text.substr(i + 1, end - i - 1), fmt::format("{}:{}:{}", file, line, column));
    column += static_cast<int64_t>(end - i);
    i = end;
  }
  return places;
}

std::string hf_json_text(const nlohmann::json& json) {
  std::string out;
  append(out, json, 0);
  return out + "\n";
}

std::optional<double> hf_number(const nlohmann::json& json) {
  if (json.is_number()) return json.get<double>();
  const std::string* word = special(json);
  if (!word) return std::nullopt;
  if (*word == "Infinity") return INFINITY;
  if (*word == "-Infinity") return -INFINITY;
  if (*word == "NaN") return NAN;
  return std::nullopt;
}

nlohmann::json hf_json_number(double value) {
  if (std::isfinite(value)) return value;
  return {{kBare, std::isnan(value) ? "NaN" : value > 0 ? "Infinity" : "-Infinity"}};
}

}  // namespace tessera
