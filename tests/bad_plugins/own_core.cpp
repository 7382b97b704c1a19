// With a function of libtessera_core of its own, as a plugin has that links the core's sources.
#include "block.hpp"

namespace tessera {
__attribute__((visibility("default"))) const char* core_build_key() { return TESSERA_BUILD_KEY; }
struct Own final : Idle {
  static constexpr BlockInfo kInfo{.type = "own"};
  using Idle::Idle;
};
}  // namespace tessera

TESSERA_PLUGIN(tessera::Own)
