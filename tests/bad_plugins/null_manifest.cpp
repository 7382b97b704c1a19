#include "block.hpp"

extern "C" __attribute__((visibility("default"))) const tessera::PluginHead* tessera_plugin_3() {
  static const tessera::PluginHead head{.build_key = TESSERA_BUILD_KEY, .make = []() -> tessera::Manifest* { return nullptr; }};
  return &head;
}
