#include "sweep/patterns.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <set>

#include "config/read_table.hpp"
#include "pattern/pattern.hpp"

namespace tessera {

namespace {

using Kind = TomlNode::Kind;
constexpr int64_t kMostPatterns = 10'000;
constexpr int64_t kMostLayers = 10'000;  // of a configuration
constexpr int64_t kMostWeight = 1'000'000;
constexpr const char* kForms = "a table has one of list, ratio, cell, every, insert, replace";

// "file:12:3" -> 12, 3.
std::pair<int64_t, int64_t> line_column(const std::string& place) {
  const size_t second = place.rfind(':'), first = second == std::string::npos || second == 0 ? std::string::npos : place.rfind(':', second - 1);
  if (first == std::string::npos) return {0, 0};
  return {std::atoll(place.c_str() + first + 1), std::atoll(place.c_str() + second + 1)};
}

bool is_letter(std::string_view text) {
  std::vector<PatternProblem> problems;
  const Pattern pattern = parse_pattern(text, problems);
  return problems.empty() && text.size() == 1 && pattern.main.size() == 1;
}

int64_t num_layers(std::string_view text) {
  return static_cast<int64_t>(std::count_if(text.begin(), text.end(), [](char c) { return c != '|' && c != '/'; }));
}

size_t head_begin(std::string_view text) { return std::min(text.find('/'), text.size()); }

class Reader {
 public:
  Reader(Issues& issues, std::string path, std::string place) : issues_(issues), path_(std::move(path)), place_(std::move(place)) {}

  void read(const std::string& path, const TomlNode& node) {
    const auto* text = node.kind == Kind::kValue ? std::get_if<std::string>(&node.value) : nullptr;
    const bool array = node.kind == Kind::kTables || (node.kind == Kind::kOther && !node.entries.empty()) || (node.kind == Kind::kValue && node.value.index() > Value(std::string()).index());
    if (text) add(path, node.place, *text, "");
    else if (node.kind == Kind::kTable) read_generator(path, node);
    else if (!array) issue(path, "must be a pattern, a table that makes patterns, or an array of both, got " + node.describe(), kForms, node.place);
    else if (node.entries.empty()) issue(path, "is empty: the sweep would have no trials", "remove the axis, or name a pattern", node.place);
    for (size_t i = 0; array && i < node.entries.size() && !full_; ++i) {
      const TomlNode& element = node.entries[i].node;
      const std::string name = fmt::format("{}[{}]", path, i);
      if (element.kind == Kind::kTable || (element.kind == Kind::kValue && std::holds_alternative<std::string>(element.value))) read(name, element);
      else issue(name, "must be a pattern or a table that makes patterns, got " + element.describe(), kForms, element.place);
    }
  }

  SweptPatterns take() {
    constexpr size_t kShown = 8;
    for (size_t i = 0; i < std::min(kShown, repeated_.size()); ++i) out_.notes.push_back(fmt::format("{}: {} is made {} times and kept once", path_, shown(repeated_[i].first), repeated_[i].second));
    if (repeated_.size() > kShown) out_.notes.push_back(fmt::format("{}: so are {} more", path_, repeated_.size() - kShown));
    return std::move(out_);
  }

 private:
  void issue(std::string key, std::string rule, std::string help, std::string place) { issues_.add({std::move(key), std::move(rule), std::move(help), std::move(place)}); }

  static std::string shown(const std::string& pattern) { return shorten(to_toml(Value(pattern))); }

  // Whether the pattern is one; tells each problem of it.
  bool sound(const std::string& key, const std::string& place, const std::string& text) {
    Issues own;
    check_pattern(text, key, own);
    if (const int64_t layers = num_layers(text); layers > kMostLayers) own.add(key, fmt::format("must have at most {} layers, got {}", kMostLayers, layers));
    for (Issue& each : own.list()) each.place = place, issues_.add(each);
    return own.empty();
  }

