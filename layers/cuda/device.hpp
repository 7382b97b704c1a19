// What kernels see beside plain C++: CUDA's own words, and these few functions for everything that is an instruction of its own.
// With TESSERA_SIMT the same words come from the emulator in tests/simt, which runs kernels on the CPU.
// Blocks are whole warps; shuffles, votes and products are of all 32 lanes.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "layers/cuda/types.hpp"

#ifdef TESSERA_SIMT
#include "tests/simt/simt.hpp"
#else
#include <cuda_runtime.h>
#endif

namespace tessera::gpu {

using std::max;
using std::min;

constexpr int kWarp = 32;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The block's dynamic shared memory, 16-byte aligned (128 on the GPU); undefined contents.
__device__ inline unsigned char* shared_memory() {
#ifdef TESSERA_SIMT
  return simt::shared_memory();
#else
  extern __shared__ __align__(128) unsigned char tessera_shared[];
  return tessera_shared;
#endif
}

// --- numbers ---------------------------------------------------------------------------------------------------------------------
__device__ inline float to_float(float v) { return v; }
__device__ inline float bits_to_float(uint32_t bits) {
#ifdef TESSERA_SIMT
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
#else
  return __uint_as_float(bits);
#endif
}
__device__ inline uint32_t float_to_bits(float f) {
#ifdef TESSERA_SIMT
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
#else
  return __float_as_uint(f);
#endif
}
__device__ inline float to_float(bf16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }
// The two halves of a packed pair, as mma and ldmatrix know them: the element of the lower index in the lower half.
__device__ inline float low_half(uint32_t pair) { return bits_to_float(pair << 16); }
__device__ inline float high_half(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }

// Rounds to nearest even.
__device__ inline uint32_t pack_bf16(float low, float high) {
#ifdef TESSERA_SIMT
  return simt::round_bf16(low) | static_cast<uint32_t>(simt::round_bf16(high)) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}
template <class T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) { return v; }
template <>
__device__ inline bf16 from_float<bf16>(float v) { return bf16{static_cast<uint16_t>(pack_bf16(v, 0.0f))}; }

// exp and 1/x as exact as T needs: T = float within 2 ulp, T = bf16 by the special function unit (relative error about 1e-6 near zero).
template <class T>
__device__ inline float exp_for(float v) {
  if constexpr (sizeof(T) == 4) return expf(v);
  else return __expf(v);
}
// 2^v; T = bf16: results below the normal numbers are zero.
template <class T>
__device__ inline float exp2_for(float v) {
#ifndef TESSERA_SIMT
  if constexpr (sizeof(T) == 2) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
  }
#endif
  return exp2f(v);
}
template <class T>
__device__ inline float sigmoid_for(float v) {
  if constexpr (sizeof(T) == 4) return 1.0f / (1.0f + expf(-v));
  else return __fdividef(1.0f, 1.0f + __expf(-v));
}

// --- memory ----------------------------------------------------------------------------------------------------------------------
// One access of a vector: its address must be a multiple of its size.
template <class V>
__device__ inline V load_vector(const void* from) {
#ifdef TESSERA_SIMT
  simt::check_aligned(from, sizeof(V));
#endif
  return *static_cast<const V*>(from);
}
template <class V>
__device__ inline void store_vector(void* to, V v) {
#ifdef TESSERA_SIMT
  simt::check_aligned(to, sizeof(V));
#endif
  *static_cast<V*>(to) = v;
}
__device__ inline uint4 load16(const void* from) { return load_vector<uint4>(from); }
__device__ inline void store16(void* to, uint4 v) { store_vector(to, v); }

// N consecutive elements as they lie in memory, not yet converted: the form to keep loads in flight with.
// kWide: accesses of 16 bytes, or of 8 where those do not fill them (addresses are multiples of that), else one element at a time.
template <bool kWide, class T, int N>
struct Pack {
  static constexpr int kBytes = N * static_cast<int>(sizeof(T)), kWords = kWide ? kBytes / 4 : 1;
  static_assert(!kWide || kBytes % 8 == 0);
  uint32_t word[kWords];
  T one[kWide ? 1 : N];

