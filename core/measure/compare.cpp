#include "measure/compare.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>

#include "checkpoint/file.hpp"

namespace tessera {

using nlohmann::json;

namespace {

// Arrangements of n + m values in which U is at most `u`, over all.
double exact_tail(int64_t n, int64_t m, double u) {
  // counts[i][j][s]: arrangements of i and j values with U = s.
  std::vector<std::vector<double>> row(static_cast<size_t>(m) + 1), before;
  for (int64_t i = 0; i <= n; ++i) {
    before = row;
    for (int64_t j = 0; j <= m; ++j) {
      auto& at = row[static_cast<size_t>(j)];
      at.assign(static_cast<size_t>(i * j) + 1, 0);
      if (i == 0 || j == 0) {
        at[0] = 1;
        continue;
      }
      // The largest value is of the first sample, which then exceeds all j of the other, or of the second.
      const auto &first = before[static_cast<size_t>(j)], &second = row[static_cast<size_t>(j - 1)];
      for (size_t s = 0; s < first.size(); ++s) at[s + static_cast<size_t>(j)] += first[s];
      for (size_t s = 0; s < second.size(); ++s) at[s] += second[s];
    }
  }
  const auto& counts = row[static_cast<size_t>(m)];
  const double all = std::accumulate(counts.begin(), counts.end(), 0.0);
  double tail = 0;
  for (size_t s = 0; s < counts.size() && static_cast<double>(s) <= u; ++s) tail += counts[s];
  return tail / all;
}

json read_document(const std::string& file) {
  const json document = strict_json(read_file(file), file);
  const json results = document.contains("results") ? document["results"] : json::array({document});
  for (const json& result : results)
    if (!result.is_object() || !result.contains("train") || !result["train"].contains("samples_s") || !result.contains("config"))
      throw Error(ExitCode::kUsage, fmt::format("{}: is no document of `tessera bench --json`", file), "tessera bench CONFIG --json > FILE");
  json out{{"results", results}};
  if (document.contains("context")) out["context"] = document["context"];
  return out;
}

}  // namespace

double mann_whitney_p(const std::vector<double>& a, const std::vector<double>& b) {
  const double n = static_cast<double>(a.size()), m = static_cast<double>(b.size());
  if (a.empty() || b.empty()) return 1;
  double u = 0;
  bool ties = false;
  for (const double x : a)
    for (const double y : b) u += x > y ? 1 : x == y ? 0.5 : 0, ties |= x == y;
  const double least = std::min(u, n * m - u);
  if (!ties && a.size() + b.size() <= 20) return std::min(1.0, 2 * exact_tail(static_cast<int64_t>(a.size()), static_cast<int64_t>(b.size()), least));
  std::map<double, double> counts;
  for (const auto* list : {&a, &b})
    for (const double x : *list) ++counts[x];
  double tied = 0;
  for (const auto& [value, count] : counts) tied += count * count * count - count;
  const double all = n + m, variance = n * m / 12 * ((all + 1) - tied / (all * (all - 1)));
  if (variance <= 0) return 1;
  const double z = std::max(0.0, n * m / 2 - least - 0.5) / std::sqrt(variance);
  return std::min(1.0, std::erfc(z / std::sqrt(2.0)));
}

std::vector<Comparison> compare_bench(const std::string& file_a, const std::string& file_b) {
  const json a = read_document(file_a), b = read_document(file_b);
  if (a["results"].size() != b["results"].size())
    throw Error(ExitCode::kUsage, fmt::format("{} holds {} configurations, {} holds {}", file_a, a["results"].size(), file_b, b["results"].size()), "compare documents of the same configurations");
  std::vector<Comparison> out;
  for (size_t i = 0; i < a["results"].size(); ++i) {
    const json &x = a["results"][i], &y = b["results"][i];
    Comparison c{.config = x["config"].get<std::string>(), .other = y["config"].get<std::string>(), .a = {x["train"]["samples_s"].get<std::vector<double>>()}, .b = {y["train"]["samples_s"].get<std::vector<double>>()}};
    c.ratio = c.b.median() > 0 ? c.a.median() / c.b.median() : 0;
    c.p = mann_whitney_p(c.a.values, c.b.values);
    for (const auto& [key, unsaid] : std::vector<std::pair<const char*, json>>{{"dtype", {}}, {"device", {}}, {"params", {}}, {"routing", "natural"}})
      if (x.value(key, unsaid) != y.value(key, unsaid)) c.warning += fmt::format("{}{} {} and {}", c.warning.empty() ? "" : ", ", key, x.value(key, unsaid).dump(), y.value(key, unsaid).dump());
    if (a.contains("context") && b.contains("context") && a["context"].value("machine", "") != b["context"].value("machine", "")) c.warning += (c.warning.empty() ? "" : ", ") + std::string("other machine or version");
    out.push_back(std::move(c));
  }
  return out;
}

}  // namespace tessera
