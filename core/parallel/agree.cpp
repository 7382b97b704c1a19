#include "parallel/agree.hpp"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include "parallel/rendezvous.hpp"
#include "tessera/error.hpp"

namespace tessera {

namespace {

using Facts = std::vector<std::pair<std::string, std::string>>;

struct Line {
  std::string name, value;
};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return lines;
}

// A value as lines with names. Those of TOML are named by their table and key; others by the fact.
std::vector<Line> named_lines(const std::string& fact, const std::string& value) {
  if (value.find('\n') == std::string::npos) return {{fact, value}};
  std::vector<Line> lines;
  std::string table;
  for (const std::string& line : split(value)) {
    const size_t equals = line.find(" = ");
    if (line.starts_with('[') && line.ends_with(']')) table = line.substr(1, line.size() - 2) + ".";
    if (equals == std::string::npos) lines.push_back({fact, line});
    else lines.push_back({table + line.substr(0, equals), line.substr(equals + 3)});
  }
  return lines;
}

std::string shown(const std::optional<Line>& line) { return !line ? "nothing there" : line->name + " = " + line->value; }

// How rank `r` differs from rank 0, or "".
std::string difference(int64_t r, const nlohmann::json& there, const nlohmann::json& first) {
  const auto facts = there.at("facts").get<Facts>(), expected = first.at("facts").get<Facts>();
  for (size_t i = 0; i < std::max(facts.size(), expected.size()); ++i) {
    if (i < facts.size() && i < expected.size() && facts[i] == expected[i]) continue;
    const auto lines = i < facts.size() ? named_lines(facts[i].first, facts[i].second) : std::vector<Line>{};
    const auto wanted = i < expected.size() ? named_lines(expected[i].first, expected[i].second) : std::vector<Line>{};
    for (size_t l = 0; l <= std::max(lines.size(), wanted.size()); ++l) {
      const auto has = l < lines.size() ? std::optional(lines[l]) : std::nullopt, wants = l < wanted.size() ? std::optional(wanted[l]) : std::nullopt;
      if (has && wants && has->name == wants->name && has->value == wants->value) continue;
      const bool same_name = has && wants && has->name == wants->name;
      return fmt::format("rank {} (on host {}) has {}, rank 0 (on host {}) has {}", r, there.at("host").get<std::string>(), shown(has), first.at("host").get<std::string>(),
                         same_name ? wants->value : shown(wants));
    }
  }
  return "";
}

}  // namespace

void agree(const World& world, const Facts& facts) {
  if (world.size == 1 || !world.store) return;
  std::string verdict;
  try {
    const auto store = c10::make_intrusive<c10d::PrefixStore>("agree", world.store);
    const auto bytes = [&] {
      const std::string text = nlohmann::json{{"host", host_name()}, {"facts", facts}}.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
      return std::vector<uint8_t>(text.begin(), text.end());
    }();
    store->set(std::to_string(world.rank), bytes);
    if (world.rank == 0) {
      const auto first = nlohmann::json::parse(bytes);
      int64_t more = 0;
      for (int64_t rank = 1; rank < world.size; ++rank) {
        store->wait({std::to_string(rank)}, world.timeout);
        const std::string difference = tessera::difference(rank, nlohmann::json::parse(store->get(std::to_string(rank))), first);
        if (verdict.empty()) verdict = difference;
        else more += !difference.empty();
      }
      if (more) verdict += fmt::format("; {} more ranks differ from rank 0", more);
      store->set("verdict", verdict);
    } else {
      store->wait({"verdict"}, world.timeout);
      verdict = store->get_to_str("verdict");
    }
  } catch (const std::exception& error) {
    throw Error(ExitCode::kCollective, fmt::format("rank {} could not compare its configuration with the others': {}", world.rank, first_line(error)));
  }
  if (verdict.empty()) return;
  if (world.rank != 0) throw Error(ExitCode::kUsage, "");
  throw Error(ExitCode::kUsage, verdict, "all ranks need the same build, plugins, configuration and data");
}

}  // namespace tessera
