#include "head.hpp"

extern "C" __attribute__((visibility("default"))) const Head* tessera_plugin_3() { return nullptr; }
