// The scan by chunks of Q tokens, in passes: the decays of every token; what each chunk adds to the state; the states that enter, chunk after chunk; outputs.
// A block of the products is one chunk and the heads of one group, a warp 16 of its tokens: C B^T is computed once and stays in the warp's registers while
// the heads pass. Backward, the same kernel with rows and columns exchanged gives dx from dy, and one more, run for rows and for columns, dC and dB; they
// recompute all else. With lam the sum of decays within a chunk, i >= j its tokens, and d the time steps:
//   y_i  = exp(lam_i) C_i s_in + sum_j (C_i B_j) exp(lam_i - lam_j) d_j x_j + D x_i
//   dx_j = d_j (exp(lam_end - lam_j) B_j ds_out + sum_i (C_i B_j) exp(lam_i - lam_j) dy_i) + D dy_j
// Bytes a token at H 64, P 64, S 128, G 8, bf16, Q 128, in KB of 1024 (the states of a chunk are 8 a token). Forward: x, B 10 and states 8; passed on 16;
// x, B, C 12, states 8 and y 8: 62, or 14.8 ns at 4.3 TB/s. Backward: states again 34; dy, C 10 and 8; passed on 24; dx 8 from dy, B, C 12 and 8; dB and dC
// 4 from twice x, dy, B, C 20 and 8: 164, or 39 ns. Products, the triangle by tiles of 16: 2.8 and 7.8 MFLOP.
#include "layers/cuda/ssd_scan.hpp"

#include <initializer_list>
#include <type_traits>

#include "layers/cuda/fragments.hpp"
#include "layers/cuda/launch.hpp"

namespace tessera::gpu {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kP = 64;  // channels of a tile
template <class T>
constexpr int kQ = sizeof(T) == 2 ? 128 : 64;
template <class T>
constexpr int kWarps = kQ<T> / 16;
template <class T>
constexpr int kThreads = kWarps<T> * kWarp;
// Rows of tiles end with 16 bytes of nothing, so that ldmatrix meets every bank once.
template <class T>
constexpr int padded(int columns) {
  return columns + 16 / static_cast<int>(sizeof(T));
}

__device__ inline int warp_of() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int lane_of() { return static_cast<int>(threadIdx.x) % kWarp; }

__device__ inline float raw_step(const ScanInputs& in, int64_t row, int64_t h) {
  const int64_t at = row * in.dt_stride + h;
  return (in.dt_type == Type::kFloat ? static_cast<const float*>(in.dt)[at] : to_float(static_cast<const bf16*>(in.dt)[at])) + in.dt_bias[h];
}
__device__ inline float softplus(float v) { return v > 20.0f ? v : log1pf(expf(v)); }
__device__ inline float step_of(const ScanInputs& in, float raw) { return fminf(fmaxf(softplus(raw), in.dt_min), in.dt_max); }

template <class T>
__device__ inline const T* x_of(const ScanInputs& in, int64_t row) { return static_cast<const T*>(in.xbc) + row * in.xbc_stride; }
template <class T>
__device__ inline const T* B_of(const ScanInputs& in, int64_t row, int64_t group) { return x_of<T>(in, row) + in.H * in.P + group * in.S; }
template <class T>
__device__ inline const T* C_of(const ScanInputs& in, int64_t row, int64_t group) { return x_of<T>(in, row) + in.H * in.P + (in.G + group) * in.S; }

// Two neighbours of a row in the output, the second of which may lie outside.
__device__ inline void store_pair(bool wide, float* to, float a, float b, bool both) {
  if (wide) return store_vector(to, float2{a, b});
  to[0] = a;
  if (both) to[1] = b;
}
__device__ inline void store_pair(bool wide, bf16* to, float a, float b, bool both) {
  if (wide) return store_vector(to, pack_bf16(a, b));
  to[0] = from_float<bf16>(a);
  if (both) to[1] = from_float<bf16>(b);
}

// --- time steps and decays: a warp a chunk and head --------------------------------------------------------------------------------
constexpr int kStepWarps = 8;

template <int Q>
__global__ void __launch_bounds__(kStepWarps* kWarp) steps_kernel(ScanInputs in) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kStepWarps + warp_of();
  if (index >= in.num_chunks * in.H) return;
  const int64_t m = index / in.H, h = index % in.H;
  const ScanChunk chunk = in.chunks[m];
  const float A = -expf(in.A_log[h]) * kLog2e;
  float before = 0;
#pragma unroll
  for (int first = 0; first < Q; first += kWarp) {
    const int q = first + lane_of();
    const float d = q < chunk.length ? step_of(in, raw_step(in, chunk.row + q, h)) : 0.0f;
    const float sum = before + warp_scan(d * A);
    in.step[index * Q + q] = d;
    in.decay[index * Q + q] = sum;
    before = shuffle(sum, kWarp - 1);
  }
}

// The heads of one group that a block takes.
struct Heads {
  int m, g, begin, end;
};
__device__ inline Heads heads_of(const ScanInputs& in, int block, int splits) {
  const int G = static_cast<int>(in.G), R = static_cast<int>(in.H) / G, split = block % splits, g = block / splits % G;
  return {block / splits / G, g, g * R + R * split / splits, g * R + R * (split + 1) / splits};
}

// --- what a chunk adds: sum_j w_j x_j B_j^T; for the gradient sum_i exp(lam_i) dy_i C_i^T -------------------------------------------
template <class T, int ST>
struct StatesMemory {
  T matrix[kQ<T> * padded<T>(ST)], values[kQ<T> * padded<T>(kP)];
  float weight[kQ<T>];
};

