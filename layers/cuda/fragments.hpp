// Matrix products of a warp from tiles in shared memory: bf16 on the tensor cores, fp32 by plain multiply-adds over the same fragments.
// A product's step is d [16, 8] += a [16, 16] b [16, 8]; see mma_bf16 in device.hpp for who holds what.
#pragma once
#include "layers/cuda/device.hpp"

namespace tessera::gpu {

// Register i of a holds the pair at row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next; of b that at rows 2t + 8 i and the next, column g.
template <class T, int N>
struct Fragment;
template <int N>
struct alignas(4 * N) Fragment<bf16, N> {
  uint32_t r[N];
  __device__ void set(int i, float low, float high) { r[i] = pack_bf16(low, high); }
  __device__ float low(int i) const { return low_half(r[i]); }
  __device__ float high(int i) const { return high_half(r[i]); }
};
template <int N>
struct alignas(16) Fragment<float, N> {
  float r[2 * N];
  __device__ void set(int i, float low, float high) { r[2 * i] = low, r[2 * i + 1] = high; }
  __device__ float low(int i) const { return r[2 * i]; }
  __device__ float high(int i) const { return r[2 * i + 1]; }
};
template <class T>
using FragmentA = Fragment<T, 4>;
template <class T>
using FragmentB = Fragment<T, 2>;

// mma_bf16 in fp32: every operand comes from the lane that holds it.
__device__ inline void mma_by_shuffles(float (&d)[4], const Fragment<float, 4>& a, const Fragment<float, 2>& b) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, t = lane % 4;
#pragma unroll 1  // a quarter of the code; what differs between the turns is only which lane owns an operand
  for (int owner = 0; owner < 4; ++owner)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i % 2, block = i / 2;
      const float upper = shuffle(a.r[4 * block + half], lane - t + owner), lower = shuffle(a.r[4 * block + 2 + half], lane - t + owner);
      const float left = shuffle(b.r[2 * block + half], 8 * t + owner), right = shuffle(b.r[2 * block + half], 8 * t + 4 + owner);
      d[0] = fmaf(upper, left, d[0]), d[1] = fmaf(upper, right, d[1]), d[2] = fmaf(lower, left, d[2]), d[3] = fmaf(lower, right, d[3]);
    }
}

__device__ inline void multiply(float (&d)[4], const Fragment<bf16, 4>& a, const Fragment<bf16, 2>& b) { mma_bf16(d, a.r, b.r); }
__device__ inline void multiply(float (&d)[4], const Fragment<float, 4>& a, const Fragment<float, 2>& b) {
#ifdef TESSERA_SIMT
  simt::mma_f32(d, a.r, b.r);  // what mma_by_shuffles gives, in one meeting of the warp instead of 64
#else
  mma_by_shuffles(d, a, b);
#endif
}

// Rows m0.. and columns k0.. of A from a tile that holds A by rows, or its transpose (kTransposed). Rows of a tile are `stride` elements apart, a multiple of 16 bytes.
template <bool kTransposed, class T>
__device__ inline void load_a(FragmentA<T>& a, const T* tile, int stride, int m0, int k0) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if constexpr (sizeof(T) == 2) {
    const int m = m0 + 8 * (lane / 8 % 2), k = k0 + 8 * (lane / 16), r = lane % 8;
    ldmatrix<kTransposed>(a.r, kTransposed ? tile + (k + r) * stride + m : tile + (m + r) * stride + k);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = m0 + lane / 4 + 8 * (i % 2), k = k0 + 2 * (lane % 4) + 8 * (i / 2);
      a.set(i, kTransposed ? tile[k * stride + m] : tile[m * stride + k], kTransposed ? tile[(k + 1) * stride + m] : tile[m * stride + k + 1]);
    }
  }
}
// Rows k0.. and columns n0.., n0 + 8.. of B from a tile that holds B by columns (rows of the tile are n), or by rows (kByRows: they are k).
template <bool kByRows, class T>
__device__ inline void load_b(FragmentB<T> (&b)[2], const T* tile, int stride, int n0, int k0) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if constexpr (sizeof(T) == 2) {
    const int k = k0 + 8 * (lane / 8 % 2), n = n0 + 8 * (lane / 16), r = lane % 8;
    uint32_t all[4];
    ldmatrix<kByRows>(all, kByRows ? tile + (k + r) * stride + n : tile + (n + r) * stride + k);
    b[0].r[0] = all[0], b[0].r[1] = all[1], b[1].r[0] = all[2], b[1].r[1] = all[3];
  } else {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = n0 + 8 * j + lane / 4, k = k0 + 2 * (lane % 4) + 8 * i;
        b[j].set(i, kByRows ? tile[k * stride + n] : tile[n * stride + k], kByRows ? tile[(k + 1) * stride + n] : tile[n * stride + k + 1]);
      }
  }
}

// The elements of d that a lane holds: row g + 8 (e / 2), column 2t + e % 2.
__device__ inline int row_of(int e) { return static_cast<int>(threadIdx.x) % kWarp / 4 + 8 * (e / 2); }
__device__ inline int column_of(int e) { return 2 * (static_cast<int>(threadIdx.x) % 4) + e % 2; }

// Copies [rows, columns] from memory into a tile of kRows x kColumns, the rest zeros, by all `kThreads` of the block. `wide`: by cp.async, to be waited
// for; columns and strides are whole 16-byte vectors. Without it elements are stored at once.
template <int kRows, int kColumns, int kThreads, class T>
__device__ inline void load_tile(bool wide, T* tile, int stride, const T* from, int64_t from_stride, int rows, int columns) {
  if (wide) {
    constexpr int V = 16 / static_cast<int>(sizeof(T)), kAcross = kColumns / V;
#pragma unroll 1  // addresses worked out ahead would cost registers, and nothing waits for these copies
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kAcross; i += kThreads) {
      const int r = i / kAcross, c = i % kAcross * V;
      const bool inside = r < rows && c < columns;
      cp_async16(tile + r * stride + c, inside ? from + r * from_stride + c : from, inside ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns; i += kThreads) {
      const int r = i / kColumns, c = i % kColumns;
      tile[r * stride + c] = r < rows && c < columns ? from[r * from_stride + c] : from_float<T>(0.0f);
    }
  }
}
__device__ inline void wait_for_tiles() {
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
}

}  // namespace tessera::gpu
