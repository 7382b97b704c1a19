// Runs side by side: those that differ by their seed alone together, with means, intervals, fronts, and as CSV and Markdown.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "report/runs.hpp"

namespace tessera {

// One number of a run.
struct Measure {
  std::string name, title;
  bool more_is_better = false;
  double (*of)(const RunData& run);  // NaN where the run does not say
};
// val_loss, val_accuracy, loss, params, active_params, flops_per_token, tokens, flops, seconds, tokens_per_s, bench_tokens_per_s, peak_bytes.
const std::vector<Measure>& measures();

// A sample's mean with the half width of its 95 % confidence interval by Student's t: NaN below two values. NaN values are left out; n counts the rest.
struct Summary {
  int64_t n = 0;
  double mean, half, low, high;  // low, high: the least and greatest value
};
Summary summarise(const std::vector<double>& values);

// Runs that differ by their seed alone.
struct RunGroup {
  std::string label;                 // what tells it from the other groups, or its run's name
  std::vector<std::string> values;   // of RunComparison::varied
  std::vector<size_t> runs;          // all of them
  std::vector<size_t> counted;       // those that its numbers are of: the finished ones, or all where none is
  std::vector<Summary> summaries;    // one a measure
  std::map<std::string, std::map<std::string, Summary>> by;  // val_accuracy_by -> pairs 16 -> ...
  bool unfinished = false;           // no run of it is finished
  std::string status;                // "3" where all of its runs are finished, else "2 done, 1 diverged"
};

struct RunComparison {
  std::vector<RunData> runs;
  std::vector<nlohmann::json> benches;
  std::vector<std::string> varied;   // keys that differ between groups
  std::vector<RunGroup> groups;
  std::vector<std::string> notes;    // what makes the comparison unfair or incomplete, in sentences
};
RunComparison compare(ReportInput input);

// Which of the points (cost, value) no other is at least as good as in both and better in one; in the order of their cost. Points with a NaN are left out.
std::vector<size_t> pareto_front(const std::vector<std::pair<double, double>>& points, bool more_is_better);

// Of the groups, by their means: fronts["val_loss"]["params"], for losses and accuracies against everything else.
std::map<std::string, std::map<std::string, std::vector<size_t>>> pareto_fronts(const RunComparison& comparison);

// Cumulative wall time and FLOPs of training after each line, from its throughput; NaN from the first line on that lacks it.
std::vector<double> elapsed_seconds(const Metrics& metrics);
std::vector<double> spent_flops(const RunData& run);

// The parts of each `..._by`, numbers in their names in order: {"val_accuracy_by": ["pairs 4", "pairs 16"]}.
std::map<std::string, std::vector<std::string>> by_parts(const RunComparison& comparison);

std::string to_csv(const RunComparison& comparison);       // one row a run; RFC 4180
std::string to_markdown(const RunComparison& comparison);  // notes, one row a group, Pareto fronts, accuracies, what was matched, runs that are not done

// "blocks.mlp.intermediate_size = 408, optimizer.lr = 0.02".
std::string fitted_text(const RunData& run);

// "1.234 ± 0.005", "1.2e+09", "—".
std::string text_of(const Summary& summary);

}  // namespace tessera
