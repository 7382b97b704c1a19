#include "tessera/schema.hpp"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>

namespace tessera {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Table {
  bool flag = true;
  int64_t count = 3;
  double share = 0.5;
  std::string word = "a";
  std::vector<int64_t> sizes{1};
  std::vector<double> limits{0, 1};
  std::vector<std::string> names;
};

Schema<Table> schema() {
  Schema<Table> s;
  s.field("flag", &Table::flag, "a flag");
  s.field("count", &Table::count, "a count").range(1, 8).unit("tokens").hf({"n", "num"}).source("here").required();
  s.field("share", &Table::share, "a share").above(0);
  s.field("word", &Table::word, "a word").choices({"a", "b"});
  s.field("sizes", &Table::sizes, "sizes").range(0);
  s.field("limits", &Table::limits, "limits").length(2).may_be_infinite();
  s.field("names", &Table::names, "names").choices({"x"});
  return s;
}

std::string rule(const char* key, Value value) { return broken_rule(*schema().find(key), value); }

TEST(Schema, ReadsAndWritesMembers) {
  const auto s = schema();
  Table table;
  s.find("count")->set(&table, Value(int64_t{5}));
  EXPECT_EQ(table.count, 5);
  EXPECT_TRUE(same_value(s.find("count")->get(&table), Value(int64_t{5})));
  EXPECT_TRUE(same_value(s.find("count")->default_value, Value(int64_t{3})));
  EXPECT_EQ(s.find("none"), nullptr);
  EXPECT_EQ(s.keys().size(), 7u);
  EXPECT_EQ(s.find("count")->unit_, "tokens");
  EXPECT_EQ(s.find("count")->hf_keys_, (std::vector<std::string>{"n", "num"}));
  EXPECT_TRUE(s.find("count")->required_);
}

TEST(Schema, Rules) {
  EXPECT_EQ(rule("flag", true), "");
  EXPECT_EQ(rule("flag", int64_t{1}), "must be a boolean, got the integer 1");
  EXPECT_EQ(rule("count", int64_t{8}), "");
  EXPECT_EQ(rule("count", int64_t{9}), "must be in [1, 8], got 9");
  EXPECT_EQ(rule("count", 2.0), "must be an integer, got the number 2.0");
  EXPECT_EQ(rule("share", 1e300), "");
  EXPECT_EQ(rule("share", 0.0), "must be in (0, inf), got 0.0");
  EXPECT_EQ(rule("share", kInf), "must be finite, got inf");
  EXPECT_EQ(rule("share", std::nan("")), "must be finite, got nan");
  EXPECT_EQ(rule("share", int64_t{1}), "must be a number, got the integer 1");
  EXPECT_EQ(rule("word", std::string("c\n")), "must be one of \"a\", \"b\", got \"c\\n\"");
  EXPECT_EQ(rule("sizes", std::vector<int64_t>{1, -1}), "must be in [0, 1000000000], got -1");
  EXPECT_EQ(rule("limits", std::vector<double>{0, kInf}), "");
  EXPECT_EQ(rule("limits", std::vector<double>{0, std::nan("")}), "must be finite, got nan");
  EXPECT_EQ(rule("limits", std::vector<double>{0}), "must have 2 elements, got 1");
  EXPECT_EQ(rule("names", std::vector<std::string>{"x", "y"}), "must be one of \"x\", got \"y\"");
  EXPECT_EQ(rule("names", std::string("x")), "must be a list of strings, got the string \"x\"");
}

TEST(Schema, Domains) {
  const auto s = schema();
  EXPECT_EQ(domain(*s.find("flag")), "boolean");
  EXPECT_EQ(domain(*s.find("count")), "integer in [1, 8]");
  EXPECT_EQ(domain(*s.find("share")), "number in (0, inf)");
  EXPECT_EQ(domain(*s.find("word")), "one of \"a\", \"b\"");
  EXPECT_EQ(domain(*s.find("limits")), "list of 2 numbers");
  EXPECT_EQ(domain(*s.find("names")), "list of \"x\"");
}

TEST(Schema, Toml) {
  EXPECT_EQ(to_toml(Value(true)), "true");
  EXPECT_EQ(to_toml(Value(std::numeric_limits<int64_t>::min())), "-9223372036854775808");
  EXPECT_EQ(to_toml(Value(0.1)), "0.1");
  EXPECT_EQ(to_toml(Value(1.0)), "1.0");
  EXPECT_EQ(to_toml(Value(-0.0)), "-0.0");
  EXPECT_EQ(to_toml(Value(0.1 + 0.2)), "0.30000000000000004");
  EXPECT_EQ(to_toml(Value(1e300)), "1e+300");
  EXPECT_EQ(to_toml(Value(-kInf)), "-inf");
  EXPECT_EQ(to_toml(Value(std::nan(""))), "nan");
  EXPECT_EQ(to_toml(Value(std::string("a\"\\\n\t\x01\x7f\xc3\xa9"))), "\"a\\\"\\\\\\n\\t\\u0001\\u007f\xc3\xa9\"");
  EXPECT_EQ(to_toml(Value(std::vector<double>{0, kInf})), "[0.0, inf]");
  EXPECT_EQ(to_toml(Value(std::vector<std::string>{"a", "b"})), "[\"a\", \"b\"]");
  EXPECT_EQ(to_toml(Value(std::vector<int64_t>{})), "[]");
}

TEST(Schema, LongTextsAreCutBetweenCharacters) {
  EXPECT_EQ(shorten("short"), "short");
  EXPECT_EQ(shorten(std::string(200, 'a')), std::string(120, 'a') + "...");
  EXPECT_EQ(shorten(std::string(119, 'a') + "\xc3\xa9" + "aaa"), std::string(119, 'a') + "...");
}

}  // namespace
}  // namespace tessera