template <class T, int ST, bool kGradient>
__global__ void __launch_bounds__(kThreads<T>, 2) states_kernel(ScanInputs in, const T* dy, T* states, int splits) {
  constexpr int Q = kQ<T>, kColumnWarps = kWarps<T> / 4, NT = ST / 8 / kColumnWarps, kStrideS = padded<T>(ST), kStrideP = padded<T>(kP);
  auto& memory = *reinterpret_cast<StatesMemory<T, ST>*>(shared_memory());
  const Heads heads = heads_of(in, static_cast<int>(blockIdx.x), splits);
  const ScanChunk chunk = in.chunks[heads.m];
  const int length = static_cast<int>(chunk.length), s_tiles = static_cast<int>(ceil_div(in.S, ST));
  const int64_t s0 = static_cast<int64_t>(blockIdx.y) % s_tiles * ST, p0 = static_cast<int64_t>(blockIdx.y) / s_tiles * kP;
  const int num_s = static_cast<int>(min<int64_t>(in.S - s0, ST)), num_p = static_cast<int>(min<int64_t>(in.P - p0, kP));
  const int row0 = warp_of() % 4 * 16, column0 = warp_of() / 4 * (ST / kColumnWarps);
  const T* matrix = (kGradient ? C_of<T>(in, chunk.row, heads.g) : B_of<T>(in, chunk.row, heads.g)) + s0;
  load_tile<Q, ST, kThreads<T>>(in.wide, memory.matrix, kStrideS, matrix, in.xbc_stride, length, num_s);
  for (int h = heads.begin; h < heads.end; ++h) {
    if (h > heads.begin) __syncthreads();
    const T* values = (kGradient ? dy + chunk.row * in.H * in.P : x_of<T>(in, chunk.row)) + h * in.P + p0;
    load_tile<Q, kP, kThreads<T>>(in.wide, memory.values, kStrideP, values, kGradient ? in.H * in.P : in.xbc_stride, length, num_p);
    if (threadIdx.x < Q) {
      const int64_t at = (heads.m * in.H + h) * Q, q = threadIdx.x;
      memory.weight[q] = kGradient ? exp2f(in.decay[at + q]) : exp2f(in.decay[at + Q - 1] - in.decay[at + q]) * in.step[at + q];
    }
    wait_for_tiles();
    if (row0 >= num_p) continue;
    float sums[NT][4] = {};
    for (int k = 0; k < length; k += 16) {
      FragmentA<T> a;
      load_a<true>(a, memory.values, kStrideP, row0, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* w = memory.weight + k + 2 * (lane_of() % 4) + 8 * (i / 2);
        a.set(i, a.low(i) * w[0], a.high(i) * w[1]);
      }
#pragma unroll
      for (int n = 0; n < NT; n += 2) {
        if (column0 + 8 * n >= num_s) break;
        FragmentB<T> b[2];
        load_b<true>(b, memory.matrix, kStrideS, column0 + 8 * n, k);
        multiply(sums[n], a, b[0]);
        multiply(sums[n + 1], a, b[1]);
      }
    }
    T* out = states + ((heads.m * in.H + h) * in.P + p0) * in.S + s0;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int r = row0 + row_of(e), c = column0 + 8 * n + column_of(e);
        if (r < num_p && c < num_s) store_pair(in.wide, out + r * in.S + c, sums[n][e], sums[n][e + 1], c + 1 < num_s);
      }
  }
}

// --- states from chunk to chunk, in place: a thread 16 bytes of a state, along its span ---------------------------------------------
constexpr int kPassThreads = 128, kPassBlocks = 6, kPassAhead = 4;

// Backward it also gives a warp's part of the product of the state that enters a chunk and the gradient of the one that leaves.
template <class T, bool kWide, bool kGradient>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks) pass_kernel(ScanInputs in, T* states, float* kept, const T* entering, float* ends) {
  constexpr int V = kWide ? 16 / static_cast<int>(sizeof(T)) : 1, Q = kQ<T>;
  const int64_t size = in.P * in.S, blocks = ceil_div(size, int64_t{V} * kPassThreads), block = blockIdx.x;
  const int64_t e = (block % blocks * kPassThreads + threadIdx.x) * V, h = block / blocks % in.H, parts = ceil_div(size, int64_t{V} * kWarp);
  if (e - V * lane_of() >= size) return;  // the warp as a whole
  const bool inside = e < size;
  const ScanSpan span = in.spans[block / blocks / in.H];
  const int64_t step = (kGradient ? -1 : 1) * in.H * size, first = kGradient ? span.first + span.count - 1 : span.first;
  int64_t chunk = first * in.H + h;
  const int64_t chunk_step = (kGradient ? -1 : 1) * in.H;
  T* at = states + chunk * size + e;
  if constexpr (kGradient) entering += chunk * size + e;
  float state[V];
#pragma unroll
  for (int v = 0; v < V; ++v) state[v] = 0;
  if (kept && span.resumes && inside) load<kWide>(kept + (span.slot * in.H + h) * size + e, state);
  for (int64_t c = 0; c < span.count; c += kPassAhead) {
    Pack<kWide, T, V> added[kPassAhead], entered[kPassAhead];
    float through[kPassAhead];
#pragma unroll
    for (int u = 0; u < kPassAhead; ++u)
      if (c + u < span.count) {
        through[u] = exp2f(in.decay[(chunk + u * chunk_step) * Q + Q - 1]);
        if (!inside) continue;
        added[u].load(at + u * step);
        if constexpr (kGradient) entered[u].load(entering + u * step);
      }
#pragma unroll
    for (int u = 0; u < kPassAhead; ++u) {
      if (c + u >= span.count) break;
      float more[V] = {}, product = 0;
      if (inside) {
        store<kWide>(at + u * step, state);
        added[u].get(more);
      }
      if constexpr (kGradient) {
        float other[V] = {};
        if (inside) entered[u].get(other);
#pragma unroll
        for (int v = 0; v < V; ++v) product = fmaf(state[v], other[v], product);
        product = warp_sum(product);
        if (lane_of() == 0) ends[(chunk + u * chunk_step) * parts + e / (V * kWarp)] = product;
      }
#pragma unroll
      for (int v = 0; v < V; ++v) state[v] = fmaf(through[u], state[v], more[v]);
    }
    at += kPassAhead * step;
    chunk += kPassAhead * chunk_step;
    if constexpr (kGradient) entering += kPassAhead * step;
  }
  if (kept && inside) store<kWide>(kept + (span.slot * in.H + h) * size + e, state);
}

