// TESSERA_SIMT=1 in a test program's environment: operators run the GPU's kernels under the emulator.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace {

const bool kLoaded = [] {
  const char* word = std::getenv("TESSERA_SIMT");
  if (!word || std::string_view(word).empty() || std::string_view(word) == "0") return false;
  if (dlopen(TESSERA_BINARY_DIR "/lib/libtessera_simt.so", RTLD_NOW | RTLD_LOCAL)) return true;
  std::fprintf(stderr, "TESSERA_SIMT: %s\n", dlerror());
  std::exit(2);
}();

}  // namespace
