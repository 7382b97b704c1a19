#include <stdexcept>

#include "block.hpp"

namespace tessera {
struct Throwing final : Idle {
  static constexpr BlockInfo kInfo{.type = "throwing"};
  static Schema<Config> schema() { throw std::runtime_error("no schema today"); }
  using Idle::Idle;
};
}  // namespace tessera

TESSERA_PLUGIN(tessera::Throwing)
