#include <stdexcept>

extern "C" __attribute__((visibility("default"))) int tessera_plugin_3() { throw std::runtime_error("no entry today"); }
