// What `tessera bench --json` writes.
#pragma once
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "measure/bench.hpp"

namespace tessera {

// One configuration: an object of its figures. Several: {"results": [...]}. Both with the `context` and `benchmarks` that Google Benchmark's tools read.
nlohmann::json bench_document(const std::vector<BenchResult>& results);

}  // namespace tessera
