// Whether operators run the GPU's kernels under the emulator of CUDA's threads: some thousand times slower than the CPU's own path.
#pragma once
#include <ATen/ops/empty.h>

#include "layers/gpu.hpp"

namespace tessera {

// In test_gpu_kernels, and in other test programs with TESSERA_SIMT=1.
inline bool emulated() { return gpu_kernels() && gpu_kernels()->takes(at::empty({0})); }
// A size that a test chooses: `usual`, or `small` where it would take the emulator too long.
inline int64_t unless_emulated(int64_t usual, int64_t small) { return emulated() ? small : usual; }

// From now on operators run this build's kernels on copies of their arguments on `device`: see bounced.cpp.
void run_kernels_on(const char* device);

}  // namespace tessera