  void add(const std::string& key, const std::string& place, const std::string& text, const std::string& dialect) {
    if (full_ || !sound(key, place, text)) return;
    if (!seen_.insert(dialect + " " + text).second) {
      const auto at = std::find_if(repeated_.begin(), repeated_.end(), [&](const auto& r) { return r.first == text; });
      if (at == repeated_.end()) repeated_.emplace_back(text, 2);
      else ++at->second;
      return;
    }
    if (static_cast<int64_t>(out_.list.size()) == kMostPatterns) {
      full_ = true;
      return issue(path_, fmt::format("makes more than {} patterns", kMostPatterns), "split the sweep", place_);
    }
    out_.list.push_back({text, dialect});
  }

  void read_generator(const std::string& path, const TomlNode& node) {
    PatternGenerator g;
    const auto schema = pattern_schema();
    const size_t before = issues_.list().size();
    read_fields(path, node, schema, &g, issues_, {"ratio", "every", "at"});
    const std::vector<std::pair<std::string, std::vector<std::string>>> forms{{"list", {}},           {"ratio", {"layers"}},       {"cell", {"repeat"}},
                                                                              {"every", {"base"}},     {"insert", {"base", "at"}}, {"replace", {"base", "by", "at"}}};
    std::string form;
    std::vector<std::string> keys;
    for (const auto& [name, with] : forms) {
      const TomlNode* value = node.find(name);
      if (!value) continue;
      if (!form.empty()) return issue(path, fmt::format("has both {} and {}", form, name), kForms, value->key_place);
      form = name, keys = with;
    }
    if (form.empty() && issues_.list().size() != before) return;  // a misspelt form is told
    if (form.empty()) return issue(path, "says no patterns", kForms, node.place);
    for (const std::string& key : keys)
      if (key != "at" && !node.find(key)) issue(path + "." + key, fmt::format("must stand beside {}", form), "", node.place);
    keys.insert(keys.end(), {form, "dialect"});
    for (const auto& [key, value] : node.entries) {
      const bool known = schema.find(key) || key == "ratio" || key == "every" || key == "at";
      if (known && std::find(keys.begin(), keys.end(), key) == keys.end()) issue(path + "." + key, fmt::format("has no effect beside {}", form), "remove it", value.key_place);
    }
    const auto of = [&](const char* key) -> const TomlNode& { return *node.find(key); };
    const auto literal = [&](const char* key, const std::string& text) {
      if (const TomlNode* value = node.find(key)) letter(path + "." + key, text, value->place);
    };
    if (issues_.list().size() == before) {
      literal("insert", g.insert), literal("replace", g.replace), literal("by", g.by);
      if (node.find("base")) sound(path + ".base", of("base").place, g.base);
      if (form == "cell" && sound(path + ".cell", of("cell").place, g.cell) && num_layers(g.cell) * g.repeat > kMostLayers)
        issue(path + ".repeat", fmt::format("must make at most {} layers, got {} x {}", kMostLayers, g.repeat, num_layers(g.cell)), "", of("repeat").place);
      if (form == "replace" && g.replace == g.by) issue(path + ".by", "must be another letter than replace", "", of("by").place);
    }
    if (issues_.list().size() != before) return;
    if (form == "list" && g.list.empty()) return issue(path + ".list", "is empty: the sweep would have no trials", "remove the axis, or name a pattern", of("list").place);
    for (size_t i = 0; i < g.list.size(); ++i) add(fmt::format("{}.list[{}]", path, i), of("list").entries[i].node.place, g.list[i], g.dialect);
    if (form == "cell") add(path, node.place, repeat_pattern(g.cell, g.repeat), g.dialect);
    if (form == "ratio") make_ratio(path, node, g);
    if (form == "every") make_every(path, node, g);
    if (form == "insert" || form == "replace") make_placed(path, node, g, form == "insert");
  }

  bool letter(const std::string& path, const std::string& text, const std::string& place) {
    if (is_letter(text)) return true;
    issue(path, fmt::format("must be one printable ASCII character other than '|' and '/', got {}", shown(text)), "", place);
    return false;
  }

