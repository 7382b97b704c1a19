// launch(kernel, grid, block, shared_bytes, stream, args...): a kernel's launch, on the GPU or under the emulator. For .cu files alone.
// Returns a Status. An empty grid launches nothing. Dynamic shared memory may pass 48 KB, up to what the device has.
#pragma once
#include "layers/cuda/device.hpp"

namespace tessera::gpu {

// Bytes of shared memory that a block of the current device may have.
inline size_t most_shared_memory() {
#ifdef TESSERA_SIMT
  return simt::most_shared_memory();
#else
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 48 * 1024;
  return static_cast<size_t>(bytes);
#endif
}

#ifdef TESSERA_SIMT
template <class... P, class... A>
Status launch_as(const char* text, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream, A... args) {
  return simt::run(text, grid, block, shared_bytes, [&] { kernel(static_cast<P>(args)...); });
}
#else
template <class... P, class... A>
Status launch_as(const char*, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, A... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  const auto text = [](cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); };
  if (shared_bytes > 48 * 1024)
    if (const Status bad = text(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes))))
      return bad;
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(args)...);
  return text(cudaGetLastError());
}
#endif

}  // namespace tessera::gpu

// The text names the kernel in the emulator's errors.
#define launch(...) launch_as(#__VA_ARGS__, __VA_ARGS__)