// --- C B^T (or B C^T) of a warp's 16 rows, in fragments as the left side of the next product takes them -----------------------------
// kAfter: against the tokens from the row on, else up to it.
template <bool kAfter>
__device__ inline bool meets(int tile, int length) {
  return (kAfter ? tile >= warp_of() : tile <= warp_of()) && 16 * tile < length;
}
template <bool kAfter>
__device__ inline bool meets_token(int row, int other) {
  return kAfter ? other >= row : other <= row;
}

template <bool kAfter, int kTiles, class T>
__device__ inline void add_products(float (&sums)[2 * kTiles][4], const T* rows, const T* others, int stride, int length, int num_k) {
#pragma unroll 1
  for (int k = 0; k < num_k; k += 16) {
    FragmentA<T> a;
    load_a<false>(a, rows, stride, 16 * warp_of(), k);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (!meets<kAfter>(n, length)) continue;
      FragmentB<T> b[2];
      load_b<false>(b, others, stride, 16 * n, k);
      multiply(sums[2 * n], a, b[0]);
      multiply(sums[2 * n + 1], a, b[1]);
    }
  }
}
template <class T>
__device__ inline void keep(FragmentA<T>& kept, const float (&left)[4], const float (&right)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) kept.set(i, (i < 2 ? left : right)[i % 2 * 2], (i < 2 ? left : right)[i % 2 * 2 + 1]);
}

// --- y from x, or dx from dy -------------------------------------------------------------------------------------------------------
template <class T, int ST>
struct OutputsMemory {
  T rows[kQ<T> * padded<T>(ST)];
  union {
    T others[kQ<T> * padded<T>(ST)];
    FragmentA<T> kept[kWarps<T>][kQ<T> / 16][kWarp];  // then C B^T, each lane's own
  };
  T state[kP * padded<T>(ST)];
  T values[kQ<T> * padded<T>(kP)];
  float step[kQ<T>], decay[kQ<T>];
};

