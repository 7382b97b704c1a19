// What the host functions of kernels take: plain pointers, sizes and these. Free of torch and of CUDA's headers.
#pragma once
#include <cstdint>

namespace tessera::gpu {

struct bf16 {
  uint16_t bits;
};

enum class Type { kFloat, kBf16 };

using Stream = void*;        // a cudaStream_t
using Status = const char*;  // nullptr: launched; else what went wrong, valid until this thread's next launch

}  // namespace tessera::gpu
