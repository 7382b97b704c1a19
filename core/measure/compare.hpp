// Two measurements of the same thing, and whether they differ by more than their noise.
#pragma once
#include <string>
#include <vector>

#include "measure/bench.hpp"

namespace tessera {

// Two-sided p-value of the Mann-Whitney U test: how probable it is that two samples of the same distribution lie as far apart. Exact for up to 20 values in all without
// ties, else by the normal approximation with ties counted. 1 where a sample is empty. Source: Mann and Whitney 1947, doi:10.1214/aoms/1177730491.
double mann_whitney_p(const std::vector<double>& a, const std::vector<double>& b);

// One configuration of two bench documents.
struct Comparison {
  std::string config, other;     // names
  Samples a, b;                  // seconds of training steps
  double ratio = 0;              // of the medians: above 1 where b is faster
  double p = 1;
  std::string warning;           // other machine, dtype or parameters: why the figures may not be comparable
};
// Of two documents that `bench --json` wrote, in the order of their configurations. Throws Error(kUsage) for a file that is none, or of another number of configurations.
std::vector<Comparison> compare_bench(const std::string& file_a, const std::string& file_b);

}  // namespace tessera
