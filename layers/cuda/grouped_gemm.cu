// A block computes a 128 x 128 tile with 8 warps, 64 x 32 each, from tiles of 32 inner elements that cp.async brings into a ring of 4 stages. Operands lie in
// shared memory as they lie in memory, rows padded by 16 bytes, so that ldmatrix meets no bank twice; the transposed form of ldmatrix reads those whose inner
// dimension is not the contiguous one. Rows are gathered where they are loaded, so that no permuted copy exists; relu^2 is applied to fragments on their way to
// the tensor cores. The launch covers the most tiles that M rows can make; a block finds its expert by bisection, and those beyond the last tile end at once:
// the counts never reach the host. Each tile of 128 x 128 x 32 is 1.05 MFLOP for 16 KB from L2: 64 FLOP a byte. mma.sync: Hopper's wgmma would double the roof.
#include "layers/cuda/grouped_gemm.hpp"

#include "layers/cuda/launch.hpp"

namespace tessera::gpu {
namespace {

constexpr int kTile = kTileRows, kInner = 32, kStages = 4, kThreads = 256, kPad = 8;
constexpr int kAlong = kInner + kPad, kAcross = kTile + kPad;  // elements of a row in shared memory: inner dimension contiguous, or not
constexpr int kStage = kTile * kAlong > kInner * kAcross ? kTile * kAlong : kInner * kAcross;  // elements of one operand's stage
constexpr size_t kOperands = size_t{2} * kStages * kStage * sizeof(bf16), kShared = kOperands + kStages * kInner * sizeof(float);
static_assert(kShared >= kTile * kAcross * sizeof(bf16) + 4 * kTile * sizeof(float), "the result goes through it too");

// One operand of a block.
struct Tile {
  const bf16* data;
  int64_t stride;
  const int64_t* row;     // by the index along the dimension that is not contiguous
  int64_t first, last;    // along the tile: the tile's first element, and the end of what there is
};

// 8 elements from `from`, of which the first `valid` are there.
template <bool kWide>
__device__ inline void copy8(bf16* to, const bf16* from, const bf16* some, int valid) {
  if constexpr (kWide) {
    cp_async16(to, valid > 0 ? from : some, 2 * valid);
  } else {
    for (int i = 0; i < 8; ++i) to[i] = i < valid ? from[i] : bf16{0};
  }
}
__device__ inline int at_most_8(int64_t left) { return static_cast<int>(max(int64_t{0}, min(int64_t{8}, left))); }

// What a thread copies of an operand: its 8 elements of two rows of each stage.
template <bool kInnerContiguous, bool kWide>
class Loader {
 public:
  __device__ Loader(const Tile& t) : tile_(t) {
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kInnerContiguous) {
      row_ = thread / (kInner / 8), at_ = thread % (kInner / 8) * 8;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t r = t.first + row_ + i * kApart;
        from_[i] = r < t.last ? t.data + (t.row ? t.row[r] : r) * t.stride + at_ : nullptr;
      }
    } else {
      row_ = thread / (kTile / 8), at_ = thread % (kTile / 8) * 8;
      valid_ = at_most_8(t.last - t.first - at_);
    }
  }

  // Elements [inner, inner + 32) of the inner dimension, which ends at `end`.
  __device__ void load(bf16* to, int64_t inner, int64_t end) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if constexpr (kInnerContiguous) {
        copy8<kWide>(to + (row_ + i * kApart) * kAlong + at_, from_[i] + inner, tile_.data, from_[i] ? at_most_8(end - inner - at_) : 0);
      } else {
        const int64_t r = inner + row_ + i * kApart;
        const bool there = r < end;
        copy8<kWide>(to + (row_ + i * kApart) * kAcross + at_, there ? tile_.data + (tile_.row ? tile_.row[r] : r) * tile_.stride + tile_.first + at_ : tile_.data, tile_.data,
                     there ? valid_ : 0);
      }
    }
  }

 private:
  static constexpr int kRows = kTile * kInner / 8 / kThreads, kApart = kInnerContiguous ? kThreads / (kInner / 8) : kThreads / (kTile / 8);
  const Tile& tile_;
  int row_, at_, valid_ = 0;
  const bf16* from_[kInnerContiguous ? kRows : 1];
};

