#include <stdexcept>

#include "block.hpp"

namespace tessera {
struct Unmade final : Idle {
  static constexpr BlockInfo kInfo{.type = "unmade"};
  Unmade(const Config& config, const Env& env) : Idle(config, env) { throw std::runtime_error("no block today"); }
};
}  // namespace tessera

TESSERA_PLUGIN(tessera::Unmade)