  __device__ void load(const T* from) {
    if constexpr (!kWide) {
#pragma unroll
      for (int i = 0; i < N; ++i) one[i] = from[i];
    } else if constexpr (kBytes % 16 != 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 2) {
        const uint2 v = load_vector<uint2>(reinterpret_cast<const uint32_t*>(from) + i);
        word[i] = v.x, word[i + 1] = v.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = load16(reinterpret_cast<const uint32_t*>(from) + i);
        word[i] = v.x, word[i + 1] = v.y, word[i + 2] = v.z, word[i + 3] = v.w;
      }
    }
  }
  __device__ void store(T* to) const {
    if constexpr (!kWide) {
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = one[i];
    } else if constexpr (kBytes % 16 != 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 2) store_vector(reinterpret_cast<uint32_t*>(to) + i, uint2{word[i], word[i + 1]});
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) store16(reinterpret_cast<uint32_t*>(to) + i, uint4{word[i], word[i + 1], word[i + 2], word[i + 3]});
    }
  }
  __device__ void get(float (&v)[N]) const {
    if constexpr (!kWide) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = to_float(one[i]);
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = bits_to_float(word[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) v[2 * i] = low_half(word[i]), v[2 * i + 1] = high_half(word[i]);
    }
  }
  __device__ void set(const float (&v)[N]) {
    if constexpr (!kWide) {
#pragma unroll
      for (int i = 0; i < N; ++i) one[i] = from_float<T>(v[i]);
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < N; ++i) word[i] = float_to_bits(v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) word[i] = pack_bf16(v[2 * i], v[2 * i + 1]);
    }
  }
};

// N consecutive elements to and from fp32.
template <bool kWide, class T, int N>
__device__ inline void load(const T* from, float (&v)[N]) {
  Pack<kWide, T, N> pack;
  pack.load(from);
  pack.get(v);
}
template <bool kWide, class T, int N>
__device__ inline void store(T* to, const float (&v)[N]) {
  Pack<kWide, T, N> pack;
  pack.set(v);
  pack.store(to);
}

// Copies of 16 bytes from global to shared memory that end with cp_async_wait: all groups but the last `kPending` are then there (for this thread;
// others need a barrier). Only the first `bytes` (0 to 16) are read, the rest is zeros.
__device__ inline void cp_async16(void* to_shared, const void* from, int bytes = 16) {
#ifdef TESSERA_SIMT
  simt::cp_async16(to_shared, from, bytes);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
#endif
}
__device__ inline void cp_async_commit() {
#ifdef TESSERA_SIMT
  simt::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kPending>
__device__ inline void cp_async_wait() {
#ifdef TESSERA_SIMT
  simt::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// --- warps -----------------------------------------------------------------------------------------------------------------------
__device__ inline float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
__device__ inline int shuffle_xor(int v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
__device__ inline float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
__device__ inline int shuffle(int v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
__device__ inline float shuffle_up(float v, int by) { return __shfl_up_sync(0xffffffffu, v, by); }  // the lowest `by` lanes keep their own
__device__ inline int shuffle_up(int v, int by) { return __shfl_up_sync(0xffffffffu, v, by); }
__device__ inline uint32_t ballot(bool v) { return __ballot_sync(0xffffffffu, v); }

// Over the 32 lanes, or over aligned groups of `kLanes`; the same value in each of them.
template <int kLanes = kWarp>
__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}
template <int kLanes = kWarp>
__device__ inline float warp_max(float v) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) v = fmaxf(v, shuffle_xor(v, mask));
  return v;
}
// The sum over lanes 0 to this one.
__device__ inline float warp_scan(float v) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const float other = shuffle_up(v, by);
    if (lane >= by) v += other;
  }
  return v;
}

// --- tensor cores ----------------------------------------------------------------------------------------------------------------
// d [16, 8] += a [16, 16] b [16, 8] with bf16 pairs, fp32 sums. With g = lane / 4 and t = lane % 4 a lane holds
// a: rows g, g+8, g, g+8 at columns 2t, 2t, 2t+8, 2t+8 (and the next); b: rows 2t and 2t+8 (and the next) at column g; d: row g at columns 2t, 2t+1, then row g+8.
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef TESSERA_SIMT
  simt::mma_bf16(d, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Loads N (1, 2 or 4) 8x8 matrices of 16-bit elements from shared memory: lane 8i + r names row r of matrix i (16 bytes, 16-byte aligned; with fewer
// than four matrices the other lanes' addresses do not count). Register i of a lane holds row lane/4, columns 2(lane%4) and the next, of matrix i;
// kTransposed: of its transpose.
template <bool kTransposed, int N>
__device__ inline void ldmatrix(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
#ifdef TESSERA_SIMT
  simt::ldmatrix(r, N, row, kTransposed);
#else
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (N == 1 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  else if constexpr (N == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  else if constexpr (N == 2 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(from) : "memory");
  else if constexpr (N == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(from) : "memory");
  else if constexpr (!kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
#endif
}

}  // namespace tessera::gpu
