// What the loader says of each plugin in bad_plugins/ of the build folder.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "tessera/plugin.hpp"

namespace tessera {

struct Refusal {
  std::string name;  // of the file, without .so
  std::string why;   // after "error: plugin FILE: "
};

inline std::filesystem::path bad_plugin(const std::string& name) { return std::filesystem::path(TESSERA_BINARY_DIR) / "bad_plugins" / (name + ".so"); }

inline std::vector<Refusal> refusals() {
  const std::string rebuild = "\nhelp: rebuild the plugin against this tessera's headers and libtorch", macro = "\nhelp: a plugin ends with TESSERA_PLUGIN(Type) in one of its files";
  const auto undefined = [&](const std::string& name, const char* symbol) { return "cannot be loaded: " + bad_plugin(name).string() + ": undefined symbol: " + symbol + rebuild; };
  return {
      {"no_entry", "exports no entry `tessera_plugin_3`" + macro + "; the number is the ABI it was built for"},
      {"null_head", "tessera_plugin_3() returned null" + macro},
      {"wrong_size", "its head has 24 bytes, this tessera's has " + std::to_string(sizeof(PluginHead)) + rebuild},
      {"wrong_abi", "ABI 7, this tessera has ABI 3" + rebuild},
      {"wrong_build_key", std::string("build key 'gcc-4 cxx11abi=0 libtorch=1.0.0 abi=1', this tessera has '") + core_build_key() + "'" + rebuild},
      {"wrong_struct_size", "its Param has 4 bytes, this tessera's has " + std::to_string(sizeof(Param)) + rebuild},
      {"throwing", "its types cannot be made: no schema today"},
      {"throwing_entry", "tessera_plugin_3() failed: no entry today"},
      {"null_manifest", "its `make` returned null" + macro},
      {"undefined_symbol", undefined("undefined_symbol", "nobody_defines_this")},
      {"other_torch", undefined("other_torch", "_ZN2at4_ops27operator_of_another_releaseEi")},
      {"other_torch_file", "cannot be loaded: libtorch_of_another_release.so: cannot open shared object file: No such file or directory" + rebuild},
      {"own_core", "uses a copy of libtessera_core of its own, " + bad_plugin("own_core").string() + ", this tessera has " TESSERA_BINARY_DIR "/lib/libtessera_core.so"
                   "\nhelp: link tessera::core, as tessera_add_block does, and neither its sources nor an archive of them"},
  };
}

}  // namespace tessera
