#include "config/toml_tree.hpp"

#include <algorithm>
#include <optional>
#include <sstream>

#include <fmt/format.h>

#define TOML_MAX_NESTED_VALUES 16
// toml++ asserts that a key begins with a letter of a key, and reports that same mistake right after: `[|]` must be an error, not an abort.
#undef NDEBUG
#define TOML_ASSERT(expr) static_assert(true)
#include <toml++/toml.h>

namespace tessera {

namespace {
constexpr size_t kMaxBytes = 1 << 20;
// toml++ recurses once a dot and once a bracket, also to destroy what it made: both are bounded before it sees the text.
constexpr int64_t kMaxDots = 200;
constexpr int kMaxDepth = 12;

// Control characters would garble the terminal.
std::string clean(std::string_view text, size_t limit = 160) {
  std::string out;
  for (unsigned char c : text) {
    if (out.size() >= limit && (c & 0xc0) != 0x80) return out + "...";
    out += c < 0x20 || c == 0x7f ? '?' : static_cast<char>(c);
  }
  return out;
}

[[noreturn]] void malformed(const std::string& name, int64_t line, int64_t column, const std::string& what) {
  throw Error(ExitCode::kUsage, fmt::format("{}:{}:{}: error: {}", name, line, column, what));
}

// Follows strings and comments only as far as valid TOML goes: toml++ stops at the first mistake.
void refuse_monsters(std::string_view text, const std::string& name) {
  if (text.size() > kMaxBytes) malformed(name, 1, 1, fmt::format("the file has more than {} bytes: this is no configuration", kMaxBytes));
  const auto triple = [&](size_t at) { return text.substr(at, 3) == std::string(3, text[at]); };
  char quote = 0;
  bool block = false, comment = false;  // block: a string over several lines
  bool value = false, stray = false;  // within a value, not a key; a string that toml++ reads as a part of a number, a date or a word
  char last = '\n';                   // before this character, spaces left out
  std::string open;                   // brackets of the value
  int64_t line = 1, dots = 0;
  size_t line_begin = 0;
  // toml++ 3.3 does not tell some of these from spaces, and has undefined behaviour for others.
  const auto outside_ascii = [&](size_t at) {
    malformed(name, line, static_cast<int64_t>(at - line_begin) + 1, "malformed TOML: a character outside ASCII must stand in a string or a comment");
  };
  for (size_t at = text.starts_with("\xef\xbb\xbf") ? 3 : 0; at < text.size(); ++at) {
    const char c = text[at];
    if (c == '\n') {
      ++line, line_begin = at + 1, dots = 0, comment = false;
      if (!block) quote = 0;
      if (open.empty() && !quote) value = false;
    } else if (comment) {
      continue;
    } else if (quote) {
      if (c == '\\' && quote == '"' && at + 1 < text.size() && text[at + 1] != '\n') ++at;
      else if (c == quote && (!block || triple(at))) {
        if (block) for (at += 2; at + 1 < text.size() && text[at + 1] == quote;) ++at;  // quotes before the closing three belong to the string
        quote = 0, block = false;
      } else if (stray && static_cast<unsigned char>(c) >= 0x80) {
        outside_ascii(at);
      }
    } else if (c == '"' || c == '\'') {
      quote = c, block = triple(at);
      if (block) at += 2;
      stray = value && last != '=' && last != '[' && last != ',';
      last = c;
    } else if (c == '#') {
      comment = true;
    } else if (static_cast<unsigned char>(c) >= 0x80) {
      outside_ascii(at);
    } else {
      if (c == '=') value = true;
      else if (value && (c == '[' || c == '{')) open += c, value = c == '[';
      else if (!open.empty() && (c == ']' || c == '}')) open.pop_back(), value = true;
      else if (!open.empty() && c == ',') value = open.back() == '[';
      if (c != ' ' && c != '\t' && c != '\r') last = c;
      if (c == '=' || c == ',' || c == '[' || c == '{') dots = 0;
      if (c == '.' && ++dots > kMaxDots) malformed(name, line, 1, fmt::format("more than {} dots in one key or value", kMaxDots));
    }
  }
}

class Reader {
 public:
  explicit Reader(std::string set) : set_(std::move(set)) {}

  TomlNode table(const toml::table& from, int depth) const {
    TomlNode node;
    node.place = place(from.source());
    if (depth > kMaxDepth) throw Error(ExitCode::kUsage, node.place + ": error: tables are nested too deeply");
    for (const auto& [key, value] : from) {
      TomlNode child = read(value, depth + 1);
      child.key_place = place(key.source());
      node.entries.push_back({std::string(key.str()), std::move(child)});
    }
    return node;
  }