__device__ inline uint32_t relu2_pair(uint32_t pair) {
  const float a = fmaxf(low_half(pair), 0.0f), b = fmaxf(high_half(pair), 0.0f);
  return pack_bf16(a * a, b * b);
}

// Rows [m, m + 16) x inner [k, k + 16) of an operand's stage as mma's a.
template <bool kInnerContiguous>
__device__ inline void fragment_a(uint32_t (&a)[4], const bf16* stage, int m, int k) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, matrix = lane / 8, r = lane % 8;
  if constexpr (kInnerContiguous) ldmatrix<false, 4>(a, stage + (m + matrix % 2 * 8 + r) * kAlong + k + matrix / 2 * 8);
  else ldmatrix<true, 4>(a, stage + (k + matrix / 2 * 8 + r) * kAcross + m + matrix % 2 * 8);
}
// Columns [n, n + 16) x inner [k, k + 16) as two of mma's b.
template <bool kInnerContiguous>
__device__ inline void fragment_b(uint32_t (&b)[4], const bf16* stage, int n, int k) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, matrix = lane / 8, r = lane % 8;
  if constexpr (kInnerContiguous) ldmatrix<false, 4>(b, stage + (n + matrix / 2 * 8 + r) * kAlong + k + matrix % 2 * 8);
  else ldmatrix<true, 4>(b, stage + (k + matrix % 2 * 8 + r) * kAcross + n + matrix / 2 * 8);
}

constexpr int kWarpRows = 64, kWarpColumns = 32, kA = kWarpRows / 16, kB = kWarpColumns / 8;
using Sums = float[kA][kB][4];

// What is done with operands on their way: relu^2, and, where the inner dimension is rows, a factor for each of a's.
struct Prologue {
  bool relu2_a = false, relu2_b = false;
  const float* scale = nullptr;
  const int64_t* slot = nullptr;
};

