// Small models made from configuration text, and batches of random tokens.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/randint.h>
#include <fmt/format.h>

#include <memory>
#include <string>
#include <vector>

#include "config/config.hpp"
#include "model/model.hpp"
#include "plan/plan.hpp"
#include "plugin/registry.hpp"
#include "store/store.hpp"
#include "train/optimizer.hpp"

namespace tessera {

// The build's plugins and those of TESSERA_PLUGIN_PATH.
inline const Registry& plugins() {
  static const Registry loaded = Registry::load(Registry::search_paths({}));
  return loaded;
}

struct BuildOptions {
  at::ScalarType dtype = at::kFloat;
  std::vector<std::string> recompute = {};
  std::vector<std::string> freeze = {};
  int64_t seed = 3;
  std::vector<std::string> sets = {};
};

// A model with its weights initialised. Stays where it is: the store points at the plan. Runs on one thread: sizes this small gain
// nothing from more, whose spinning takes minutes on a busy machine.
struct Built {
  Built(const std::string& toml, const BuildOptions& o = {})
      : config(parse_config(toml, "test.toml", o.sets, plugins())), plan(make_plan(config)), store(plan, at::kCPU, o.dtype, o.freeze), model(plan, store, o.recompute) {
    at::set_num_threads(1);
    store.initialise(o.seed);
  }
  Built(const Built&) = delete;

  Config config;
  ModelPlan plan;
  Store store;
  Model model;
};

inline std::vector<std::string> parameter_names(const ModelPlan& plan) {
  std::vector<std::string> names;
  for (const TensorRow& row : tensor_rows(plan))
    if (row.param) names.push_back(row.name);
  return names;
}

// int64 [n] uniform in [0, vocab_size).
inline at::Tensor random_ids(int64_t n, int64_t vocab_size, uint64_t seed = 1) {
  return at::randint(vocab_size, {n}, at::detail::createCPUGenerator(seed), at::TensorOptions(at::kLong));
}

// Whole documents of the given lengths.
inline Batch random_batch(const std::vector<int64_t>& lengths, int64_t vocab_size, uint64_t seed = 1) {
  Batch batch{.spans = Spans::documents(lengths)};
  batch.ids_n = random_ids(batch.spans.num_tokens(), vocab_size, seed);
  return batch;
}

}  // namespace tessera