 private:
  std::string place(const toml::source_region& region) const {
    if (!set_.empty()) return set_;
    const std::string name = region.path ? *region.path : "";
    return fmt::format("{}:{}:{}", name, std::max<int64_t>(1, region.begin.line), std::max<int64_t>(1, region.begin.column));
  }

  TomlNode read(const toml::node& from, int depth) const {
    if (const auto* inner = from.as_table()) return table(*inner, depth);
    TomlNode node;
    node.kind = TomlNode::Kind::kValue;
    node.place = place(from.source());
    if (depth > kMaxDepth) throw Error(ExitCode::kUsage, node.place + ": error: values are nested too deeply");
    if (const auto* v = from.as_boolean()) node.value = v->get();
    else if (const auto* v = from.as_integer()) node.value = v->get();
    else if (const auto* v = from.as_floating_point()) node.value = v->get();
    else if (const auto* v = from.as_string()) node.value = v->get();
    else if (const auto* v = from.as_array()) array(*v, node, depth);
    else {
      std::ostringstream text;
      from.visit([&](const auto& v) { text << v; });
      node.kind = TomlNode::Kind::kOther;
      node.text = "the date or time " + clean(text.str());
    }
    return node;
  }

  void array(const toml::array& from, TomlNode& node, int depth) const {
    if (from.is_array_of_tables()) {
      node.kind = TomlNode::Kind::kTables;
      for (const auto& n : from) node.entries.push_back({std::to_string(node.entries.size()), table(*n.as_table(), depth + 1)});
      return;
    }
    for (const auto& n : from) node.entries.push_back({std::to_string(node.entries.size()), read(n, depth + 1)});
    const bool integers = std::all_of(from.begin(), from.end(), [](const toml::node& n) { return n.is_integer(); });
    const bool numbers = std::all_of(from.begin(), from.end(), [](const toml::node& n) { return n.is_number(); });
    const bool strings = std::all_of(from.begin(), from.end(), [](const toml::node& n) { return n.is_string(); });
    if (integers) {
      std::vector<int64_t> list;
      for (const auto& n : from) list.push_back(n.as_integer()->get());
      node.value = std::move(list);
    } else if (numbers) {
      std::vector<double> list;
      for (const auto& n : from) list.push_back(*n.value<double>());
      node.value = std::move(list);
    } else if (strings) {
      std::vector<std::string> list;
      for (const auto& n : from) list.push_back(n.as_string()->get());
      node.value = std::move(list);
    } else {
      node.kind = TomlNode::Kind::kOther;
      node.text = "an array of mixed or nested values";
    }
  }

