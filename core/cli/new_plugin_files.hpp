// What `tessera new-plugin` writes. @NAME@, @CLASS@, @SYMBOL@ and the like are filled in.
#pragma once

namespace tessera {

inline constexpr const char* kBlockFile = R"(// @CLASS@: a gated feed-forward block, y = down_proj(silu(gate x) * (up x)), as a start.
// Letters: N tokens, D hidden, F intermediate width.
#include <ATen/ops/mul.h>
#include <ATen/ops/silu.h>

#include <cmath>

#include "layers/linear.hpp"
#include "tessera/plugin.hpp"

namespace {

using namespace tessera;

class @CLASS@ final : public Block {
 public:
  static constexpr BlockInfo kInfo{.type = "@NAME@", .version = 1, .symbols = {{"card", '@SYMBOL@'}}, .source = "arXiv:2002.05202"};

  struct Config {
    int64_t intermediate_size = 0;
  };

  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("intermediate_size", &Config::intermediate_size, "width of the hidden layer").required().range(1);
    return s;
  }

  // Rules across fields: issues.add("intermediate_size", "must ..., got ...").
  static void check(const Config&, const Env&, Issues&) {}

  // One packed matrix of two segments; every tensor-parallel rank gets its share of each.
  static ParamTable params(const Config& c, const Env& env) {
    const int64_t F = c.intermediate_size, D = env.hidden_size;
    const double out_std = env.init_std / std::sqrt(static_cast<double>(env.num_layers));
    return {
        {.name = "gate_up_proj.weight", .shape = {2 * F, D}, .shards = {{Axis::kTensor, 0}}, .segments = {{"gate", F}, {"up", F}},
         .init = Init::normal(env.init_std)},
        {.name = "down_proj.weight", .shape = {D, F}, .shards = {{Axis::kTensor, 1}}, .init = Init::normal(out_std)},
    };
  }

  static Cost cost(const Config& c, const Env& env, const Documents& documents) {
    const double N = static_cast<double>(num_tokens(documents)), D = static_cast<double>(env.hidden_size), F = static_cast<double>(c.intermediate_size);
    return {.matmul = 6 * N * D * F, .elementwise = 5 * N * F, .bytes = N * (2 * D + 6 * F), .activations = N * (D + 4 * F)};
  }

  @CLASS@(const Config&, const Env&) {}

  at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const override {
    const at::Tensor gate_up = linear(ctx, x_nd, w["gate_up_proj.weight"]);
    const int64_t half = gate_up.size(1) / 2;
    const at::Tensor h_nf = at::mul(at::silu(gate_up.narrow(1, 0, half)), gate_up.narrow(1, half, half));
    return partial_sum_linear(ctx, h_nf, w["down_proj.weight"]);
  }
};

}  // namespace

TESSERA_PLUGIN(@CLASS@)
)";

inline constexpr const char* kCMakeFile = R"(cmake_minimum_required(VERSION 3.25)
project(@NAME@ LANGUAGES CXX)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

find_package(tessera @VERSION@ REQUIRED)  # -Dtessera_DIR names a build folder of tessera, or lib/cmake/tessera of an installation
tessera_add_block(@NAME@)                 # @NAME@.so of @NAME@.cpp; several files: tessera_add_block(@NAME@ SOURCES a.cpp b.cpp)
)";

inline constexpr const char* kReadmeFile = R"(# @NAME@
A block for Tessera: `@NAME@.cpp` declares its keys, parameters and cost, and computes. In this folder:
```sh
@BUILD@
@TEST@
@TRAIN@
```
The first command builds `build/@NAME@.so`; after a change `cmake --build build` does. The second holds it to what every block must hold: gradients, causality, decoding, declared FLOPs and more, in the sizes of `@NAME@.toml`.
The third trains `train-@NAME@.toml`, a small model on the C++ headers of libtorch, into `runs/@NAME@`; `--resume` goes on from there, `--set run.name=another` begins another run.
To see what the block declares: `TESSERA_PLUGIN_PATH=build @TESSERA@ describe @NAME@`. `docs/adding_a_block.md` of Tessera explains each part.
)";

inline constexpr const char* kTrainFile = R"(# A small model of @NAME@ blocks that learns C++ headers, byte by byte.
[run]
name = "@NAME@"

[plugins]
paths = ["build"]

[model]
hybrid_override_pattern = @PATTERN@
vocab_size = 256
hidden_size = 64

[blocks.@NAME@]
intermediate_size = 192
@OTHERS@
[training]
local_batch_size = 4
seq_len = 128
steps = 100
dtype = "float32"

[validation]
interval = 50
tokens = 8192

[optimizer]
lr = 3e-3
weight_decay = 0.1

[lr_scheduler]
warmup_steps = 10
decay_type = "cosine"

[data]
source = "bytes"
path = "{libtorch}/ATen/core/*.h"

[checkpoint]
interval = 100
)";

}  // namespace tessera
