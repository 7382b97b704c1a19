// The build key: what must be equal between the core and a plugin before C++ types may cross.
#pragma once
#include <torch/headeronly/version.h>

#define TESSERA_ABI 3  // raised with every change to the contract in these headers

#define TESSERA_STR2(x) #x
#define TESSERA_STR(x) TESSERA_STR2(x)
#ifdef __clang__
#define TESSERA_COMPILER "clang-" TESSERA_STR(__clang_major__)
#else
#define TESSERA_COMPILER "gcc-" TESSERA_STR(__GNUC__)
#endif
#define TESSERA_BUILD_KEY                                                                       \
  TESSERA_COMPILER " cxx11abi=" TESSERA_STR(_GLIBCXX_USE_CXX11_ABI) " libtorch=" TESSERA_STR(TORCH_VERSION_MAJOR) "." \
  TESSERA_STR(TORCH_VERSION_MINOR) "." TESSERA_STR(TORCH_VERSION_PATCH) " abi=" TESSERA_STR(TESSERA_ABI)