  // `{ M = 6, "*" = 1 }`, in the order in which the file has it.
  std::optional<LetterCounts> letters(const std::string& path, const TomlNode& node, int64_t most) {
    if (node.kind != Kind::kTable || node.entries.empty()) {
      issue(path, "must be a table of letters and whole numbers, got " + (node.kind == Kind::kTable ? "an empty one" : node.describe()), "{ M = 6, \"*\" = 1 }", node.place);
      return {};
    }
    std::vector<const TomlEntry*> entries;
    for (const TomlEntry& entry : node.entries) entries.push_back(&entry);
    std::stable_sort(entries.begin(), entries.end(), [](const TomlEntry* a, const TomlEntry* b) { return line_column(a->node.key_place) < line_column(b->node.key_place); });
    LetterCounts out;
    bool good = true;
    for (const TomlEntry* entry : entries) {
      const TomlNode& value = entry->node;
      const std::string name = path + "." + shorten(toml_key(entry->key));
      const auto* number = value.kind == Kind::kValue ? std::get_if<int64_t>(&value.value) : nullptr;
      good = letter(name, entry->key, value.key_place) && good;
      if (!number || *number < 1 || *number > most) {
        issue(name, fmt::format("must be a whole number in [1, {}], got {}", most, value.describe()), "", value.place);
        good = false;
      } else if (good) {
        out.emplace_back(entry->key[0], *number);
      }
    }
    return good ? std::optional(out) : std::nullopt;
  }

  void make_ratio(const std::string& path, const TomlNode& node, const PatternGenerator& g) {
    const auto ratio = letters(path + ".ratio", *node.find("ratio"), kMostWeight);
    if (!ratio) return;
    for (const auto& [symbol, count] : ratio_counts(*ratio, g.layers))
      if (count == 0) out_.notes.push_back(fmt::format("{}: '{}' gets none of the {} layers", path, symbol, g.layers));
    add(path, node.place, ratio_pattern(*ratio, g.layers), g.dialect);
  }

  void make_every(const std::string& path, const TomlNode& node, const PatternGenerator& g) {
    const auto periods = letters(path + ".every", *node.find("every"), kMostLayers);
    if (!periods) return;
    std::vector<PatternProblem> problems;
    const Pattern base = parse_pattern(g.base, problems);
    std::string text = g.base;
    for (const auto& [symbol, period] : *periods) {
      const auto layers = static_cast<int64_t>(base.main.size());
      if (period > layers) out_.notes.push_back(fmt::format("{}: the base has {} layers: none becomes '{}', whose period is {}", path, layers, symbol, period));
      for (int64_t at = period - 1; at < layers; at += period) text[static_cast<size_t>(base.main[static_cast<size_t>(at)].position)] = symbol;
    }
    add(path, node.place, text, g.dialect);
  }

  // The layers of 0..last that `at` names: nullopt after an issue.
  std::optional<std::vector<int64_t>> places(const std::string& path, const TomlNode& at, int64_t last) {
    const auto* one = at.kind == Kind::kValue ? std::get_if<int64_t>(&at.value) : nullptr;
    const auto* many = at.kind == Kind::kValue ? std::get_if<std::vector<int64_t>>(&at.value) : nullptr;
    if (!one && (!many || many->empty())) {
      issue(path, "must be \"each\", a layer's number or a list of them, got " + at.describe(), "", at.place);
      return {};
    }
    const std::vector<int64_t> out = one ? std::vector<int64_t>{*one} : *many;
    for (const int64_t place : out) {
      if (place >= 0 && place <= last) continue;
      issue(path, fmt::format("must be in [0, {}], got {}", last, place), "layers are counted from 0", at.place);
      return {};
    }
    return out;
  }

