#include "tessera/schema.hpp"

#include <cmath>

#include <fmt/format.h>

namespace tessera {

namespace {
template <class... F>
struct Overload : F... {
  using F::operator()...;
};
template <class... F>
Overload(F...) -> Overload<F...>;

std::string number(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  std::string text = fmt::format("{}", value);
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return text;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (unsigned char c : text) {
    if (c == '"' || c == '\\') out += '\\', out += static_cast<char>(c);
    else if (c == '\n') out += "\\n";
    else if (c == '\t') out += "\\t";
    else if (c < 0x20 || c == 0x7f) out += fmt::format("\\u{:04x}", static_cast<int>(c));
    else out += static_cast<char>(c);
  }
  return out + '"';
}

template <class T, class F>
std::string list(const std::vector<T>& values, F one) {
  std::string out = "[";
  for (size_t i = 0; i < values.size(); ++i) out += (i ? ", " : "") + one(values[i]);
  return out + "]";
}

std::string words(const std::vector<std::string>& values) {
  std::string out;
  for (const std::string& value : values) out += (out.empty() ? "" : ", ") + quoted(value);
  return out;
}

std::string plain(double bound) {
  if (bound >= 0x1p63) return fmt::format("{}", std::numeric_limits<int64_t>::max());
  return bound == std::floor(bound) && std::abs(bound) < 1e15 ? fmt::format("{}", static_cast<int64_t>(bound)) : fmt::format("{}", bound);
}

// A size without an upper bound of its own has this one, so that the product of two fits into 64 bits.
double upper(const Field& f) {
  constexpr double kMany = 1e9;
  const bool sizes = std::holds_alternative<int64_t>(f.default_value) || std::holds_alternative<std::vector<int64_t>>(f.default_value);
  return sizes && std::isinf(f.max_) ? kMany : f.max_;
}

bool bounded(const Field& f) { return !std::isinf(f.min_) || !std::isinf(upper(f)); }

std::string interval(const Field& f) {
  std::string low = std::isinf(f.min_) ? "(-inf" : (f.above_min_ ? "(" : "[") + plain(f.min_);
  return low + ", " + (std::isinf(upper(f)) ? "inf)" : plain(upper(f)) + "]");
}

std::string broken_number(const Field& f, double value, const std::string& text) {
  if (std::isnan(value) || (f.finite_ && std::isinf(value))) return "must be finite, got " + text;
  if (value < f.min_ || value > upper(f) || (f.above_min_ && value <= f.min_)) return fmt::format("must be in {}, got {}", interval(f), text);
  return {};
}
}  // namespace

const char* type_name(const Value& value) {
  return std::visit(Overload{[](bool) { return "boolean"; }, [](int64_t) { return "integer"; }, [](double) { return "number"; },
                             [](const std::string&) { return "string"; }, [](const std::vector<int64_t>&) { return "list of integers"; },
                             [](const std::vector<double>&) { return "list of numbers"; },
                             [](const std::vector<std::string>&) { return "list of strings"; }},
                    value);
}

std::string to_toml(const Value& value) {
  auto integer = [](int64_t v) { return fmt::format("{}", v); };
  return std::visit(Overload{[](bool v) { return std::string(v ? "true" : "false"); }, integer, [](double v) { return number(v); },
                             [](const std::string& v) { return quoted(v); }, [&](const std::vector<int64_t>& v) { return list(v, integer); },
                             [](const std::vector<double>& v) { return list(v, number); },
                             [](const std::vector<std::string>& v) { return list(v, quoted); }},
                    value);
}

bool same_value(const Value& a, const Value& b) { return a == b; }

std::string shorten(const std::string& text) {
  constexpr size_t kLength = 120;
  if (text.size() <= kLength) return text;
  size_t end = kLength;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;  // not inside a character
  return text.substr(0, end) + "...";
}

std::string domain(const Field& field) {
  if (!field.choices_.empty()) {
    const bool many = std::holds_alternative<std::vector<std::string>>(field.default_value);
    return (many ? "list of " : "one of ") + words(field.choices_);
  }
  std::string text = type_name(field.default_value);
  if (field.length_ >= 0 && text.starts_with("list of ")) text = fmt::format("list of {} {}", field.length_, text.substr(8));
  if (bounded(field)) text += " in " + interval(field);
  return text;
}

const Field* Fields::find(const std::string& key) const {
  for (const Field& field : list)
    if (field.key == key) return &field;
  return nullptr;
}

std::vector<std::string> Fields::keys() const {
  std::vector<std::string> out;
  for (const Field& field : list) out.push_back(field.key);
  return out;
}

std::string broken_rule(const Field& field, const Value& value) {
  if (value.index() != field.default_value.index())
    return fmt::format("must be {} {}, got the {} {}", std::holds_alternative<int64_t>(field.default_value) ? "an" : "a",
                       type_name(field.default_value), type_name(value), shorten(to_toml(value)));
  auto many = [&](const auto& values) {
    if (field.length_ >= 0 && static_cast<int64_t>(values.size()) != field.length_)
      return fmt::format("must have {} elements, got {}", field.length_, values.size());
    return std::string();
  };
  auto one_of = [&](const std::string& text) {
    if (field.choices_.empty()) return std::string();
    for (const std::string& choice : field.choices_)
      if (choice == text) return std::string();
    return fmt::format("must be one of {}, got {}", words(field.choices_), shorten(quoted(text)));
  };
  return std::visit(Overload{[](bool) { return std::string(); },
                             [&](int64_t v) { return broken_number(field, static_cast<double>(v), fmt::format("{}", v)); },
                             [&](double v) { return broken_number(field, v, number(v)); }, one_of,
                             [&](const std::vector<int64_t>& v) {
                               std::string rule = many(v);
                               for (int64_t x : v)
                                 if (rule.empty()) rule = broken_number(field, static_cast<double>(x), fmt::format("{}", x));
                               return rule;
                             },
                             [&](const std::vector<double>& v) {
                               std::string rule = many(v);
                               for (double x : v)
                                 if (rule.empty()) rule = broken_number(field, x, number(x));
                               return rule;
                             },
                             [&](const std::vector<std::string>& v) {
                               std::string rule = many(v);
                               for (const std::string& x : v)
                                 if (rule.empty()) rule = one_of(x);
                               return rule;
                             }},
                    value);
}

}  // namespace tessera
