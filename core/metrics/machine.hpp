// What this machine does at best, measured, and what this process takes.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace tessera {

// FLOP/s of a square matrix product, the best of several after a warm-up, at the size that this dtype and device are fastest of those tried. Takes
// about 0.4 s, with the threads that libtorch is set to.
double measure_matrix_peak(at::ScalarType dtype, at::Device device);
// Bytes/s read and written by copying a buffer beyond the caches; the best of several. About 0.2 s.
double measure_memory_peak(at::Device device);
// True where a small CPU product takes less time in bfloat16 than in fp32: on machines without the instructions it is far slower.
bool supports_fast_bf16();

// What peak_memory_bytes() says begins anew from what the process holds now, where the system lets it.
void forget_peak_memory();
// The most host memory this process has held, and what it holds now: resident bytes.
int64_t peak_memory_bytes();
int64_t current_memory_bytes();

// "AMD EPYC 9B45"; "unknown processor" where the system does not say.
std::string processor_name();
// "AMD EPYC 9B45, 2 cores, tessera 0.1.0".
std::string machine_text();

}  // namespace tessera