template <class T, int ST, bool kGradient>
__global__ void __launch_bounds__(kThreads<T>, 2) outputs_kernel(ScanInputs in, const T* dy, const T* states, T* out, int64_t out_stride, int splits) {
  constexpr int Q = kQ<T>, kStrideS = padded<T>(ST), kStrideP = padded<T>(kP);
  auto& memory = *reinterpret_cast<OutputsMemory<T, ST>*>(shared_memory());
  const Heads heads = heads_of(in, static_cast<int>(blockIdx.x), splits);
  const ScanChunk chunk = in.chunks[heads.m];
  const int length = static_cast<int>(chunk.length);
  const T* rows = kGradient ? B_of<T>(in, chunk.row, heads.g) : C_of<T>(in, chunk.row, heads.g);
  const T* others = kGradient ? C_of<T>(in, chunk.row, heads.g) : B_of<T>(in, chunk.row, heads.g);
  {
    float sums[Q / 8][4] = {};
    for (int64_t s0 = 0; s0 < in.S; s0 += ST) {
      const int num_s = static_cast<int>(min<int64_t>(in.S - s0, ST));
      if (s0 > 0) __syncthreads();
      load_tile<Q, ST, kThreads<T>>(in.wide, memory.rows, kStrideS, rows + s0, in.xbc_stride, length, num_s);
      load_tile<Q, ST, kThreads<T>>(in.wide, memory.others, kStrideS, others + s0, in.xbc_stride, length, num_s);
      wait_for_tiles();
      add_products<kGradient, Q / 16>(sums, memory.rows, memory.others, kStrideS, length, num_s);
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < Q / 16; ++n) keep(memory.kept[warp_of()][n][lane_of()], sums[2 * n], sums[2 * n + 1]);
  }
  const int row[2] = {16 * warp_of() + row_of(0), 16 * warp_of() + row_of(2)};
  const int p_tiles = static_cast<int>(ceil_div(in.P, kP));
  const int items = static_cast<int>(heads.end - heads.begin) * p_tiles;
  for (int item = 0; item < items; ++item) {
    const int h = heads.begin + item / p_tiles;
    const int p0 = item % p_tiles * kP, num_p = static_cast<int>(min<int64_t>(in.P - p0, kP));
    float sums[kP / 8][4] = {};
    for (int64_t s0 = 0; s0 < in.S; s0 += ST) {
      const int num_s = static_cast<int>(min<int64_t>(in.S - s0, ST));
      __syncthreads();
      if (in.S > ST) load_tile<Q, ST, kThreads<T>>(in.wide, memory.rows, kStrideS, rows + s0, in.xbc_stride, length, num_s);
      load_tile<kP, ST, kThreads<T>>(in.wide, memory.state, kStrideS, states + ((heads.m * in.H + h) * in.P + p0) * in.S + s0, in.S, num_p, num_s);
      if (s0 == 0) {
        const T* values = (kGradient ? dy + chunk.row * in.H * in.P : x_of<T>(in, chunk.row)) + h * in.P + p0;
        load_tile<Q, kP, kThreads<T>>(in.wide, memory.values, kStrideP, values, kGradient ? in.H * in.P : in.xbc_stride, length, num_p);
        if (threadIdx.x < Q) {
          const int64_t at = (heads.m * in.H + h) * Q + threadIdx.x;
          memory.step[threadIdx.x] = in.step[at], memory.decay[threadIdx.x] = in.decay[at];
        }
      }
      wait_for_tiles();
      if (16 * warp_of() >= length) continue;
#pragma unroll 1
      for (int k = 0; k < num_s; k += 16) {
        FragmentA<T> a;
        load_a<false>(a, memory.rows, kStrideS, 16 * warp_of(), k);
#pragma unroll
        for (int n = 0; n < kP / 8; n += 2) {
          if (8 * n >= num_p) break;
          FragmentB<T> b[2];
          load_b<false>(b, memory.state, kStrideS, 8 * n, k);
          multiply(sums[n], a, b[0]);
          multiply(sums[n + 1], a, b[1]);
        }
      }
    }
    if (16 * warp_of() >= length) continue;
    const float lam[2] = {memory.decay[row[0]], memory.decay[row[1]]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float through = exp2_for<T>(kGradient ? memory.decay[Q - 1] - lam[half] : lam[half]);
#pragma unroll
      for (int n = 0; n < kP / 8; ++n) sums[n][2 * half] *= through, sums[n][2 * half + 1] *= through;
    }
    const int last = kGradient ? Q / 16 : warp_of() + 1;
#pragma unroll 1
    for (int tile = kGradient ? warp_of() : 0; tile < last && 16 * tile < length; ++tile) {
      const FragmentA<T> kept = memory.kept[warp_of()][tile][lane_of()];
      FragmentA<T> a;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int other = 16 * tile + column_of(0) + 8 * (i / 2), r = row[i % 2];
        const float2 decay = load_vector<float2>(memory.decay + other), step = load_vector<float2>(memory.step + other);
        const auto weight = [&](int token, float at, float d) {
          return meets_token<kGradient>(r, token) ? exp2_for<T>(kGradient ? at - lam[i % 2] : lam[i % 2] - at) * (kGradient ? 1.0f : d) : 0.0f;
        };
        a.set(i, kept.low(i) * weight(other, decay.x, step.x), kept.high(i) * weight(other + 1, decay.y, step.y));
      }
#pragma unroll
      for (int n = 0; n < kP / 8; n += 2) {
        if (8 * n >= num_p) break;
        FragmentB<T> b[2];
        load_b<true>(b, memory.values, kStrideP, 8 * n, 16 * tile);
        multiply(sums[n], a, b[0]);
        multiply(sums[n + 1], a, b[1]);
      }
    }
    const float D = in.D[h];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row[half] >= length) continue;
      const float scale = kGradient ? memory.step[row[half]] : 1.0f;
      const T* own = memory.values + row[half] * kStrideP;
      const int64_t at = (chunk.row + row[half]) * out_stride + h * in.P + p0;
#pragma unroll
      for (int n = 0; n < kP / 8; ++n) {
        const int p = 8 * n + column_of(0);
        if (p >= num_p) break;
        const float a = fmaf(D, to_float(own[p]), scale * sums[n][2 * half]), b = fmaf(D, to_float(own[p + 1]), scale * sums[n][2 * half + 1]);
        store_pair(in.wide, out + at + p, a, b, p + 1 < num_p);
      }
    }
  }
}

// --- dC (rows: tokens that read), or dB (columns: tokens that are read) -------------------------------------------------------------
// Summed over the heads of a group in the order of the heads. While a head is computed the next one's tiles are on their way.
template <class T, int ST>
struct GradientMemory {
  FragmentA<T> kept[kWarps<T>][kQ<T> / 16][kWarp];  // C B^T, each lane's own
  T rows[kQ<T> * padded<T>(ST)], others[kQ<T> * padded<T>(ST)];
  struct {
    T rows[kQ<T> * padded<T>(kP)], others[kQ<T> * padded<T>(kP)], state[kP * padded<T>(ST)];
    float step[kQ<T>], decay[kQ<T>];
  } stage[2];
};