  std::string set_;
};

TomlNode parse(std::string_view text, const std::string& name, const std::string& set) {
  try {
    return Reader(set).table(toml::parse(text, std::string_view(name)), 0);
  } catch (const toml::parse_error& error) {
    const auto& at = error.source().begin;
    std::string_view what = error.description();
    if (what.starts_with("Error ")) what.remove_prefix(6);
    malformed(name, std::max<int64_t>(1, at.line), std::max<int64_t>(1, at.column), "malformed TOML: " + clean(what));
  }
}

// `a."b c".d` at the start of `text`, up to the `=`.
std::optional<std::vector<std::string>> split_key(std::string_view text, size_t& at, std::string& rule) {
  std::vector<std::string> parts;
  const auto skip_spaces = [&] { while (at < text.size() && text[at] == ' ') ++at; };
  const auto refuse = [&](std::string why) { rule = std::move(why); return std::nullopt; };
  for (;; ++at) {
    skip_spaces();
    std::string part;
    if (at < text.size() && (text[at] == '"' || text[at] == '\'')) {
      const size_t end = text.find(text[at], at + 1);
      if (end == std::string_view::npos) return refuse("a quote in the key is not closed");
      part = text.substr(at + 1, end - at - 1);
      at = end + 1;
    } else {
      const size_t end = std::min(text.find_first_of(".=", at), text.size());
      part = text.substr(at, end - at);
      at = end;
      while (part.ends_with(' ')) part.pop_back();
    }
    if (part.empty()) return refuse("a part of the key is empty");
    parts.push_back(std::move(part));
    if (parts.size() > kMaxDepth) return refuse("tables are nested too deeply");
    skip_spaces();
    if (at == text.size()) return refuse("must be KEY=VALUE");
    if (text[at] == '=') return parts;
    if (text[at] != '.') return refuse("a key is parts with dots between them");
  }
}

// Puts the keys of `from` over those of `into`; what is no table in both is replaced.
void merge(TomlNode& into, TomlNode from, const std::string& path, Issues& issues) {
  for (TomlEntry& entry : from.entries) {
    const std::string& key = entry.key;
    TomlNode& value = entry.node;
    const std::string name = path.empty() ? toml_key(key) : path + "." + toml_key(key);
    const auto at = std::find_if(into.entries.begin(), into.entries.end(), [&](const TomlEntry& e) { return e.key == key; });
    const bool table = value.kind == TomlNode::Kind::kTable;
    if (at == into.entries.end()) {
      into.entries.push_back({key, std::move(value)});
    } else if (at->node.kind == TomlNode::Kind::kTable && table) {
      merge(at->node, std::move(value), name, issues);
    } else if (at->node.kind == TomlNode::Kind::kTable) {
      issues.add({name, fmt::format("is a table, got {}", value.describe()), fmt::format("set one of its keys, as in {}.KEY=VALUE", name), value.place});
    } else {
      at->node = std::move(value);
    }
  }
}
}  // namespace

const TomlNode* TomlNode::find(std::string_view key) const {
  for (const auto& [name, node] : entries)
    if (name == key) return &node;
  return nullptr;
}

const TomlNode& TomlNode::at(std::string_view path) const {
  if (path.empty()) return *this;
  const size_t end = path[0] == '[' ? path.find(']') + 1 : std::min(path.find_first_of(".["), path.size());
  const std::string_view key = path[0] == '[' ? path.substr(1, end - 2) : path.substr(0, end);
  const TomlNode* child = end > 0 ? find(key) : nullptr;
  if (!child || (kind != Kind::kTable && kind != Kind::kTables)) return *this;
  path.remove_prefix(end);
  if (path.starts_with('.')) path.remove_prefix(1);
  return child->at(path);
}

std::string TomlNode::describe() const {
  if (kind == Kind::kTable) return "a table";
  if (kind == Kind::kTables) return "an array of tables";
  if (kind == Kind::kOther) return text;
  return fmt::format("the {} {}", type_name(value), shorten(to_toml(value)));
}

std::string toml_key(std::string_view key) {
  const bool bare = !key.empty() && std::all_of(key.begin(), key.end(), [](unsigned char c) { return c < 0x80 && (std::isalnum(c) || c == '_' || c == '-'); });
  return bare ? std::string(key) : to_toml(Value(std::string(key)));
}

TomlNode parse_toml(std::string_view text, const std::string& name) {
  refuse_monsters(text, name);
  return parse(text, name, "");
}

void apply_set(TomlNode& root, const std::string& set, Issues& issues) {
  const std::string label = "--set " + (set.empty() ? "\"\"" : clean(set, 80));
  size_t at = 0;
  std::string rule;
  if (set.find('=') == std::string::npos) rule = "must be KEY=VALUE";
  const auto parts = rule.empty() ? split_key(set, at, rule) : std::nullopt;
  if (!parts) {
    issues.add({"--set", rule, "write --set TABLE.KEY=VALUE, as in --set training.steps=100", label});
    return;
  }
  const std::string key = clean(set.substr(0, at), 80);
  std::string value = set.substr(at + 1);
  while (value.starts_with(' ')) value.erase(0, 1);
  while (value.ends_with(' ')) value.pop_back();
  if (value.empty()) {
    issues.add({key, "the value is missing", "an empty string is written \"\"", label});
    return;
  }
  std::string path;
  for (const std::string& part : *parts) path += (path.empty() ? "" : ".") + to_toml(Value(part));
  const auto read = [&](const std::string& text) {
    const std::string line = path + " = " + text;
    refuse_monsters(line, label);
    TomlNode chain = parse(line, label, label);
    const TomlNode* node = &chain;
    for (const std::string& part : *parts) {
      if (node->kind != TomlNode::Kind::kTable || node->entries.size() != 1 || node->entries[0].key != part)
        throw Error(ExitCode::kUsage, label + ": error: more than one value");
      node = &node->entries[0].node;
    }
    return chain;
  };
  // What no TOML value begins with, and what holds no line break, is taken as a string.
  const bool word = value.find_first_of("\n\r") == std::string::npos && std::string_view("\"'[{").find(value[0]) == std::string_view::npos;
  std::optional<TomlNode> chain;
  try {
    chain = read(value);
  } catch (const Error&) {
    if (word) try { chain = read(to_toml(Value(value))); } catch (const Error&) {}
  }
  if (chain) merge(root, std::move(*chain), "", issues);
  else issues.add({key, "the value is no TOML", "a string with special characters is quoted: KEY='\"text\"'", label});
}

}  // namespace tessera
