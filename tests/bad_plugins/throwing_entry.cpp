#include <stdexcept>

extern "C" __attribute__((visibility("default"))) int tessera_plugin_2() { throw std::runtime_error("no entry today"); }
