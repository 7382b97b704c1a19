// Fair comparison: one or two sizes of a configuration are changed until it costs what another one costs. Everything is read from the blocks' declared tables.
#pragma once
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "config/toml_tree.hpp"
#include "plan/plan.hpp"

namespace tessera {

// A key that may change: an integer key of a block or head (`blocks.mlp.intermediate_size`), `model.hidden_size`, or `model.hybrid_override_pattern`,
// whose value is how often the pattern's main part stands in the result.
struct BendKey {
  std::string key;
  int64_t multiple_of = 1;   // only multiples are tried
  int64_t min = 0, max = 0;  // 0: a 64th of what the configuration has, and 64 times that
};
Schema<BendKey> bend_schema();

// [match]
struct MatchRule {
  std::string of;
  std::optional<double> target;  // none: what the base configuration has
  std::vector<BendKey> bend;     // one or two
  double tolerance = 0.01;       // of the target
};
Schema<MatchRule> match_schema();

// Reads the table that issues call `path`. Beside the keys of the schema: `target`, a number or "base", which is the default, and
// `bend`, a key, a table of bend_schema, or an array of one or two of either.
MatchRule read_match(const std::string& path, const TomlNode& node, Issues& issues);

// Seconds of a training step, predicted.
using StepTime = std::function<double(const ModelPlan& plan, const Config& config)>;

// What `config` has of `of`:
//   params         trained parameters
//   active_params  active_parameters (plan/active.hpp)
//   flops          of the forward pass, a token, in documents of training.seq_len tokens, the head's passes included
//   state_bytes    of the decode state of one sequence of training.seq_len tokens; training.dtype "auto" counts as float32
//   step_time      seconds, by `step_time`
// Throws Error(kUsage) for step_time without a function.
double match_metric(const std::string& of, const Config& config, const StepTime& step_time = {});

struct Match {
  std::vector<std::pair<std::string, std::string>> sets;  // keys and values as `--set` takes them; none where nothing of the pattern bends
  double target = 0, value = 0;
  double error() const { return value / target - 1; }  // relative, signed
  std::string text;     // `params 1203712, +0.31 % of 1200000, with blocks.mlp.intermediate_size = 408`
  std::string proof;    // why no legal value is nearer
  std::string refusal;  // empty within the tolerance; else what to tell, of two lines with the proof
  std::vector<std::string> notes;
  int64_t tried = 0;    // configurations
};

// The legal value of one key, or pair of values of two, for which `config` is nearest to `target`; legal is what check_config has no issue with. Keys of blocks that
// the pattern does not use stay as they are.
//   One key: the nearest of all values. Up to 256 values are all tried; else the metric is taken to rise or fall with the key, which is checked at every value that is
//   looked at, eight legal neighbours on either side and eight over the range included, and where it does not, all values are tried.
//   Two keys: both are first scaled alike. Values of the first key from there outward are tried, for each the nearest of the second: the nearest pair of the first
//   eight legal ones where that is within the tolerance, else the first pair that is, else the nearest of all. Values of the first key for which the smallest and the
//   largest of the second both miss the target on one side are left out, eight excepted, where these rise or fall with the first at every value that is looked at.
// Equally near values: the one nearest to what the configuration has. Throws Error(kUsage) for a key that cannot bend, and where more than 10^6 values would have to be tried.
Match match_config(const MatchRule& rule, const Config& config, double target, const StepTime& step_time = {});

}  // namespace tessera
