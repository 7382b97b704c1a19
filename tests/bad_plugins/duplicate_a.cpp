#include "block.hpp"

namespace tessera {
struct Twice final : Idle {
  static constexpr BlockInfo kInfo{.type = "twice"};
  using Idle::Idle;
};
}  // namespace tessera

TESSERA_PLUGIN(tessera::Twice)