// sums += a b over [begin, end) of the inner dimension.
template <bool kAContiguous, bool kBContiguous, bool kWide>
__device__ inline void multiply(Sums& sums, const Tile& a, const Tile& b, int64_t begin, int64_t end, const Prologue& prologue) {
  bf16* const stages = reinterpret_cast<bf16*>(shared_memory());
  float* const scales = reinterpret_cast<float*>(shared_memory() + kOperands);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, m = warp / 4 * kWarpRows, n = warp % 4 * kWarpColumns;
  const int steps = static_cast<int>(ceil_div(end - begin, kInner));
  const Loader<kAContiguous, kWide> load_a(a);
  const Loader<kBContiguous, kWide> load_b(b);
  const auto load = [&](int step) {
    if (step < steps) {
      bf16* const to = stages + step % kStages * (2 * kStage);
      load_a.load(to, begin + step * kInner, end);
      load_b.load(to + kStage, begin + step * kInner, end);
      if (!kAContiguous && prologue.scale && threadIdx.x < kInner) {
        const int64_t at = begin + step * kInner + static_cast<int>(threadIdx.x);
        scales[step % kStages * kInner + threadIdx.x] = at < end ? prologue.scale[prologue.slot[at]] : 0.0f;
      }
    }
    cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) load(s);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's stage is there for all, and the one that is filled next has been read
    load(step + kStages - 1);
    const bf16* const from = stages + step % kStages * (2 * kStage);
#pragma unroll
    for (int k = 0; k < kInner; k += 16) {
      uint32_t fb[kB / 2][4];
#pragma unroll
      for (int j = 0; j < kB / 2; ++j) fragment_b<kBContiguous>(fb[j], from + kStage, n + 16 * j, k);
      if (prologue.relu2_b)
#pragma unroll
        for (int j = 0; j < kB / 2; ++j)
#pragma unroll
          for (int r = 0; r < 4; ++r) fb[j][r] = relu2_pair(fb[j][r]);
#pragma unroll
      for (int i = 0; i < kA; ++i) {
        uint32_t fa[4];
        fragment_a<kAContiguous>(fa, from, m + 16 * i, k);
        if (!kAContiguous && prologue.scale) {
          const float* scale = scales + step % kStages * kInner + k + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
          for (int r = 0; r < 4; ++r) fa[r] = pack_bf16(low_half(fa[r]) * scale[r / 2 * 8], high_half(fa[r]) * scale[r / 2 * 8 + 1]);
        }
        if (prologue.relu2_a)
#pragma unroll
          for (int r = 0; r < 4; ++r) fa[r] = relu2_pair(fa[r]);
#pragma unroll
        for (int j = 0; j < kB; ++j) {
          const uint32_t pair[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
          mma_bf16(sums[i][j], fa, pair);
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();
}

// Calls f(row, first column, sums[i][0..][2h], ...) for the rows of the tile that this lane holds: of each, the pairs of columns first + 8 j.
template <class F>
__device__ inline void for_rows(Sums& sums, F f) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp, m = warp / 4 * kWarpRows + lane / 4, n = warp % 4 * kWarpColumns + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kA; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float v[kB][2];
#pragma unroll
      for (int j = 0; j < kB; ++j) v[j][0] = sums[i][j][2 * h], v[j][1] = sums[i][j][2 * h + 1];
      f(m + 16 * i + 8 * h, n, v);
    }
}

// Rounded, as the row's pairs lie in the tile that store_tile takes.
__device__ inline void put_row(bf16* tile, int row, int column, const float (&v)[kB][2]) {
#pragma unroll
  for (int j = 0; j < kB; ++j) *reinterpret_cast<uint32_t*>(tile + row * kAcross + column + 8 * j) = pack_bf16(v[j][0], v[j][1]);
}

// The tile, which the block has put into shared memory, to out: rows [0, rows) x columns [0, columns).
template <bool kWide>
__device__ inline void store_tile(const bf16* tile, bf16* out, int64_t stride, int rows, int columns) {
  for (int chunk = static_cast<int>(threadIdx.x); chunk < kTile * kTile / 8; chunk += kThreads) {
    const int r = chunk / (kTile / 8), c = chunk % (kTile / 8) * 8;
    if (r >= rows) break;
    const bf16* from = tile + r * kAcross + c;
    bf16* to = out + r * stride + c;
    if (kWide && c + 8 <= columns) store16(to, load16(from));
    else
      for (int i = 0; i < 8 && c + i < columns; ++i) to[i] = from[i];
  }
}

struct RowsProduct {
  ExpertRows rows;
  Operand a;
  const bf16* w;
  int64_t inner, columns, w_stride, w_size;  // of a row and of an expert of w
  bf16* out;
  Epilogue epilogue;
};

// The last e with first[e] <= i.
__device__ inline int64_t find_expert(const int32_t* first, int64_t E, int64_t i) {
  int64_t low = 0, high = E;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first[middle] <= i) low = middle;
    else high = middle;
  }
  return low;
}

