// A block without mathematics, to be spoilt.
#pragma once
#include "tessera/plugin.hpp"

namespace tessera {
struct Idle : Block {
  struct Config {};
  static Schema<Config> schema() { return {}; }
  static void check(const Config&, const Env&, Issues&) {}
  static ParamTable params(const Config&, const Env&) { return {}; }
  static Cost cost(const Config&, const Env&, const Documents&) { return {}; }
  Idle(const Config&, const Env&) {}
  at::Tensor forward(const at::Tensor& x_nd, const Weights&, Context&) const override { return x_nd; }
};
}  // namespace tessera
