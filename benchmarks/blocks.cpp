// One layer of every block type that loads: block/<type>/<pass>/<tokens>/<dtype>. Sizes: configs/bench/blocks.toml, or the file that
// TESSERA_BENCH_CONFIG names. FLOPs and bytes are the declared ones.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <fmt/format.h>

#include <cstdlib>
#include <iostream>
#include <memory>

#include "benchmarks/support.hpp"
#include "checkpoint/file.hpp"
#include "cli/describe.hpp"
#include "model/model.hpp"
#include "plugin/registry.hpp"
#include "store/store.hpp"
#include "tessera/error.hpp"
#include "train/setup.hpp"

namespace tessera::benchmarks {
namespace {

// A model of one layer, whose block is called as the core calls it.
struct Layer {
  Layer(const Config& c, at::ScalarType dtype) : config(c), plan(make_plan(config)), store(plan, at::kCPU, dtype), block(plan.layers[0].type->make(plan.layers[0].config, plan.env)) {
    store.initialise(1);
  }
  Cost cost(const Documents& documents) const { return plan.layers[0].type->cost(plan.layers[0].config, plan.env, documents); }
  at::Tensor forward(const at::Tensor& x_nd, const Spans& spans, const DecodeState* state, bool training) {
    Context ctx(spans);
    ctx.set_mesh(plan.env.mesh);
    ctx.set_training(training);
    if (state) ctx.set_states(&state->layer(0));
    return block->forward(x_nd, store.gather(plan.layers[0].prefix), ctx);
  }

  Config config;
  ModelPlan plan;
  Store store;
  std::unique_ptr<Block> block;
};

Case with_cost(Layer& layer, const Documents& documents, at::ScalarType dtype, std::function<at::Tensor()> call, std::vector<at::Tensor> leaves) {
  const Cost cost = layer.cost(documents);
  return {std::move(call), std::move(leaves), static_cast<double>(num_tokens(documents)), cost.flops(), cost.bytes * (dtype == at::kBFloat16 ? 2 : 4)};
}

void pass(benchmark::State& state, const Config& config, at::ScalarType dtype, int64_t batch, int64_t length, bool backward) {
  Layer layer(config, dtype);
  const Spans spans = Spans::uniform(batch, length);
  const at::Tensor x_nd = at::randn({batch * length, config.model.hidden_size}, dtype);
  time_case(state, with_cost(layer, {{.length = length, .count = batch}}, dtype, [&] { return layer.forward(x_nd, spans, nullptr, backward); }, {x_nd}), backward);
}

// One token a sequence after `context` others; the state is not advanced, so that every round does the same.
void decode(benchmark::State& state, const Config& config, at::ScalarType dtype, int64_t batch, int64_t context) {
  Layer layer(config, dtype);
  DecodeState cache(layer.plan, batch, at::kCPU, dtype);
  cache.reserve(context + 1);
  std::vector<Span> list;
  for (int64_t s = 0; s < batch; ++s) list.push_back({s, context, 1, context + 1, s});
  const Spans spans(list);
  const at::Tensor x_nd = at::randn({batch, config.model.hidden_size}, dtype);
  const Case c{[&] { return layer.forward(x_nd, spans, &cache, false); }, {}, static_cast<double>(batch)};
  time_case(state, c, false);
}

void add(const std::string& name, std::function<void(benchmark::State&)> run) {
  benchmark::RegisterBenchmark(name.c_str(), [run = std::move(run)](benchmark::State& state) { run(state); })->Unit(benchmark::kMicrosecond)->UseRealTime();
}

// The file's sizes, or the least that the keys allow.
Config config_for(const Registry& registry, const BlockType& type, const std::string& text, const std::string& file) {
  std::vector<std::string> sets{"model.hybrid_override_pattern=\"X\"", fmt::format("symbols.X=\"{}\"", type.type())};
  try {
    return parse_config(text, file, sets, registry);
  } catch (const Error&) {
    std::vector<std::pair<std::string, Value>> given;
    if (!example_config(type, {.hidden_size = 512, .vocab_size = 256, .num_layers = 1}, given)) throw;
    for (const auto& [key, value] : given) sets.push_back(fmt::format("blocks.{}.{}={}", type.type(), key, to_toml(value)));
    return parse_config(text, file, sets, registry);
  }
}

int run_blocks(int argc, char** argv) {
  static const Registry registry = Registry::load(Registry::search_paths({}));
  const char* named = std::getenv("TESSERA_BENCH_CONFIG");
  const std::string file = named ? named : TESSERA_SOURCE_DIR "/configs/bench/blocks.toml", text = read_file(file);
  for (const BlockType* type : registry.blocks()) {
    const Config config = config_for(registry, *type, text, file);
    apply_runtime(config.training);
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      const auto name = [&](const char* what, const std::string& tokens) { return fmt::format("block/{}/{}/{}/{}", type->type(), what, tokens, dtype_word(dtype)); };
      for (const auto& [batch, length] : {std::pair<int64_t, int64_t>{4, 512}, {1, 2048}, {120, 17}}) {
        add(name("fwd", fmt::format("{}x{}", batch, length)), [=](benchmark::State& s) { pass(s, config, dtype, batch, length, false); });
        add(name("fwd_bwd", fmt::format("{}x{}", batch, length)), [=](benchmark::State& s) { pass(s, config, dtype, batch, length, true); });
      }
      for (const auto& [batch, context] : {std::pair<int64_t, int64_t>{1, 64}, {1, 4096}, {16, 1024}})
        add(name("decode", fmt::format("batch_{}/context_{}", batch, context)), [=](benchmark::State& s) { decode(s, config, dtype, batch, context); });
    }
  }
  return run(argc, argv);
}

}  // namespace
}  // namespace tessera::benchmarks

int main(int argc, char** argv) {
  try {
    return tessera::benchmarks::run_blocks(argc, argv);
  } catch (const tessera::Error& error) {
    std::cerr << error.what() << "\n";
    return static_cast<int>(error.code());
  }
}