template <bool kWContiguous, bool kWide>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(RowsProduct p) {
  const int64_t tiles = ceil_div(p.columns, kTile), tile = blockIdx.x / tiles, column = blockIdx.x % tiles * kTile;
  if (tile >= p.rows.first_tile[p.rows.E]) return;
  const int64_t e = find_expert(p.rows.first_tile, p.rows.E, tile), end = p.rows.first_row[e + 1], row = p.rows.first_row[e] + (tile - p.rows.first_tile[e]) * kTile;
  const Tile a{static_cast<const bf16*>(p.a.data), p.a.stride, p.a.row, row, end};
  const Tile b{p.w + e * p.w_size, p.w_stride, nullptr, column, p.columns};
  Sums sums = {};
  multiply<true, kWContiguous, kWide>(sums, a, b, 0, p.inner, {.relu2_a = p.a.relu2});

  bf16* const made = reinterpret_cast<bf16*>(shared_memory());
  float* const partial = reinterpret_cast<float*>(made + kTile * kAcross);  // [4 warps, 128 rows]
  const Epilogue& z = p.epilogue;
  const bf16* const u = static_cast<const bf16*>(z.relu2_of);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int columns = static_cast<int>(min(int64_t{kTile}, p.columns - column)), count = static_cast<int>(min(int64_t{kTile}, end - row));
  for_rows(sums, [&](int r, int c, float (&v)[kB][2]) {
    float row_sum = 0;
    if (u) {
      const bf16* const u_row = u + (row + r) * p.columns + column + c;
#pragma unroll
      for (int j = 0; j < kB; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float positive = r < count && c + 8 * j + h < columns ? fmaxf(to_float(u_row[8 * j + h]), 0.0f) : 0.0f;
          row_sum += v[j][h] * to_float(from_float<bf16>(positive * positive));
          v[j][h] *= 2.0f * positive;
        }
      row_sum = warp_sum<4>(row_sum);
      if (lane % 4 == 0) partial[warp % 4 * kTile + r] = row_sum;
    }
    if (z.scale && r < count) {
      const float scale = z.scale[z.slot[row + r]];
#pragma unroll
      for (int j = 0; j < kB; ++j) v[j][0] *= scale, v[j][1] *= scale;
    }
    put_row(made, r, c, v);
  });
  __syncthreads();
  store_tile<kWide>(made, p.out + row * p.columns + column, p.columns, count, columns);
  if (!z.row_sums) return;
  for (int r = static_cast<int>(threadIdx.x); r < count; r += kThreads)
    z.row_sums[column / kTile * p.rows.M + row + r] = partial[r] + partial[kTile + r] + partial[2 * kTile + r] + partial[3 * kTile + r];
}

struct OuterProduct {
  ExpertRows rows;
  Operand a, b;
  int64_t O, I;
  const float* scale;
  const int64_t* slot;
  bf16* out;
};

template <bool kWide>
__global__ void __launch_bounds__(kThreads, 2) outer_kernel(OuterProduct p) {
  const int64_t across = ceil_div(p.I, kTile), down = ceil_div(p.O, kTile), e = blockIdx.x / (across * down), row = blockIdx.x / across % down * kTile, column = blockIdx.x % across * kTile;
  const Tile a{static_cast<const bf16*>(p.a.data), p.a.stride, p.a.row, row, p.O};
  const Tile b{static_cast<const bf16*>(p.b.data), p.b.stride, p.b.row, column, p.I};
  Sums sums = {};
  multiply<false, false, kWide>(sums, a, b, p.rows.first_row[e], p.rows.first_row[e + 1], {p.a.relu2, p.b.relu2, p.scale, p.slot});
  bf16* const made = reinterpret_cast<bf16*>(shared_memory());
  for_rows(sums, [&](int r, int c, const float (&v)[kB][2]) { put_row(made, r, c, v); });
  __syncthreads();
  store_tile<kWide>(made, p.out + (e * p.O + row) * p.I + column, p.I, static_cast<int>(min(int64_t{kTile}, p.O - row)), static_cast<int>(min(int64_t{kTile}, p.I - column)));
}