template <class T, int ST, bool kColumns>
__global__ void __launch_bounds__(kThreads<T>, 1) gradient_bc_kernel(ScanInputs in, const T* dy, const T* states, T* dxbc, ScanSums out) {
  constexpr int Q = kQ<T>, kStrideS = padded<T>(ST), kStrideP = padded<T>(kP);
  auto& memory = *reinterpret_cast<GradientMemory<T, ST>*>(shared_memory());
  const int slices = static_cast<int>(ceil_div(in.S, ST)), slice = static_cast<int>(blockIdx.x) % slices;
  const Heads heads = heads_of(in, static_cast<int>(blockIdx.x) / slices, 1);
  const ScanChunk chunk = in.chunks[heads.m];
  const int length = static_cast<int>(chunk.length);
  const int64_t s0 = static_cast<int64_t>(slice) * ST, inner = in.H * in.P;
  const int num_s = static_cast<int>(min<int64_t>(in.S - s0, ST));
  const T* rows = kColumns ? B_of<T>(in, chunk.row, heads.g) : C_of<T>(in, chunk.row, heads.g);
  const T* others = kColumns ? C_of<T>(in, chunk.row, heads.g) : B_of<T>(in, chunk.row, heads.g);
  const int p_tiles = static_cast<int>(ceil_div(in.P, kP));

  const auto fetch = [&](int item) {
    auto& stage = memory.stage[item % 2];
    const int p0 = item % p_tiles * kP, num_p = static_cast<int>(min<int64_t>(in.P - p0, kP));
    const int h = heads.begin + item / p_tiles;
    const T *x = x_of<T>(in, chunk.row) + h * in.P + p0, *g = dy + chunk.row * inner + h * in.P + p0;
    load_tile<Q, kP, kThreads<T>>(in.wide, kColumns ? stage.rows : stage.others, kStrideP, x, in.xbc_stride, length, num_p);
    load_tile<Q, kP, kThreads<T>>(in.wide, kColumns ? stage.others : stage.rows, kStrideP, g, inner, length, num_p);
    load_tile<kP, ST, kThreads<T>>(in.wide, stage.state, kStrideS, states + ((heads.m * in.H + h) * in.P + p0) * in.S + s0, in.S, num_p, num_s);
    if (threadIdx.x < Q) {
      const int64_t at = (heads.m * in.H + h) * Q + threadIdx.x;
      stage.step[threadIdx.x] = in.step[at], stage.decay[threadIdx.x] = in.decay[at];
    }
    cp_async_commit();
  };

  {
    float sums[Q / 8][4] = {};
    for (int s = 1; s <= slices; ++s) {  // this block's own slice is the last and stays
      const int64_t from = static_cast<int64_t>((slice + s) % slices) * ST;
      const int width = static_cast<int>(min<int64_t>(in.S - from, ST));
      if (s > 1) __syncthreads();
      load_tile<Q, ST, kThreads<T>>(in.wide, memory.rows, kStrideS, rows + from, in.xbc_stride, length, width);
      load_tile<Q, ST, kThreads<T>>(in.wide, memory.others, kStrideS, others + from, in.xbc_stride, length, width);
      wait_for_tiles();
      add_products<kColumns, Q / 16>(sums, memory.rows, memory.others, kStrideS, length, width);
    }
#pragma unroll
    for (int n = 0; n < Q / 16; ++n) keep(memory.kept[warp_of()][n][lane_of()], sums[2 * n], sums[2 * n + 1]);
  }

  const int row[2] = {16 * warp_of() + row_of(0), 16 * warp_of() + row_of(2)};
  float total[ST / 8][4] = {}, mixed[Q / 8][4] = {};  // the gradient, and that of C B^T
  float by_token[2] = {}, by_end[2] = {}, diagonal[2] = {}, by_gap = 0;
  const int items = static_cast<int>(heads.end - heads.begin) * p_tiles;
  fetch(0);
  for (int item = 0; item < items; ++item) {
    cp_async_wait<0>();
    __syncthreads();
    if (item + 1 < items) fetch(item + 1);
    const auto& stage = memory.stage[item % 2];
    const int num_p = static_cast<int>(min<int64_t>(in.P - item % p_tiles * kP, kP));
    if (item % p_tiles == 0) by_token[0] = by_token[1] = by_end[0] = by_end[1] = diagonal[0] = diagonal[1] = by_gap = 0;
    if (16 * warp_of() < length) {
      const float lam[2] = {stage.decay[row[0]], stage.decay[row[1]]}, step[2] = {kColumns ? stage.step[row[0]] : 1.0f, kColumns ? stage.step[row[1]] : 1.0f};
      FragmentA<T> a[kP / 16];
#pragma unroll
      for (int k = 0; k < kP / 16; ++k) load_a<false>(a[k], stage.rows, kStrideP, 16 * warp_of(), 16 * k);
#pragma unroll
      for (int tile = 0; tile < Q / 16; ++tile) {
        if (!meets<kColumns>(tile, length)) continue;
        const FragmentA<T> kept = memory.kept[warp_of()][tile][lane_of()];
        float dm[2][4] = {};
#pragma unroll
        for (int k = 0; k < kP / 16; ++k) {
          if (16 * k >= num_p) break;
          FragmentB<T> b[2];
          load_b<false>(b, stage.others, kStrideP, 16 * tile, 16 * k);
          multiply(dm[0], a[k], b[0]);
          multiply(dm[1], a[k], b[1]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int other = 16 * tile + column_of(0) + 8 * (i / 2), half = i % 2;
          const float2 decays = load_vector<float2>(stage.decay + other), steps = load_vector<float2>(stage.step + other);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float decay = e ? decays.y : decays.x, gap = kColumns ? decay - lam[half] : lam[half] - decay;
            const float weight = meets_token<kColumns>(row[half], other + e) ? exp2_for<T>(gap) * (kColumns ? 1.0f : e ? steps.y : steps.x) : 0.0f;
            const float gradient = dm[i / 2][2 * half + e], part = gradient * weight, product = e ? kept.high(i) : kept.low(i);
            mixed[2 * tile + i / 2][2 * half + e] += part * step[half];
            if (row[half] == other + e) diagonal[half] = fmaf(gradient, kColumns ? product : 1.0f, diagonal[half]);
            else if (slice == 0) by_token[half] = fmaf(part, product, by_token[half]), by_gap = fmaf(part * product, kColumns ? 0.0f : gap, by_gap);
          }
        }
      }
      float through[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) through[half] = exp2_for<T>(kColumns ? stage.decay[Q - 1] - lam[half] : lam[half]);
#pragma unroll
      for (int n = 0; n < ST / 8; n += 2) {
        if (8 * n >= num_s) break;
        float by_state[2][4] = {};
#pragma unroll
        for (int k = 0; k < kP / 16; ++k) {
          if (16 * k >= num_p) break;
          FragmentB<T> b[2];
          load_b<true>(b, stage.state, kStrideS, 8 * n, 16 * k);
          multiply(by_state[0], a[k], b[0]);
          multiply(by_state[1], a[k], b[1]);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float part = by_state[j][e] * through[e / 2];
            by_end[e / 2] = fmaf(part, to_float(memory.rows[row[e / 2] * kStrideS + 8 * (n + j) + column_of(e)]), by_end[e / 2]);
            total[n + j][e] += part * step[e / 2];
          }
      }
    }
    if (item % p_tiles != p_tiles - 1) continue;
    const int h = heads.begin + item / p_tiles;
    const int64_t at = (heads.m * in.H + h) * Q, all = in.num_chunks * in.H * Q;
    float* const to = kColumns ? out.columns : out.rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float token = warp_sum<4>(by_token[half]), state = warp_sum<4>(by_end[half]), own = warp_sum<4>(diagonal[half]);
      if (lane_of() % 4 != 0) continue;
      to[(slice + 1) * all + at + row[half]] = state;
      if (slice > 0) continue;
      to[at + row[half]] = token;
      (kColumns ? out.own : out.diagonal)[at + row[half]] = own;
    }
    if (!kColumns) {
      const float gaps = warp_sum(by_gap);
      if (lane_of() == 0 && slice == 0) out.gaps[(heads.m * in.H + h) * kWarps<T> + warp_of()] = gaps;
    }
  }
  if (16 * warp_of() >= length) return;
