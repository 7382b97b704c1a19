// Single-threaded products of small cache-resident fp32 tiles, for operators that fuse a few of them: C (+)= A B.
// A's element (m, k) lies at a[m * a_row + k * a_col], so A may be transposed in place. B and C are row-major with leading dimensions
// that are multiples of kTileCols. Every tile is padded: rows to a multiple of kTileRows, columns to a multiple of kTileCols; padded rows
// and columns hold finite values that never mix with the others, except over k, which is exact.
// Faster than a BLAS call at these sizes (64 to 128 a side), and it skips what a triangular factor leaves out.
#pragma once
#include <cstdint>

namespace tessera {

#ifdef __AVX512F__
inline constexpr int kVectorLanes = 16, kTileRows = 8;
#else
inline constexpr int kVectorLanes = 8, kTileRows = 4;
#endif
inline constexpr int64_t kTileCols = 16;

inline int64_t pad_rows(int64_t n) { return (n + 7) / 8 * 8; }
inline int64_t pad_cols(int64_t n) { return (n + kTileCols - 1) / kTileCols * kTileCols; }

namespace detail {

typedef float Vector __attribute__((vector_size(kVectorLanes * 4), aligned(4), may_alias));

// The lanes' sum by halves.
inline float lanes_sum(Vector sum) {
  float part[kVectorLanes];
  for (int l = 0; l < kVectorLanes; ++l) part[l] = sum[l];
  for (int width = kVectorLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) part[l] += part[l + width];
  return part[0];
}

template <int kVectors, bool kAccumulate>
inline void tile_block(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k_begin,
                       int64_t k_end) {
  Vector sum[kTileRows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kAccumulate) sum[m][v] = *reinterpret_cast<const Vector*>(c + m * ldc + v * kVectorLanes);
      else sum[m][v] = Vector{};
    }
  for (int64_t k = k_begin; k < k_end; ++k) {
    const float* a_k = a + k * a_col;
    Vector b_k[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b_k[v] = *reinterpret_cast<const Vector*>(b + k * ldb + v * kVectorLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] += a_k[m * a_row] * b_k[v];
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector*>(c + m * ldc + v * kVectorLanes) = sum[m][v];
}

}  // namespace detail

// What of A (rows x inner) is known to be zero, and skipped.
enum class Triangle { kNone, kLower, kUpper };  // kLower: A is zero for k > m; kUpper: zero for k < m

// C[rows, cols] (+)= A[rows, inner] B[inner, cols]. Rows are rounded up to kTileRows, cols to kTileCols.
// With a triangle, entries on the wrong side but within the same block of kTileRows are read: they must hold zeros.
template <bool kAccumulate>
inline void tile_gemm(int64_t rows, int64_t cols, int64_t inner, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb,
                      float* c, int64_t ldc, Triangle triangle = Triangle::kNone) {
  constexpr int64_t kWide = 2 * kVectorLanes;
  for (int64_t n = 0; n < pad_cols(cols); n += kWide) {
    const bool wide = pad_cols(cols) - n >= kWide;
    for (int64_t m = 0; m < rows; m += kTileRows) {
      const int64_t begin = triangle == Triangle::kUpper ? (m < inner ? m : inner) : 0;
      const int64_t end = triangle == Triangle::kLower && m + kTileRows < inner ? m + kTileRows : inner;
      const float* a_m = a + m * a_row;
      float* c_mn = c + m * ldc + n;
      if (wide) detail::tile_block<2, kAccumulate>(a_m, a_row, a_col, b + n, ldb, c_mn, ldc, begin, end);
      else detail::tile_block<1, kAccumulate>(a_m, a_row, a_col, b + n, ldb, c_mn, ldc, begin, end);
    }
  }
}

// C[rows, cols] = A B where only the entries with column <= row are wanted; those within the same block of 2 kVectorLanes come too.
inline void tile_gemm_to_lower(int64_t n, int64_t inner, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c,
                               int64_t ldc) {
  constexpr int64_t kWide = 2 * kVectorLanes;
  for (int64_t m = 0; m < n; m += kWide) {
    const int64_t end = m + kWide < n ? m + kWide : n;
    tile_gemm<false>(end - m, end, inner, a + m * a_row, a_row, a_col, b, ldb, c + m * ldc, ldc);
  }
}

// to[cols, rows] = from[rows, cols]^T, rounded up to multiples of 4 both ways.
inline void tile_transpose(int64_t rows, int64_t cols, const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  for (int64_t r = 0; r < rows; r += 4)
    for (int64_t c = 0; c < cols; c += 4) {
      Four in[4];
      for (int i = 0; i < 4; ++i) in[i] = *reinterpret_cast<const Four*>(from + (r + i) * ld_from + c);
      const Four a = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5), b = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
      const Four d = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7), e = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
      const Four out[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7), __builtin_shufflevector(d, e, 0, 1, 4, 5),
                           __builtin_shufflevector(d, e, 2, 3, 6, 7)};
      for (int i = 0; i < 4; ++i) *reinterpret_cast<Four*>(to + (c + i) * ld_to + r) = out[i];
    }
}

// The sum of a[i] * b[i] over n, a multiple of kTileCols.
inline float tile_dot(const float* a, const float* b, int64_t n) {
  detail::Vector sum{};
  for (int64_t i = 0; i < n; i += kVectorLanes)
    sum += *reinterpret_cast<const detail::Vector*>(a + i) * *reinterpret_cast<const detail::Vector*>(b + i);
  return detail::lanes_sum(sum);
}

// The same for any n; the last n % kTileCols products are added one by one.
inline float tile_dot_any(const float* a, const float* b, int64_t n) {
  const int64_t whole = n / kTileCols * kTileCols;
  float total = tile_dot(a, b, whole);
  for (int64_t i = whole; i < n; ++i) total += a[i] * b[i];
  return total;
}

// The sum of a[i] over n, a multiple of kTileCols.
inline float tile_sum(const float* a, int64_t n) {
  detail::Vector sum{};
  for (int64_t i = 0; i < n; i += kVectorLanes) sum += *reinterpret_cast<const detail::Vector*>(a + i);
  return detail::lanes_sum(sum);
}

}  // namespace tessera
