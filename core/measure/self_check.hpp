// Whether this machine computes a configuration's blocks right: a figure of a wrong result is worth nothing.
#pragma once
#include <string>
#include <vector>

#include "config/config.hpp"

namespace tessera {

struct SelfCheck {
  std::vector<std::string> checked;   // bindings
  std::vector<std::string> too_large;  // bindings whose fp64 copy would take more than half a GiB
};

// One layer of every block that the configuration uses, on documents of 1, 63 and 130 tokens, in `dtype` against fp64, where operators run as plain compositions: the
// output of the middle token (routers may choose another expert for a few) and the norm of the gradient. Throws Error(kComparison) that names the block and both.
SelfCheck check_blocks(const Config& config, at::ScalarType dtype, at::Device device);

}  // namespace tessera