#pragma unroll
  for (int tile = 0; tile < Q / 16; ++tile) {
    if (!meets<kColumns>(tile, length)) continue;
    FragmentA<T> a;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.set(i, mixed[2 * tile + i / 2][i % 2 * 2], mixed[2 * tile + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < ST / 8; n += 2) {
      if (8 * n >= num_s) break;
      FragmentB<T> b[2];
      load_b<true>(b, memory.others, kStrideS, 8 * n, 16 * tile);
      multiply(total[n], a, b[0]);
      multiply(total[n + 1], a, b[1]);
    }
  }
  T* to = dxbc + chunk.row * (inner + 2 * in.G * in.S) + inner + (kColumns ? heads.g : in.G + heads.g) * in.S + s0;
#pragma unroll
  for (int n = 0; n < ST / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int c = 8 * n + column_of(e);
      if (row[e / 2] < length && c < num_s) store_pair(in.wide, to + row[e / 2] * (inner + 2 * in.G * in.S) + c, total[n][e], total[n][e + 1], c + 1 < num_s);
    }
}

// --- the gradient of dt: a warp a chunk and head -----------------------------------------------------------------------------------
// A token's decay has a part in every pair of a token before it and one from it on (r: the rows' sums over pairs, u: the columns', less what is on one side
// alone), in all that the tokens from it on read from the entering state, in all that those before it leave in the state, and in the entering state itself.
template <int Q>
__global__ void __launch_bounds__(kStepWarps* kWarp) gradient_steps_kernel(ScanInputs in, ScanSums sums, int slices, int end_parts, void* ddt, float* partials) {
  constexpr int kParts = Q / kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kStepWarps + warp_of(), count = in.num_chunks * in.H;
  if (index >= count) return;
  const int64_t m = index / in.H, h = index % in.H;
  const ScanChunk chunk = in.chunks[m];
  const float A = -expf(in.A_log[h]);
  float through = 0, gaps = 0, of_bias = 0, of_A = 0, of_D = 0;
  for (int i = lane_of(); i < end_parts; i += kWarp) through += sums.ends[index * end_parts + i];
  for (int i = lane_of(); i < Q / 16; i += kWarp) gaps += sums.gaps[index * (Q / 16) + i];
  through = warp_sum(through), gaps = warp_sum(gaps);
  float before = through * exp2f(in.decay[index * Q + Q - 1]);
  float d[kParts], u[kParts], decay[kParts];  // of the tokens lane, lane + 32, ...
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int q = part * kWarp + lane_of();
    d[part] = u[part] = 0;
    float left = 0;
    if (q < chunk.length) {
      d[part] = in.step[index * Q + q];
      for (int s = 0; s < slices; ++s) left += sums.columns[((s + 1) * count + index) * Q + q];
      u[part] = left;
    }
    const float up_to = before + warp_scan(d[part] * left);
    before = shuffle(up_to, kWarp - 1);
    decay[part] = up_to - d[part] * left;
  }
  float after_states = 0, after_pairs = 0;
#pragma unroll
  for (int part = kParts - 1; part >= 0; --part) {
    const int q = part * kWarp + lane_of(), mirrored = part * kWarp + kWarp - 1 - lane_of();
    float states = 0, pairs = 0;
    if (mirrored < chunk.length) {
      pairs = sums.rows[index * Q + mirrored] - in.step[index * Q + mirrored] * sums.columns[index * Q + mirrored];
      for (int s = 0; s < slices; ++s) states += sums.rows[((s + 1) * count + index) * Q + mirrored];
    }
    states = after_states + warp_scan(states), pairs = after_pairs + warp_scan(pairs);
    after_states = shuffle(states, kWarp - 1), after_pairs = shuffle(pairs, kWarp - 1);
    decay[part] += shuffle(states, kWarp - 1 - lane_of());
    of_A = fmaf(decay[part], d[part] * A, of_A);
    decay[part] += shuffle(pairs, kWarp - 1 - lane_of());
    if (q >= chunk.length) continue;
    u[part] += sums.columns[index * Q + q] + sums.own[index * Q + q];
    const float raw = raw_step(in, chunk.row + q, h), plain = softplus(raw);
    const float slope = plain >= in.dt_min && plain <= in.dt_max ? sigmoid_for<float>(raw) : 0.0f;
    const float gradient = (u[part] + A * decay[part]) * slope;
    of_bias += gradient;
    of_D += sums.diagonal[index * Q + q];
    const int64_t at = (chunk.row + q) * in.H + h;
    if (in.dt_type == Type::kFloat) static_cast<float*>(ddt)[at] = gradient;
    else static_cast<bf16*>(ddt)[at] = from_float<bf16>(gradient);
  }
  of_bias = warp_sum(of_bias), of_A = warp_sum(of_A), of_D = warp_sum(of_D);
  if (lane_of() != 0) return;
  float* to = partials + m * 3 * in.H + h;
  to[0] = of_bias, to[in.H] = of_A + gaps / kLog2e, to[2 * in.H] = of_D;
}

