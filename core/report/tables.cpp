#include "report/tables.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <set>

namespace tessera {

namespace {

std::string csv_cell(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string out = "\"";
  for (const char c : text) out += c == '"' ? "\"\"" : std::string(1, c);
  return out + "\"";
}

std::string csv_number(double value) { return std::isfinite(value) ? fmt::format("{}", value) : ""; }

// Text that Markdown neither formats nor takes for HTML or for the end of a cell.
std::string markdown_cell(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '\n' || c == '\r') out += ' ';
    else if (c == '<') out += "&lt;";
    else if (std::string_view("\\`*_|[]>#").find(c) != std::string_view::npos) out += {'\\', c};
    else out += c;
  }
  return out;
}

// Names of the parts of each `..._by`, numbers in them in their order: "pairs 4" before "pairs 16".
bool before(const std::string& a, const std::string& b) {
  const auto digit = [](char c) { return c >= '0' && c <= '9'; };
  size_t i = 0, j = 0;
  while (i < a.size() && j < b.size()) {
    if (digit(a[i]) && digit(b[j])) {
      size_t x = i, y = j;
      while (x < a.size() && digit(a[x])) ++x;
      while (y < b.size() && digit(b[y])) ++y;
      const double left = std::strtod(a.substr(i, x - i).c_str(), nullptr), right = std::strtod(b.substr(j, y - j).c_str(), nullptr);
      if (left != right) return left < right;
      i = x, j = y;
    } else if (a[i] != b[j]) {
      return a[i] < b[j];
    } else {
      ++i, ++j;
    }
  }
  return a.size() - i < b.size() - j;
}

std::string row(const std::vector<std::string>& cells) {
  std::string out = "|";
  for (const std::string& cell : cells) out += " " + cell + " |";
  return out + "\n";
}

std::string head(const std::vector<std::string>& cells) {
  std::string out = row(cells) + "|";
  for (size_t i = 0; i < cells.size(); ++i) out += "---|";
  return out + "\n";
}

std::string start_text(const RunData& run, const char* key) {
  if (run.starts.empty() || !run.starts.back().contains(key)) return "";
  const nlohmann::json& value = run.starts.back()[key];
  return value.is_string() ? value.get<std::string>() : value.dump();
}

bool is_fitted(const RunData& run) { return !run.match.empty() || !run.fitted.empty(); }

// Which groups no other beats in both, for the first quality that is known. Costs that are the same for all say nothing.
std::string fronts_table(const RunComparison& c) {
  const auto fronts = pareto_fronts(c);
  for (const Measure& quality : measures()) {
    const auto of = fronts.find(quality.name);
    if (of == fronts.end()) continue;
    std::string rows;
    for (size_t m = 0; m < measures().size(); ++m) {
      const auto front = of->second.find(measures()[m].name);
      std::set<double> costs;
      for (const RunGroup& group : c.groups)
        if (group.summaries[m].n) costs.insert(group.summaries[m].mean);
      if (costs.size() < 2 || front == of->second.end() || front->second.empty()) continue;
      std::vector<std::string> labels;
      for (const size_t group : front->second) labels.push_back(markdown_cell(c.groups[group].label));
      rows += row({measures()[m].title, fmt::format("{}", fmt::join(labels, "; "))});
    }
    if (!rows.empty()) return fmt::format("\n## Pareto fronts of {}\n\n{}{}", quality.title, head({"against", "no other is better in both than"}), rows);
  }
  return "";
}

constexpr size_t kMostColumns = 6;  // of keys, in tables for people

}  // namespace

std::map<std::string, std::vector<std::string>> by_parts(const RunComparison& c) {
  std::map<std::string, std::vector<std::string>> out;
  for (const RunGroup& group : c.groups)
    for (const auto& [name, parts] : group.by)
      for (const auto& [part, summary] : parts)
        if (auto& list = out[name]; std::find(list.begin(), list.end(), part) == list.end()) list.push_back(part);
  for (auto& [name, parts] : out) std::sort(parts.begin(), parts.end(), before);
  return out;
}

std::string text_of(const Summary& s) {
  if (s.n == 0) return "—";
  if (std::isnan(s.half)) return fmt::format("{:.5g}", s.mean);
  if (s.half == 0 || std::abs(s.mean) >= 1e5) return fmt::format("{:.5g} ± {:.2g}", s.mean, s.half);
  const int decimals = std::clamp(1 - static_cast<int>(std::floor(std::log10(s.half))), 0, 8);
  return fmt::format("{:.{}f} ± {:.{}f}", s.mean, decimals, s.half, decimals);
}

std::string fitted_text(const RunData& run) {
  std::string out;
  for (const auto& [key, value] : run.fitted) out += fmt::format("{}{} = {}", out.empty() ? "" : ", ", key, value);
  return out;
}

