// The head as another release may have laid it out: plain data, without this release's types.
#pragma once
#include <cstdint>

struct Head {
  uint32_t size = sizeof(Head);
  uint32_t abi = 3;
  const char* build_key = "";
  uint32_t block_type_size = 8, head_type_size = 8, param_size = 8, field_size = 8;
  void* (*make)() = nullptr;
};
#define ENTRY(...)                                                                    \
  extern "C" __attribute__((visibility("default"))) const Head* tessera_plugin_3() {  \
    static const Head head{__VA_ARGS__};                                              \
    return &head;                                                                     \
  }
