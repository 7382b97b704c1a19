// What this machine takes for a unit of each kind of work, from measured training steps.
#pragma once
#include <vector>

#include "measure/bench.hpp"
#include "measure/prediction.hpp"

namespace tessera {

struct Sample {
  std::vector<double> work;
  double value = 0;   // measured
  double weight = 1;  // of its error
};
// All samples have as many terms. The non-negative rates for which the weighted squares of `work` x rates - value have the least sum: all subsets of the terms are solved, and the best solution without a negative rate is it.
std::vector<double> fit_rates(const std::vector<Sample>& samples);

// Throws Error(kUsage) where so many configurations are too few to calibrate by.
void require_enough(size_t num_configs);
// From one result for each configuration, measured in one process with the same device, dtype and threads. Throws Error(kUsage) where these differ, or there are too few.
Calibration calibrate(const std::vector<Config>& configs, const std::vector<BenchResult>& results);

}  // namespace tessera