std::string to_csv(const RunComparison& c) {
  const auto parts = by_parts(c);
  std::vector<std::string> cells{"group", "run", "folder", "state", "seed"};
  cells.insert(cells.end(), c.varied.begin(), c.varied.end());
  for (const Measure& measure : measures()) cells.push_back(measure.name);
  for (const auto& [name, list] : parts)
    for (const std::string& part : list) cells.push_back(name + " " + part);
  const bool fitted = std::any_of(c.runs.begin(), c.runs.end(), is_fitted);
  if (fitted) cells.insert(cells.end(), {"match", "match_error", "fitted"});
  cells.insert(cells.end(), {"version", "host", "cpu", "device", "dtype", "error"});
  std::string out;
  const auto put = [&] {
    for (size_t i = 0; i < cells.size(); ++i) out += (i ? "," : "") + csv_cell(cells[i]);
    out += "\r\n";
  };
  put();
  for (const RunGroup& group : c.groups)
    for (const size_t index : group.runs) {
      const RunData& run = c.runs[index];
      cells = {group.label, run.name, run.folder, run.state, run.seed ? fmt::format("{}", *run.seed) : ""};
      cells.insert(cells.end(), group.values.begin(), group.values.end());
      for (const Measure& measure : measures()) cells.push_back(csv_number(measure.of(run)));
      for (const auto& [name, list] : parts)
        for (const std::string& part : list) {
          const auto by = run.metrics.by.find(name);
          const bool has = by != run.metrics.by.end() && by->second.contains(part);
          cells.push_back(has ? csv_number(by->second.at(part)) : "");
        }
      if (fitted) cells.insert(cells.end(), {run.match, run.match.empty() ? "" : csv_number(run.match_error), fitted_text(run)});
      for (const char* key : {"version", "host", "cpu", "device", "dtype"}) cells.push_back(start_text(run, key));
      cells.push_back(run.error);
      put();
    }
  return out;
}

std::string to_markdown(const RunComparison& c) {
  std::string out = fmt::format("# Report of {} run{}\n", c.runs.size(), c.runs.size() == 1 ? "" : "s");
  if (!c.notes.empty()) {
    out += "\n";
    for (const std::string& note : c.notes) out += "- " + markdown_cell(note) + "\n";
  }
  if (!c.groups.empty()) {
    const size_t keys = std::min(c.varied.size(), kMostColumns);
    std::vector<std::string> cells;
    for (size_t i = 0; i < keys; ++i) cells.push_back(markdown_cell(c.varied[i]));
    if (!keys) cells.emplace_back("run");
    cells.emplace_back("runs");
    std::vector<size_t> shown;
    for (size_t m = 0; m < measures().size(); ++m)
      if (std::any_of(c.groups.begin(), c.groups.end(), [&](const RunGroup& group) { return group.summaries[m].n > 0; })) shown.push_back(m), cells.push_back(measures()[m].title);
    out += "\n" + head(cells);
    for (const RunGroup& group : c.groups) {
      cells.clear();
      for (size_t i = 0; i < keys; ++i) cells.push_back(markdown_cell(group.values[i]));
      if (!keys) cells.push_back(markdown_cell(group.label));
      cells.push_back(markdown_cell(group.status));
      for (const size_t m : shown) cells.push_back(text_of(group.summaries[m]));
      out += row(cells);
    }
    out += "\nMeans over seeds ± half of the 95 % confidence interval by Student's t, where there are two runs or more.\n";
    if (c.varied.size() > keys) out += fmt::format("{} further keys differ; the CSV has them all.\n", c.varied.size() - keys);
  }
  out += fronts_table(c);
  for (const auto& [name, parts] : by_parts(c)) {
    std::vector<std::string> cells{""};
    for (const std::string& part : parts) cells.push_back(markdown_cell(part));
    out += fmt::format("\n## {}\n\n{}", markdown_cell(name), head(cells));
    for (const RunGroup& group : c.groups) {
      const auto by = group.by.find(name);
      if (by == group.by.end()) continue;
      cells = {markdown_cell(group.label)};
      for (const std::string& part : parts) cells.push_back(by->second.contains(part) ? text_of(by->second.at(part)) : "—");
      out += row(cells);
    }
  }
  if (std::any_of(c.runs.begin(), c.runs.end(), is_fitted)) {
    out += "\n## What was fitted\n\n" + head({"", "match", "keys"});
    for (const RunGroup& group : c.groups)
      if (const RunData& run = c.runs[group.runs.front()]; is_fitted(run)) out += row({markdown_cell(group.label), markdown_cell(run.match), markdown_cell(fitted_text(run))});
  }
  if (std::any_of(c.runs.begin(), c.runs.end(), [](const RunData& run) { return !run.done(); })) {
    out += "\n## Runs that are not done\n\n" + head({"run", "state", "why"});
    for (const RunData& run : c.runs)
      if (!run.done()) out += row({markdown_cell(run.name), markdown_cell(run.state), markdown_cell(run.error.substr(0, run.error.find('\n')))});
  }
  return out;
}

}  // namespace tessera
