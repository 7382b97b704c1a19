// What a test program runs its operators on, by its environment. TESSERA_SIMT=1: the GPU's kernels under the emulator. TESSERA_TEST_DEVICE=cuda: those of a
// CUDA build on the GPU.
#include "tests/support/emulated.hpp"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace tessera {
namespace {

const bool kChosen = [] {
  const auto word = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string_view(value ? value : "");
  };
  if (const auto simt = word("TESSERA_SIMT"); !simt.empty() && simt != "0" && !dlopen(TESSERA_BINARY_DIR "/lib/libtessera_simt.so", RTLD_NOW | RTLD_LOCAL)) {
    std::fprintf(stderr, "TESSERA_SIMT: %s\n", dlerror());
    std::exit(2);
  }
  if (const auto device = word("TESSERA_TEST_DEVICE"); !device.empty()) run_kernels_on(device.data());
  return true;
}();

}  // namespace
}  // namespace tessera