  void make_placed(const std::string& path, const TomlNode& node, const PatternGenerator& g, bool insert) {
    std::vector<PatternProblem> problems;
    const Pattern base = parse_pattern(g.base, problems);
    const TomlNode* at = node.find("at");
    const bool each = !at || (at->kind == Kind::kValue && same_value(at->value, Value(std::string("each"))));
    const auto layers = static_cast<int64_t>(base.main.size()), last = insert ? layers : layers - 1;
    std::vector<int64_t> chosen(static_cast<size_t>(last + 1));
    std::iota(chosen.begin(), chosen.end(), int64_t{0});
    if (!each) {
      const auto named = places(path + ".at", *at, last);
      if (!named) return;
      chosen = *named;
    }
    const auto position = [&](int64_t layer) { return static_cast<size_t>(base.main[static_cast<size_t>(layer)].position); };
    bool any = false;
    for (const int64_t place : chosen) {
      std::string text = g.base;
      if (insert) {
        text.insert(place < layers ? position(place) : head_begin(text), g.insert);
      } else if (text[position(place)] == g.replace[0]) {
        text[position(place)] = g.by[0];
      } else {
        if (!each) issue(path + ".at", fmt::format("layer {} of {} is '{}', not '{}'", place, shown(g.base), text[position(place)], g.replace), "layers are counted from 0", at->place);
        continue;
      }
      any = true;
      add(path, node.place, text, g.dialect);
    }
    if (!any && each) issue(path + ".replace", fmt::format("no layer of {} is '{}'", shown(g.base), g.replace), "", node.find("replace")->place);
  }

  Issues& issues_;
  std::string path_, place_;
  SweptPatterns out_;
  std::set<std::string> seen_;
  std::vector<std::pair<std::string, int64_t>> repeated_;
  bool full_ = false;
};

}  // namespace

Schema<PatternGenerator> pattern_schema() {
  using G = PatternGenerator;
  Schema<G> s;
  s.field("list", &G::list, "patterns as they are");
  s.field("layers", &G::layers, "layers of the pattern that `ratio = { LETTER = SHARE, ... }` makes").unit("layers").range(1, kMostLayers);
  s.field("cell", &G::cell, "a pattern that is repeated");
  s.field("repeat", &G::repeat, "how often the cell stands in the pattern").range(1, kMostLayers);
  s.field("base", &G::base, "the pattern that `every = { LETTER = PERIOD, ... }`, insert or replace changes");
  s.field("insert", &G::insert, "letter of a layer that is added, one pattern for each place of `at`");
  s.field("replace", &G::replace, "letter of the layers of which one becomes `by`, one pattern for each place of `at`");
  s.field("by", &G::by, "letter that a layer gets instead");
  s.field("dialect", &G::dialect, "model.dialect of these patterns; by default that of the base configuration").choices({"", "card", "nemotron"});
  return s;
}

SweptPatterns read_patterns(const std::string& path, const TomlNode& node, Issues& issues) {
  Reader reader(issues, path, node.place);
  reader.read(path, node);
  return reader.take();
}

LetterCounts ratio_counts(const LetterCounts& ratio, int64_t layers) {
  int64_t sum = 0, left = layers;
  for (const auto& [symbol, weight] : ratio) sum += weight;
  LetterCounts counts;
  std::vector<std::pair<int64_t, size_t>> remainders;  // negative, so that the largest comes first
  for (size_t i = 0; i < ratio.size(); ++i) {
    const int64_t share = layers * ratio[i].second;
    counts.emplace_back(ratio[i].first, share / sum);
    remainders.emplace_back(-(share % sum), i);
    left -= share / sum;
  }
  std::sort(remainders.begin(), remainders.end());
  for (int64_t i = 0; i < left; ++i) ++counts[remainders[static_cast<size_t>(i)].second].second;
  return counts;
}

std::string ratio_pattern(const LetterCounts& ratio, int64_t layers) {
  struct Wish {
    int64_t place, count;  // place / (2 count) of the stack
    size_t letter;
  };
  const LetterCounts counts = ratio_counts(ratio, layers);
  std::vector<Wish> wishes;
  for (size_t letter = 0; letter < counts.size(); ++letter)
    for (int64_t i = 0; i < counts[letter].second; ++i) wishes.push_back({2 * i + 1, counts[letter].second, letter});
  std::sort(wishes.begin(), wishes.end(), [](const Wish& a, const Wish& b) {
    const int64_t left = a.place * b.count, right = b.place * a.count;
    return left != right ? left < right : a.letter < b.letter;
  });
  std::string text;
  for (const Wish& wish : wishes) text += counts[wish.letter].first;
  return text;
}

std::string repeat_pattern(const std::string& cell, int64_t times) {
  const size_t end = head_begin(cell);
  std::string text;
  for (int64_t i = 0; i < times; ++i) text += cell.substr(0, end);
  return text + cell.substr(end);
}

}  // namespace tessera
