#include <fmt/format.h>

#include <cmath>

#include "hf/verify.hpp"

namespace tessera {

void dump_report(const VerifyReport& report, const std::filesystem::path& file) {
  std::vector<TensorSpec> specs;
  for (const VerifyTensor& t : report.tensors) specs.push_back({.name = t.name, .dtype = t.value.scalar_type(), .shape = t.value.sizes().vec()});
  SafetensorsWriter writer(file, specs);
  for (const VerifyTensor& t : report.tensors) writer.write(t.name, t.value);
  writer.finish();
}

nlohmann::json report_json(const VerifyReport& report) {
  nlohmann::json rows = nlohmann::json::array();
  for (const VerifyTensor& t : report.tensors) {
    if (!t.compared) continue;
    nlohmann::json row{{"name", t.name}, {"where", t.where}, {"ok", t.ok}, {"limit", t.limit}, {"error", nullptr}};
    if (t.problem.empty()) row["error"] = t.error;
    else row["problem"] = t.problem;
    rows.push_back(std::move(row));
  }
  for (const std::string& name : report.not_computed) rows.push_back({{"name", name}, {"ok", false}, {"problem", "nothing of this name is computed"}, {"error", nullptr}});
  nlohmann::json out{{"ok", report.num_failed() == 0}, {"compared", report.num_compared()}, {"failed", report.num_failed()}, {"pattern", report.pattern},
                     {"first_difference", nullptr}, {"tensors", rows}, {"notes", report.notes},
                     {"ranks", nlohmann::json::array()}};
  for (const VerifyRank& rank : report.ranks) {
    nlohmann::json sent = nlohmann::json::object();
    for (const auto& [axis, bytes] : rank.sent_bytes) sent[axis] = bytes;
    out["ranks"].push_back({{"parameter_bytes", rank.parameter_bytes}, {"sent_bytes", sent}});
  }
  if (!report.first_difference.empty()) out["first_difference"] = report.first_difference;
  return out;
}

std::string report_text(const VerifyReport& report) {
  // Neighbours that say the same place are one line, with the worst of them.
  std::string text = fmt::format("pattern {}\n", report.pattern);
  for (size_t i = 0; i < report.tensors.size();) {
    const std::string& where = report.tensors[i].where;
    const VerifyTensor* worst = nullptr;
    int64_t compared = 0, failed = 0;
    for (; i < report.tensors.size() && report.tensors[i].where == where; ++i) {
      const VerifyTensor& t = report.tensors[i];
      if (!t.compared) continue;
      ++compared, failed += !t.ok;
      auto rank = [](const VerifyTensor& x) { return x.problem.empty() ? x.error : INFINITY; };
      if (!worst || rank(t) > rank(*worst)) worst = &t;
    }
    if (!compared) continue;
    const std::string error = worst->problem.empty() ? fmt::format("{:.2e} of {:.0e}", worst->error, worst->limit) : worst->problem;
    text += fmt::format("{:7} {:36} {:44} {}{}\n", failed ? "DIFFERS" : "ok", where, worst->name, error, compared > 1 ? fmt::format("  (worst of {})", compared) : "");
  }
  for (const std::string& name : report.not_computed) text += fmt::format("DIFFERS {}: nothing of this name is computed\n", name);
  if (report.num_compared() == 0) return text + "nothing to compare: the reference file holds inputs alone\n";
  if (report.num_failed() == 0) return text + fmt::format("all {} tensors agree\n", report.num_compared());
  return text + fmt::format("{} of {} tensors differ, first at: {}\n", report.num_failed(), report.num_compared(), report.first_difference);
}

}  // namespace tessera