__global__ void __launch_bounds__(kWarp) expert_rows_kernel(const int64_t* counts, int64_t E, int64_t M, int32_t* first_row, int32_t* first_tile) {
  const int lane = static_cast<int>(threadIdx.x);
  int rows = 0, tiles = 0;
  for (int64_t base = 0; base < E; base += kWarp) {
    const int count = base + lane < E ? static_cast<int>(max(int64_t{0}, min(M, counts[base + lane]))) : 0;
    int row = count, tile = (count + kTile - 1) / kTile;
#pragma unroll
    for (int by = 1; by < kWarp; by *= 2) {
      const int r = shuffle_up(row, by), t = shuffle_up(tile, by);
      if (lane >= by) row += r, tile += t;
    }
    if (base + lane < E) first_row[base + lane + 1] = min(static_cast<int>(M), rows + row), first_tile[base + lane + 1] = tiles + tile;
    rows += shuffle(row, kWarp - 1), tiles += shuffle(tile, kWarp - 1);
  }
  if (lane == 0) first_row[0] = 0, first_tile[0] = 0;
}

__global__ void __launch_bounds__(kThreads) sum_row_tiles_kernel(const float* row_sums, int64_t tiles, int64_t M, const int64_t* slot, float* dweights) {
  const int64_t m = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (m >= M) return;
  float sum = 0;
  for (int64_t t = 0; t < tiles; ++t) sum += row_sums[t * M + m];
  dweights[slot[m]] = sum;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
bool aligned(const Operand& a) { return aligned(a.data) && a.stride % 8 == 0; }

template <bool kWContiguous>
Status run_rows(const RowsProduct& p, Stream stream) {
  const auto blocks = static_cast<unsigned>(p.rows.most_tiles() * ceil_div(p.columns, kTile));
  const bool wide = aligned(p.a) && aligned(p.w) && aligned(p.out) && p.w_stride % 8 == 0 && p.columns % 8 == 0;
  if (wide) return launch((rows_kernel<kWContiguous, true>), dim3(blocks), dim3(kThreads), kShared, stream, p);
  return launch((rows_kernel<kWContiguous, false>), dim3(blocks), dim3(kThreads), kShared, stream, p);
}

}  // namespace

Status expert_rows(const int64_t* counts, int64_t E, int64_t M, int32_t* first_row, int32_t* first_tile, Stream stream) {
  return launch(expert_rows_kernel, dim3(1), dim3(kWarp), 0, stream, counts, E, M, first_row, first_tile);
}

Status grouped_product(const ExpertRows& rows, const Operand& a, const void* w, int64_t O, int64_t I, void* out, const Epilogue& epilogue, Stream stream) {
  return run_rows<true>({rows, a, static_cast<const bf16*>(w), I, O, I, O * I, static_cast<bf16*>(out), epilogue}, stream);
}

Status grouped_product_transposed(const ExpertRows& rows, const Operand& a, const void* w, int64_t O, int64_t I, void* out, const Epilogue& epilogue, Stream stream) {
  return run_rows<false>({rows, a, static_cast<const bf16*>(w), O, I, I, O * I, static_cast<bf16*>(out), epilogue}, stream);
}

Status grouped_outer(const ExpertRows& rows, const Operand& a, const Operand& b, int64_t O, int64_t I, const float* scale, const int64_t* slot, void* out, Stream stream) {
  const OuterProduct p{rows, a, b, O, I, scale, slot, static_cast<bf16*>(out)};
  const auto blocks = static_cast<unsigned>(rows.E * ceil_div(O, kTile) * ceil_div(I, kTile));
  if (aligned(a) && aligned(b) && aligned(out) && O % 8 == 0 && I % 8 == 0) return launch(outer_kernel<true>, dim3(blocks), dim3(kThreads), kShared, stream, p);
  return launch(outer_kernel<false>, dim3(blocks), dim3(kThreads), kShared, stream, p);
}

Status sum_row_tiles(const float* row_sums, int64_t tiles, int64_t M, const int64_t* slot, float* dweights, Stream stream) {
  return launch(sum_row_tiles_kernel, dim3(static_cast<unsigned>(ceil_div(M, kThreads))), dim3(kThreads), 0, stream, row_sums, tiles, M, slot, dweights);
}

}  // namespace tessera::gpu
