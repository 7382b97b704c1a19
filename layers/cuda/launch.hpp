// launch(kernel, grid, block, shared_bytes, stream, args...): a kernel's launch, on the GPU or under the emulator. For .cu files alone.
// Returns a Status. An empty grid launches nothing. Dynamic shared memory may pass 48 KB, up to what the device has.
#pragma once
#include "layers/cuda/device.hpp"

namespace tessera::gpu {

// Of the current device: bytes of shared memory that a block may have, and multiprocessors (two in the emulator, so that a block's work there is not
// always the least that it can be). What a kernel computes must not depend on the number of multiprocessors.
#ifdef TESSERA_SIMT
inline size_t most_shared_memory() { return simt::most_shared_memory(); }
inline int multiprocessors() { return 2; }
#else
inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : otherwise;
}
inline size_t most_shared_memory() { return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 48 * 1024)); }
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount, 132); }
#endif

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
