// A schema maps the keys of one configuration table to the members of one plain struct. The TOML reader, `describe`, the
// generated reference, `--set`, and the HF import and export are all made from it, so a key is written down once.
#pragma once
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace tessera {

using Value = std::variant<bool, int64_t, double, std::string, std::vector<int64_t>, std::vector<double>, std::vector<std::string>>;

// "boolean", "integer", "number", "string", "list of integers", ...
const char* type_name(const Value& value);
// The value as TOML text: `true`, `64`, `0.1`, `"text"`, `[1, 2]`. Numbers round-trip exactly; inf and nan as TOML writes them.
std::string to_toml(const Value& value);
bool same_value(const Value& a, const Value& b);
// `text` cut to a length that fits a message.
std::string shorten(const std::string& text);

// One key of a table. The setters return the field, so that a schema reads as one statement a key.
struct Field {
  std::string key;
  std::string doc;         // one line, what it means
  std::string unit_;       // "tokens", "bytes", "nats"; empty where it has none
  double min_ = -std::numeric_limits<double>::infinity();  // numbers and each element of a list lie in [min, max]
  double max_ = std::numeric_limits<double>::infinity();   // integers without an upper bound of their own end at 10^9
  bool above_min_ = false;                 // open at the lower end: (min, max]
  bool finite_ = true;                     // infinities are refused unless allowed
  int64_t length_ = -1;                    // of a list; -1: any
  std::vector<std::string> choices_;       // of a string; empty: any
  std::vector<std::string> hf_keys_;       // HF config.json: the key that is written, then other spellings that are read
  bool required_ = false;                  // no default: 0 or "" means not given
  std::string source_;                     // paper or project that defines it
  Value default_value;
  std::function<Value(const void* config)> get;
  std::function<void(void* config, const Value& value)> set;  // takes the field's own alternative; the reader widens integers to numbers

  Field& unit(std::string text) { unit_ = std::move(text); return *this; }
  Field& range(double low, double high = std::numeric_limits<double>::infinity()) { min_ = low, max_ = high; return *this; }
  Field& above(double low) { min_ = low, above_min_ = true; return *this; }
  Field& may_be_infinite() { finite_ = false; return *this; }
  Field& length(int64_t n) { length_ = n; return *this; }
  Field& choices(std::vector<std::string> words) { choices_ = std::move(words); return *this; }
  Field& hf(std::vector<std::string> keys) { hf_keys_ = std::move(keys); return *this; }
  Field& required() { required_ = true; return *this; }
  Field& source(std::string text) { source_ = std::move(text); return *this; }
};

// The fields of a table without the struct's type.
struct Fields {
  std::vector<Field> list;
  const Field* find(const std::string& key) const;
  std::vector<std::string> keys() const;
};

// The values a field takes, for people: "integer in [1, inf)", `one of "a", "b"`, "list of 2 numbers".
std::string domain(const Field& field);

// The rule that `value` breaks ("must be in [1, inf), got 0"), or "" when it is admissible. Checks type, range, choices, length, finiteness.
std::string broken_rule(const Field& field, const Value& value);

template <class Config>
class Schema : public Fields {
 public:
  // M is one of Value's alternatives. The default is what a default-constructed Config holds.
  template <class M>
  Field& field(std::string key, M Config::*member, std::string doc) {
    Field f;
    f.key = std::move(key);
    f.doc = std::move(doc);
    f.default_value = Value(Config{}.*member);
    f.get = [member](const void* config) { return Value(static_cast<const Config*>(config)->*member); };
    f.set = [member](void* config, const Value& value) { static_cast<Config*>(config)->*member = std::get<M>(value); };
    list.push_back(std::move(f));
    return list.back();  // valid until the next field is added
  }
};

}  // namespace tessera
