// Register tiles of products with row-major operands that are read once: x w^T over rows of w, and p v over rows of v. x, p and sums in fp32,
// w and v in fp32 or bf16. Every number is summed in one order, whatever rows and columns lie beside it.
#pragma once
#include <cstring>

#include "layers/tile_gemm.hpp"
#include "layers/vector_math.hpp"

namespace tessera {

namespace detail {

inline Vector lanes(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline Vector lanes(const c10::BFloat16* p) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorLanes * 2), aligned(2), may_alias));
  typedef uint32_t Wide __attribute__((vector_size(kVectorLanes * 4)));
  const Wide wide = __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Wide) << 16;
  Vector out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

// The first n lanes, the others zero.
template <class T>
inline Vector lanes(const T* p, int64_t n) {
  Vector out{};
  for (int64_t i = 0; i < n; ++i) out[i] = vec::load(p + i);
  return out;
}

inline constexpr int kColumns = 4;  // of an output tile

#ifdef __AVX512F__
template <int... kLanes>
inline Vector pick(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, kLanes...);
}
inline Vector add_lanes(Vector a, Vector b) {
  return pick<0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30>(a, b) + pick<1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31>(a, b);
}
inline Vector add_pairs(Vector a, Vector b) {
  return pick<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(a, b) + pick<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(a, b);
}
inline Vector add_fours(Vector a, Vector b) {
  return pick<0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27>(a, b) + pick<4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31>(a, b);
}
inline Vector add_halves(Vector a, Vector b) {
  return pick<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(a, b) + pick<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(a, b);
}
#endif

// The lanes' sums of kRows x kColumns vectors, row by row, into to [4 * kColumns]. Neighbouring lanes are added first, then neighbouring
// pairs, and so on, while the vectors are merged: about three instructions a vector.
template <int kRows>
inline void tile_sums(const Vector (*v)[kColumns], float* to) {
#ifdef __AVX512F__
  Vector row[4] = {};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
    row[r] = add_pairs(add_lanes(v[r][0], v[r][1]), add_lanes(v[r][2], v[r][3]));
  const Vector all = add_halves(add_fours(row[0], row[1]), add_fours(row[2], row[3]));
  std::memcpy(to, &all, sizeof all);
#else
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) to[r * kColumns + c] = lanes_sum(v[r][c]);
#endif
}

// out[r, c] = x[r] w[c] over K, for kRows rows and `columns` <= kColumns columns.
template <int kRows, class W, class Out>
inline void dot_tile(const float* x, int64_t ldx, const W* w, int64_t ldw, int columns, int64_t K, Out* out, int64_t ldo) {
  const W* column[kColumns];
  for (int c = 0; c < kColumns; ++c) column[c] = w + (c < columns ? c : columns - 1) * ldw;
  Vector sum[kRows][kColumns] = {};
  const auto add = [&](auto load) {
    Vector x_k[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) x_k[r] = load(x + r * ldx);
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const Vector w_k = load(column[c]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][c] += x_k[r] * w_k;
    }
  };
  int64_t k = 0;
  for (; k + kVectorLanes <= K; k += kVectorLanes) add([k](auto* p) { return lanes(p + k); });
  if (k < K) add([k, K](auto* p) { return lanes(p + k, K - k); });
  float total[4 * kColumns];
  tile_sums<kRows>(sum, total);
  for (int r = 0; r < kRows; ++r) {
    if (columns == kColumns)
      for (int c = 0; c < kColumns; ++c) vec::store(out + r * ldo + c, total[r * kColumns + c]);
    else
      for (int c = 0; c < columns; ++c) vec::store(out + r * ldo + c, total[r * kColumns + c]);
  }
}

// acc[r] += sum_t p[r, t] v[t] over kVectors vectors of v's columns.
template <int kRows, int kVectors, class V>
inline void mix_tile(const float* p, int64_t ldp, const V* v, int64_t ldv, int64_t T, float* acc, int64_t ldacc) {
  Vector sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sum[r][i] = lanes(acc + r * ldacc + i * kVectorLanes);
  for (int64_t t = 0; t < T; ++t) {
    Vector v_t[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) v_t[i] = lanes(v + t * ldv + i * kVectorLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) sum[r][i] += p[r * ldp + t] * v_t[i];
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) *reinterpret_cast<Vector*>(acc + r * ldacc + i * kVectorLanes) = sum[r][i];
}

template <int kRows, class V>
inline void mix_rows(const float* p, int64_t ldp, const V* v, int64_t ldv, int64_t T, int64_t P, float* acc, int64_t ldacc) {
  int64_t i = 0;
  for (; i + 4 * kVectorLanes <= P; i += 4 * kVectorLanes) mix_tile<kRows, 4>(p, ldp, v + i, ldv, T, acc + i, ldacc);
  for (; i + kVectorLanes <= P; i += kVectorLanes) mix_tile<kRows, 1>(p, ldp, v + i, ldv, T, acc + i, ldacc);
  for (; i < P; ++i)
    for (int r = 0; r < kRows; ++r)
      for (int64_t t = 0; t < T; ++t) acc[r * ldacc + i] += p[r * ldp + t] * vec::load(v + t * ldv + i);
}

// run<rows>() for four rows at a time, then for those that are left.
template <class Run>
inline void by_four(int64_t rows, Run run) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) run.template operator()<4>(r);
  if (rows - r == 3) run.template operator()<3>(r);
  else if (rows - r == 2) run.template operator()<2>(r);
  else if (rows - r == 1) run.template operator()<1>(r);
}

}  // namespace detail

// out [rows, columns] = x [rows, K] w [columns, K]^T.
template <class W, class Out>
inline void dot_rows(const float* x, int64_t ldx, int64_t rows, const W* w, int64_t ldw, int64_t columns, int64_t K, Out* out, int64_t ldo) {
  for (int64_t c = 0; c < columns; c += detail::kColumns) {
    const int left = static_cast<int>(columns - c < detail::kColumns ? columns - c : detail::kColumns);
    detail::by_four(rows, [&]<int kRows>(int64_t r) { detail::dot_tile<kRows>(x + r * ldx, ldx, w + c * ldw, ldw, left, K, out + r * ldo + c, ldo); });
  }
}

// acc [rows, P] += p [rows, T] v [T, P].
template <class V>
inline void add_mixed_rows(const float* p, int64_t ldp, int64_t rows, const V* v, int64_t ldv, int64_t T, int64_t P, float* acc, int64_t ldacc) {
  detail::by_four(rows, [&]<int kRows>(int64_t r) { detail::mix_rows<kRows>(p + r * ldp, ldp, v, ldv, T, P, acc + r * ldacc, ldacc); });
}

}  // namespace tessera
