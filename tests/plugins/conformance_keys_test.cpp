// Conformance: the keys of a block's or head's table.
#include <ATen/ops/isfinite.h>

#include <cmath>
#include <limits>
#include <optional>

#include "tests/support/conformance.hpp"

namespace tessera::conformance {

namespace {

bool is_number(const Field& field) { return std::holds_alternative<int64_t>(field.default_value) || std::holds_alternative<double>(field.default_value); }

Value number(const Field& field, double value) {
  if (std::holds_alternative<double>(field.default_value)) return value;
  return static_cast<int64_t>(value);
}

// The value next to `edge` on the side of `sign`.
Value beyond(const Field& field, double edge, int sign) {
  if (std::holds_alternative<double>(field.default_value)) return std::nextafter(edge, sign * std::numeric_limits<double>::infinity());
  return static_cast<int64_t>(edge) + sign;
}

// An admissible value other than `now`; none where there seems to be no other.
std::optional<Value> other_value(const Field& field, const Value& now) {
  std::vector<Value> tries;
  if (const bool* on = std::get_if<bool>(&now)) tries = {!*on};
  if (const int64_t* n = std::get_if<int64_t>(&now)) tries = {*n + 1, *n - 1, *n * 2};
  if (const double* x = std::get_if<double>(&now)) tries = {*x / 2, *x + 0.25, *x * 2};
  if (const std::string* word = std::get_if<std::string>(&now)) {
    tries.assign(field.choices_.begin(), field.choices_.end());
    if (tries.empty()) tries = {*word + "x"};
  }
  if (auto list = std::get_if<std::vector<int64_t>>(&now); list && !list->empty()) tries.push_back(std::vector<int64_t>(list->size(), list->front() + 1));
  if (auto list = std::get_if<std::vector<double>>(&now); list && !list->empty()) tries.push_back(std::vector<double>(list->size(), list->front() / 2 + 0.125));
  for (const Value& value : tries)
    if (!same_value(value, now) && broken_rule(field, value).empty()) return value;
  return std::nullopt;
}

void expect_refused(const std::string& text, const std::string& table, const Field& field, const Value& value) {
  const std::string key = table + "." + field.key, set = key + "=" + to_toml(value);
  try {
    parse_config(text, "test.toml", {set}, plugins());
    ADD_FAILURE() << set << " is taken, though the key's rule is: " << domain(field);
  } catch (const Error& error) {
    EXPECT_NE(error.message().find(key), std::string::npos) << error.what();
    EXPECT_EQ(error.code(), ExitCode::kUsage) << error.what();
  }
}

// Blocks and heads share what follows; `table` is "blocks.<type>" or "heads.<type>".
const ConfigPtr& block_config(const Config& config) { return config.bindings[0].config; }
const ConfigPtr& head_config(const Config& config) { return config.head->config; }

void expect_written_and_read_back(const std::string& text, const ElementType& type, const ConfigPtr& (*config_of)(const Config&)) {
  const Config config = parse_config(text, "test.toml", {}, plugins());
  const std::string written = to_toml(config);
  const Config again = parse_config(written, "again.toml", {}, plugins());
  EXPECT_EQ(to_toml(again), written);
  for (const Field& field : type.fields().list)
    if (!same_value(field.get(config_of(config).get()), field.get(config_of(again).get()))) ADD_FAILURE() << "key '" << field.key << "' is read back as another value than was written";
}

void expect_keys_apart(const ElementType& type, const ConfigPtr& config) {
  const auto& list = type.fields().list;
  for (const Field& field : list) {
    if (field.doc.empty()) ADD_FAILURE() << "key '" << field.key << "' has no line that says what it means";
    const auto value = other_value(field, field.get(config.get()));
    if (!value) continue;
    const ConfigPtr copy = type.copy_config(config);
    field.set(copy.get(), *value);
    for (const Field& seen : list) {
      const Value now = seen.get(copy.get()), want = &seen == &field ? *value : seen.get(config.get());
      if (!same_value(now, want))
        ADD_FAILURE() << fmt::format("with '{}' set to {}, key '{}' is {} instead of {}: does its field name the right member?", field.key, to_toml(*value), seen.key, to_toml(now), to_toml(want));
    }
  }
}

void expect_ranges_kept(const std::string& text, const std::string& table, const ElementType& type) {
  for (const Field& field : type.fields().list) {
    if (!field.required_ && !broken_rule(field, field.default_value).empty()) ADD_FAILURE() << "key '" << field.key << "': the default " << broken_rule(field, field.default_value);
    if (is_number(field) && std::isfinite(field.min_)) expect_refused(text, table, field, field.above_min_ ? number(field, field.min_) : beyond(field, field.min_, -1));
    if (is_number(field) && std::isfinite(field.max_)) expect_refused(text, table, field, beyond(field, field.max_, 1));
    if (!field.choices_.empty()) expect_refused(text, table, field, std::string("no such choice"));
  }
}

// A value at the edge of its range either breaks a rule that `check` reports, or gives a block that runs.
void expect_edges_run(const std::string& text, const std::string& table, const ElementType& type) {
  for (const Field& field : type.fields().list) {
    if (!is_number(field)) continue;
    for (const double edge : {field.min_, field.max_}) {
      if (!std::isfinite(edge) || std::abs(edge) > 4096 || !broken_rule(field, number(field, edge)).empty()) continue;
      const std::string set = fmt::format("{}.{}={}", table, field.key, to_toml(number(field, edge)));
      try {
        Built built(text, {.sets = {set}});
        const at::Tensor out = hidden(built.model, random_batch({1, 6}, kVocab));
        if (!at::isfinite(out).all().item<bool>()) ADD_FAILURE() << set << ": is in the key's range and breaks no rule, but the output is not finite";
      } catch (const Error& error) {
        if (error.code() != ExitCode::kUsage) ADD_FAILURE() << set << ": is in the key's range and breaks no rule, but: " << error.what();
      } catch (const std::exception& error) {
        ADD_FAILURE() << set << ": is in the key's range, but: " << std::string(error.what()).substr(0, 300);
      }
    }
  }
}

}  // namespace

TEST_P(Conformance, ConfigurationIsWrittenAndReadBack) { expect_written_and_read_back(text(), type(), block_config); }
TEST_P(Conformance, EachKeyHasItsOwnMember) { expect_keys_apart(type(), block_config(parse_config(text(), "test.toml", {}, plugins()))); }
TEST_P(Conformance, ValuesOutsideARangeAreRefused) { expect_ranges_kept(text(), "blocks." + GetParam().type, type()); }
TEST_P(Conformance, TheEdgesOfARangeRun) { expect_edges_run(text(), "blocks." + GetParam().type, type()); }

TEST_P(HeadConformance, ConfigurationIsWrittenAndReadBack) { expect_written_and_read_back(text_, type(), head_config); }
TEST_P(HeadConformance, EachKeyHasItsOwnMember) { expect_keys_apart(type(), head_config(parse_config(text_, "test.toml", {}, plugins()))); }
TEST_P(HeadConformance, ValuesOutsideARangeAreRefused) { expect_ranges_kept(text_, "heads." + GetParam().type, type()); }
TEST_P(HeadConformance, TheEdgesOfARangeRun) { expect_edges_run(text_, "heads." + GetParam().type, type()); }

// A plugin may bring blocks alone, or heads alone.
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Conformance);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(HeadConformance);
INSTANTIATE_TEST_SUITE_P(Blocks, Conformance, testing::ValuesIn(block_cases()), test_name);
INSTANTIATE_TEST_SUITE_P(Heads, HeadConformance, testing::ValuesIn(head_cases()), test_name);

}  // namespace tessera::conformance
