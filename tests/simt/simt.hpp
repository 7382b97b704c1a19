// An emulator of CUDA's threads on the CPU, for testing kernels without a GPU: it stands in for CUDA's headers where TESSERA_SIMT is defined.
// Every thread of a block is a fiber with a stack of its own; blocks run one after the other on the thread that launches. Which fiber runs next is drawn
// at random (TESSERA_SIMT_SEED, else always the same), so that a missing barrier shows: a fiber runs until it meets a barrier or an operation of its warp.
// Dynamic shared memory is filled with NaN for every block. An error ends the launch and names the kernel: a barrier that not all threads reach, lanes of
// a warp at different operations, a misaligned access, an operand that lies outside shared memory where it must lie inside.
// A plain access outside dynamic shared memory hits a page without rights: the program ends, and says in which kernel.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static thread_local  // shared by the fibers of a block; keeps what the block before left there
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace simt {

#define SIMT_API __attribute__((visibility("default")))

// Runs the kernel for every thread; nullptr, or what went wrong, valid until this thread's next run. `text` begins with the kernel's name.
SIMT_API const char* run(const char* text, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// What a block may have: an H100's 227 KB, or as many as TESSERA_SIMT_SHARED_KB says.
SIMT_API size_t most_shared_memory();

struct Place {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
SIMT_API const Place& here();
SIMT_API unsigned char* shared_memory();

SIMT_API void sync_block();
// The block's barrier; returns the sum of `value` over its threads.
SIMT_API int sync_block_sum(int value);

// All lanes of a warp meet: the last one calls all(inputs, outputs) for the 32 of them.
SIMT_API void meet(const char* operation, const void* in, void* out, void (*all)(const void* const* in, void* const* out));
SIMT_API void check_aligned(const void* address, size_t bytes);

SIMT_API uint16_t round_bf16(float v);
SIMT_API void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
SIMT_API void mma_f32(float (&d)[4], const float (&a)[8], const float (&b)[4]);
SIMT_API void ldmatrix(uint32_t* registers, int matrices, const void* row, bool transposed);
SIMT_API void cp_async16(void* to_shared, const void* from, int bytes);
SIMT_API void cp_async_commit();
SIMT_API void cp_async_wait(int pending);

template <class T>
struct Shuffle {
  T value;
  int argument;
};
// `from`(lane, argument) is the lane whose value a lane gets.
template <class T, int (*from)(int, int)>
T shuffle(const char* operation, T value, int argument) {
  const Shuffle<T> in{value, argument};
  T out;
  meet(operation, &in, &out, [](const void* const* ins, void* const* outs) {
    for (int lane = 0; lane < 32; ++lane) {
      const int source = from(lane, static_cast<const Shuffle<T>*>(ins[lane])->argument);
      *static_cast<T*>(outs[lane]) = static_cast<const Shuffle<T>*>(ins[source])->value;
    }
  });
  return out;
}
inline int from_xor(int lane, int mask) { return (lane ^ mask) & 31; }
inline int from_lane(int, int lane) { return lane & 31; }
inline int from_below(int lane, int by) { return lane >= by ? lane - by : lane; }
inline int from_above(int lane, int by) { return lane + by < 32 ? lane + by : lane; }

}  // namespace simt

#define threadIdx (simt::here().thread)
#define blockIdx (simt::here().block)
#define blockDim (simt::here().block_dim)
#define gridDim (simt::here().grid_dim)

inline void __syncthreads() { simt::sync_block(); }
inline int __syncthreads_count(int v) { return simt::sync_block_sum(v != 0); }
inline int __syncthreads_or(int v) { return simt::sync_block_sum(v != 0) != 0; }
inline void __syncwarp(unsigned = ~0u) { simt::meet("__syncwarp", nullptr, nullptr, [](const void* const*, void* const*) {}); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) { return simt::shuffle<T, simt::from_xor>("__shfl_xor_sync", v, mask); }
template <class T>
T __shfl_sync(unsigned, T v, int lane) { return simt::shuffle<T, simt::from_lane>("__shfl_sync", v, lane); }
template <class T>
T __shfl_up_sync(unsigned, T v, int by) { return simt::shuffle<T, simt::from_below>("__shfl_up_sync", v, by); }
template <class T>
T __shfl_down_sync(unsigned, T v, int by) { return simt::shuffle<T, simt::from_above>("__shfl_down_sync", v, by); }
inline unsigned __ballot_sync(unsigned, int v) {
  unsigned out = 0;
  simt::meet("__ballot_sync", &v, &out, [](const void* const* in, void* const* outs) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= (*static_cast<const int*>(in[lane]) != 0 ? 1u : 0u) << lane;
    for (int lane = 0; lane < 32; ++lane) *static_cast<unsigned*>(outs[lane]) = bits;
  });
  return out;
}
inline int __any_sync(unsigned, int v) { return __ballot_sync(~0u, v) != 0; }
inline int __all_sync(unsigned, int v) { return __ballot_sync(~0u, v) == ~0u; }

// Integers alone: a sum of floats by atomics would depend on the order.
template <class T>
  requires std::is_integral_v<T>
T atomicAdd(T* at, T v) {
  const T old = *at;
  *at = static_cast<T>(old + v);
  return old;
}
template <class T>
  requires std::is_integral_v<T>
T atomicMax(T* at, T v) {
  const T old = *at;
  if (v > old) *at = v;
  return old;
}
template <class T>
  requires std::is_integral_v<T>
T atomicMin(T* at, T v) {
  const T old = *at;
  if (v < old) *at = v;
  return old;
}

inline float __expf(float v) { return std::exp(v); }
inline float __logf(float v) { return std::log(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
template <class T>
T __ldg(const T* p) { return *p; }