// --- one token a span: a warp 4 rows of the state at a time --------------------------------------------------------------------------
constexpr int kUpdateThreads = 128, kUpdateRows = 4;

template <class T, bool kWide>
__global__ void __launch_bounds__(kUpdateThreads) update_kernel(ScanInputs in, const int64_t* slots, float* state, T* y) {
  constexpr int V = kWide ? 4 : 1;
  const int64_t i = static_cast<int64_t>(blockIdx.x) / in.H, h = static_cast<int64_t>(blockIdx.x) % in.H, g = h / (in.H / in.G);
  const int64_t slot = slots[2 * i], resumes = slots[2 * i + 1];
  const float d = step_of(in, raw_step(in, i, h)), through = resumes ? exp2f(d * -expf(in.A_log[h]) * kLog2e) : 0.0f;
  const T *x = x_of<T>(in, i) + h * in.P, *B = B_of<T>(in, i, g), *C = C_of<T>(in, i, g);
  float* own = state + (slot * in.H + h) * in.P * in.S;
  for (int64_t p0 = int64_t{warp_of()} * kUpdateRows; p0 < in.P; p0 += kUpdateThreads / kWarp * kUpdateRows) {
    float sum[kUpdateRows] = {}, dx[kUpdateRows];
#pragma unroll
    for (int r = 0; r < kUpdateRows; ++r) dx[r] = p0 + r < in.P ? d * to_float(x[p0 + r]) : 0.0f;
    for (int64_t s = int64_t{V} * lane_of(); s < in.S; s += V * kWarp) {
      Pack<kWide, float, V> before[kUpdateRows];
#pragma unroll
      for (int r = 0; r < kUpdateRows; ++r)
        if (p0 + r < in.P) before[r].load(own + (p0 + r) * in.S + s);
      float b[V], c[V];
#pragma unroll
      for (int v = 0; v < V; ++v) b[v] = to_float(B[s + v]), c[v] = to_float(C[s + v]);
#pragma unroll
      for (int r = 0; r < kUpdateRows; ++r) {
        if (p0 + r >= in.P) break;
        float now[V];
        before[r].get(now);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          now[v] = (resumes ? through * now[v] : 0.0f) + dx[r] * b[v];
          sum[r] = fmaf(now[v], c[v], sum[r]);
        }
        store<kWide>(own + (p0 + r) * in.S + s, now);
      }
    }
#pragma unroll
    for (int r = 0; r < kUpdateRows; ++r) {
      const float all = warp_sum(sum[r]);
      if (lane_of() == r && p0 + r < in.P) y[(i * in.H + h) * in.P + p0 + r] = from_float<T>(fmaf(in.D[h], to_float(x[p0 + r]), all));
    }
  }
}

// --- launches ----------------------------------------------------------------------------------------------------------------------
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Columns of a tile of S: 128 for bf16 where the device's blocks have the shared memory for it.
int tile_of_S(Type type, int64_t S) {
  return type == Type::kFloat || S <= 64 || sizeof(GradientMemory<bf16, 128>) > most_shared_memory() ? 64 : 128;
}

template <int kValue>
using Width = std::integral_constant<int, kValue>;
// task(type, width of a tile of S)
template <class Task>
Status by_shape(const ScanInputs& in, Task task) {
  if (in.type == Type::kFloat) return task(float{}, Width<64>{});
  return tile_of_S(in.type, in.S) == 64 ? task(bf16{}, Width<64>{}) : task(bf16{}, Width<128>{});
}

// Parts that the heads of a group are cut into, so that there are as many blocks as the device holds at once.
int splits_of(const ScanInputs& in) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(2 * multiprocessors(), in.num_chunks * in.G), 1, in.H / in.G));
}
dim3 blocks(int64_t n) { return dim3(static_cast<unsigned>(n)); }

