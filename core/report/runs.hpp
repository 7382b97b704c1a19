// Run folders, sweep folders and bench files as data to compare. Nothing is loaded but configurations and what runs wrote beside them.
#pragma once
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace tessera {

// One layer of a stack.
struct StackCell {
  std::string symbol, block, type;  // letter, binding, block type; block and type are empty where the configuration could not be read
  int64_t elements = 0;             // of parameters, 0 where it uses another layer's
  int64_t stage = 0;
  bool head = false;                // of the head's inner stack
};

// How many tokens each expert of a layer got, in the steps that recorded it.
struct ExpertLoad {
  std::vector<double> steps;
  std::vector<std::vector<double>> counts;  // one row a step, one number an expert
};

// What metrics.jsonl holds. A column has one number a step: NaN where the line has none, or null, as NaN and infinities are written.
struct Metrics {
  std::vector<double> steps;
  std::map<std::string, std::vector<double>> columns;                 // `loss`, `tokens`, ...; of layers only their imbalance
  std::map<std::string, std::map<std::string, double>> by;            // the last `val_accuracy_by` and the like: {"pairs 16": 0.98}
  std::map<std::string, ExpertLoad> loads;                            // "layers.3.expert_load"
  int64_t unreadable = 0;                                             // lines, a last one without its end left out
  const std::vector<double>* column(const std::string& name) const;   // nullptr where no line has it
};
Metrics parse_metrics(std::string_view text);

// One run folder, or one trial that has not begun.
struct RunData {
  std::string name, folder;
  std::string state;                 // done, failed, interrupted, running, stopped, diverged; without trial.json: done, unfinished, no metrics
  std::string error;                 // why a trial failed or ended early
  std::optional<int64_t> seed;
  std::string config_text;
  bool configured = false;           // its configuration could be read
  std::map<std::string, std::string> keys;  // of the configuration, or of trial.json where there is none: "model.hidden_size" -> "64", strings without quotes
  std::vector<std::string> notes;    // what is wrong with it, in sentences
  std::vector<StackCell> stack;
  double params = 0, active_params = 0, flops_per_token = 0;  // from the plan; NaN where the configuration could not be read. Training FLOPs: 3 x forward
  std::map<std::string, double> elements;  // trained parameters by block, embedding and output
  std::map<std::string, double> memory;    // planned bytes of a rank: parameters, gradients, ...
  Metrics metrics;
  std::vector<nlohmann::json> starts;      // starts.jsonl: version and machine of each start
  std::string match;                       // of a trial: what it was matched in, and how near; empty where it was not
  double match_error = 0;                  // signed share of the target
  std::map<std::string, std::string> fitted;  // of a trial: keys that matching and the rule of the learning rate set
  double bench_tokens_per_s = std::numeric_limits<double>::quiet_NaN();  // of training, where a bench file has measured this trial
  bool done() const { return state == "done"; }
};

// What was named on the command line. Throws Error(kUsage) that names a path that is neither a run, a sweep nor the output of `bench --json`.
struct ReportInput {
  std::vector<RunData> runs;              // those of a sweep in the order of their names
  std::vector<nlohmann::json> benches;    // one object a configuration
};
ReportInput read_report_input(const std::vector<std::string>& paths);

}  // namespace tessera