template <bool kGradient>
Status add_states(const ScanInputs& in, const void* dy, void* states, Stream stream) {
  return by_shape(in, [&](auto type, auto width) {
    using T = decltype(type);
    constexpr int ST = decltype(width)::value;
    const int splits = splits_of(in);
    const dim3 grid(static_cast<unsigned>(in.num_chunks * in.G * splits), static_cast<unsigned>(ceil_div(in.P, kP) * ceil_div(in.S, ST)));
    return launch((states_kernel<T, ST, kGradient>), grid, dim3(kThreads<T>), sizeof(StatesMemory<T, ST>), stream, in, static_cast<const T*>(dy),
                  static_cast<T*>(states), splits);
  });
}
template <bool kGradient>
Status pass(const ScanInputs& in, void* states, float* state, const void* entering, float* ends, Stream stream) {
  return by_shape(in, [&](auto type, auto) {
    using T = decltype(type);
    const int64_t vector = in.wide ? 16 / static_cast<int>(sizeof(T)) : 1;
    const auto run = [&](auto kernel) {
      return launch(kernel, blocks(in.num_spans * in.H * ceil_div(in.P * in.S, vector * kPassThreads)), dim3(kPassThreads), 0, stream, in, static_cast<T*>(states),
                    state, static_cast<const T*>(entering), ends);
    };
    return in.wide ? run(pass_kernel<T, true, kGradient>) : run(pass_kernel<T, false, kGradient>);
  });
}
template <bool kGradient>
Status outputs(const ScanInputs& in, const void* dy, const void* states, void* out, int64_t out_stride, Stream stream) {
  return by_shape(in, [&](auto type, auto width) {
    using T = decltype(type);
    constexpr int ST = decltype(width)::value;
    const int splits = splits_of(in);
    return launch((outputs_kernel<T, ST, kGradient>), blocks(in.num_chunks * in.G * splits), dim3(kThreads<T>), sizeof(OutputsMemory<T, ST>), stream, in,
                  static_cast<const T*>(dy), static_cast<const T*>(states), static_cast<T*>(out), out_stride, splits);
  });
}

}  // namespace

int64_t scan_chunk(Type type) { return type == Type::kFloat ? kQ<float> : kQ<bf16>; }
int64_t scan_slices(Type type, int64_t S) { return ceil_div(S, tile_of_S(type, S)); }
int64_t scan_gap_parts(Type type) { return scan_chunk(type) / 16; }
int64_t scan_end_parts(const ScanInputs& in) { return ceil_div(in.P * in.S, (in.wide ? in.type == Type::kFloat ? 4 : 8 : 1) * kWarp); }
bool scan_wide(const ScanInputs& in, const void* other) {
  const int64_t V = in.type == Type::kFloat ? 4 : 8;
  return in.P % V == 0 && in.S % V == 0 && in.xbc_stride % V == 0 && aligned(in.xbc) && aligned(other);
}

Status scan_steps(const ScanInputs& in, Stream stream) {
  const dim3 grid = blocks(ceil_div(in.num_chunks * in.H, kStepWarps)), block(kStepWarps * kWarp);
  if (in.type == Type::kFloat) return launch(steps_kernel<kQ<float>>, grid, block, 0, stream, in);
  return launch(steps_kernel<kQ<bf16>>, grid, block, 0, stream, in);
}

Status scan_states(const ScanInputs& in, void* states, Stream stream) { return add_states<false>(in, nullptr, states, stream); }
Status scan_pass(const ScanInputs& in, void* states, float* state, Stream stream) { return pass<false>(in, states, state, nullptr, nullptr, stream); }
Status scan_outputs(const ScanInputs& in, const void* entering, void* y, Stream stream) { return outputs<false>(in, nullptr, entering, y, in.H * in.P, stream); }

Status scan_gradient_states(const ScanInputs& in, const void* dy, const void* entering, void* leaving, const ScanSums& sums, Stream stream) {
  const Status bad = add_states<true>(in, dy, leaving, stream);
  return bad ? bad : pass<true>(in, leaving, nullptr, entering, sums.ends, stream);
}
Status scan_gradient_x(const ScanInputs& in, const void* dy, const void* leaving, void* dxbc, Stream stream) {
  return outputs<true>(in, dy, leaving, dxbc, in.H * in.P + 2 * in.G * in.S, stream);
}
Status scan_gradient_bc(const ScanInputs& in, const void* dy, const void* entering, const void* leaving, void* dxbc, const ScanSums& sums, Stream stream) {
  return by_shape(in, [&](auto type, auto width) {
    using T = decltype(type);
    constexpr int ST = decltype(width)::value;
    const dim3 grid = blocks(in.num_chunks * in.G * ceil_div(in.S, ST));
    const auto run = [&](auto kernel, const void* states) {
      return launch(kernel, grid, dim3(kThreads<T>), sizeof(GradientMemory<T, ST>), stream, in, static_cast<const T*>(dy), static_cast<const T*>(states),
                    static_cast<T*>(dxbc), sums);
    };
    const Status bad = run(gradient_bc_kernel<T, ST, false>, entering);
    return bad ? bad : run(gradient_bc_kernel<T, ST, true>, leaving);
  });
}
Status scan_gradient_steps(const ScanInputs& in, const ScanSums& sums, void* ddt, float* partials, Stream stream) {
  const dim3 grid = blocks(ceil_div(in.num_chunks * in.H, kStepWarps)), block(kStepWarps * kWarp);
  const int slices = static_cast<int>(scan_slices(in.type, in.S)), parts = static_cast<int>(scan_end_parts(in));
  if (in.type == Type::kFloat) return launch(gradient_steps_kernel<kQ<float>>, grid, block, 0, stream, in, sums, slices, parts, ddt, partials);
  return launch(gradient_steps_kernel<kQ<bf16>>, grid, block, 0, stream, in, sums, slices, parts, ddt, partials);
}

Status scan_step(const ScanInputs& in, const int64_t* slots, float* state, void* y, Stream stream) {
  const bool vectors = in.S % 4 == 0 && aligned(state);
  return by_shape(in, [&](auto type, auto) {
    using T = decltype(type);
    const auto run = [&](auto kernel) { return launch(kernel, blocks(in.num_spans * in.H), dim3(kUpdateThreads), 0, stream, in, slots, state, static_cast<T*>(y)); };
    return vectors ? run(update_kernel<T, true>) : run(update_kernel<T, false>);
  });
}

}  // namespace tessera::gpu
