// Sorting: blocks of 256 slots count their experts, a scan over blocks tells where each block's rows of an expert begin, and every slot counts those of its
// expert before it in the block: no atomics, so the order is that of the slots. 8 bytes a slot are read twice and 24 written.
// Rows: a block a token (or sorted row), 16 bytes a thread; a token's k rows are in flight together. Each pass moves what its formula names, once.
#include "layers/cuda/experts.hpp"

#include "layers/cuda/grouped_gemm.hpp"
#include "layers/cuda/launch.hpp"

namespace tessera::gpu {
namespace {

constexpr int kSlots = 256;    // of a block that sorts
constexpr int kThreads = 128;  // of a block that moves rows

__device__ inline int expert_of(const int64_t* indices, int64_t slot, int64_t E) { return static_cast<int>(max(int64_t{0}, min(E - 1, indices[slot]))); }

// in_block[b, e]: slots of block b that go to e.
__global__ void __launch_bounds__(kSlots) count_kernel(const int64_t* indices, int64_t M, int64_t E, int32_t* in_block) {
  int32_t* const expert = reinterpret_cast<int32_t*>(shared_memory());
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kSlots + threadIdx.x;
  const int here = static_cast<int>(min(int64_t{kSlots}, M - static_cast<int64_t>(blockIdx.x) * kSlots));
  if (slot < M) expert[threadIdx.x] = expert_of(indices, slot, E);
  __syncthreads();
  for (int64_t e = threadIdx.x; e < E; e += kSlots) {
    int count = 0;
    for (int i = 0; i < here; ++i) count += expert[i] == e;
    in_block[blockIdx.x * E + e] = count;
  }
}

// in_block becomes the slots of the blocks before; counts[e] their sum.
__global__ void __launch_bounds__(kSlots) scan_kernel(int32_t* in_block, int64_t blocks, int64_t E, int64_t* counts) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kSlots + threadIdx.x;
  if (e >= E) return;
  constexpr int kAhead = 8;
  int before = 0;
  for (int64_t b = 0; b < blocks; b += kAhead) {
    int count[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) count[i] = b + i < blocks ? in_block[(b + i) * E + e] : 0;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (b + i < blocks) in_block[(b + i) * E + e] = before;
      before += count[i];
    }
  }
  counts[e] = before;
}

__global__ void __launch_bounds__(kSlots) place_kernel(const int64_t* indices, int64_t M, int64_t k, int64_t E, const int32_t* before, const int32_t* first_row, int64_t* slots, int64_t* tokens,
                                                       int64_t* rows) {
  int32_t* const expert = reinterpret_cast<int32_t*>(shared_memory());
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kSlots + threadIdx.x;
  const int e = slot < M ? expert_of(indices, slot, E) : -1;
  expert[threadIdx.x] = e;
  __syncthreads();
  if (slot >= M) return;
  int rank = 0;
  for (int i = 0; i < static_cast<int>(threadIdx.x); ++i) rank += expert[i] == e;
  const int64_t row = int64_t{first_row[e]} + before[blockIdx.x * E + e] + rank;
  slots[row] = slot, tokens[row] = slot / k, rows[slot] = row;
}

// A row's columns, V at a time for each thread.
template <class T, bool kWide>
constexpr int kColumns = kWide ? 16 / static_cast<int>(sizeof(T)) : 1;

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) take_kernel(const T* x, const int64_t* token, T* y, int64_t D) {
  constexpr int V = kColumns<T, kWide>;
  const int64_t m = blockIdx.x;
  const T* from = x + token[m] * D;
  T* to = y + m * D;
  for (int64_t d = int64_t{V} * threadIdx.x; d < D; d += V * kThreads) {
    Pack<kWide, T, V> v;
    v.load(from + d);
    v.store(to + d);
  }
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) sum_kernel(const T* y, const float* weights, const int64_t* row, T* out, int64_t k, int64_t D) {
  constexpr int V = kColumns<T, kWide>, kAhead = 4;
  const int64_t n = blockIdx.x;
  for (int64_t d = int64_t{V} * threadIdx.x; d < D; d += V * kThreads) {
    float sum[V] = {};
    for (int64_t first = 0; first < k; first += kAhead) {
      Pack<kWide, T, V> ahead[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (first + j < k) ahead[j].load(y + row[n * k + first + j] * D + d);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (first + j >= k) break;
        float v[V];
        ahead[j].get(v);
        const float weight = weights ? weights[n * k + first + j] : 1.0f;
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] = fmaf(weight, v[i], sum[i]);
      }
    }
    store<kWide>(out + n * D + d, sum);
  }
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) spread_kernel(const T* dout, const float* weights, const int64_t* row, T* dy, int64_t k, int64_t D) {
  constexpr int V = kColumns<T, kWide>;
  const int64_t n = blockIdx.x;
  for (int64_t d = int64_t{V} * threadIdx.x; d < D; d += V * kThreads) {
    float v[V];
    load<kWide>(dout + n * D + d, v);
    for (int64_t j = 0; j < k; ++j) {
      const float weight = weights[n * k + j];
      float scaled[V];
#pragma unroll
      for (int i = 0; i < V; ++i) scaled[i] = weight * v[i];
      store<kWide>(dy + row[n * k + j] * D + d, scaled);
    }
  }
}

// A warp takes every fourth j.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) products_kernel(const T* dout, const T* y, const int64_t* row, float* dweights, int64_t k, int64_t D) {
  constexpr int V = kColumns<T, kWide>;
  const int64_t n = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t j = static_cast<int>(threadIdx.x) / kWarp; j < k; j += kThreads / kWarp) {
    const T* from = y + row[n * k + j] * D;
    float sum = 0;
    for (int64_t d = int64_t{V} * lane; d < D; d += V * kWarp) {
      float a[V], b[V];
      load<kWide>(dout + n * D + d, a);
      load<kWide>(from + d, b);
#pragma unroll
      for (int i = 0; i < V; ++i) sum = fmaf(a[i], b[i], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) dweights[n * k + j] = sum;
  }
}

// run(T{}, wide) with the rows' type, wide where all pointers and the width are whole 16 bytes.
template <class Run>
Status by_type(Type type, int64_t D, std::initializer_list<const void*> pointers, Run run) {
  const int64_t bytes = type == Type::kBf16 ? 2 : 4;
  bool wide = D * bytes % 16 == 0;
  for (const void* p : pointers) wide = wide && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  if (type == Type::kBf16) return wide ? run(bf16{}, std::true_type{}) : run(bf16{}, std::false_type{});
  return wide ? run(float{}, std::true_type{}) : run(float{}, std::false_type{});
}

int64_t sort_blocks(int64_t M) { return ceil_div(M, kSlots); }
dim3 grid_of(int64_t n) { return dim3(static_cast<unsigned>(n)); }

}  // namespace

int64_t dispatch_scratch(int64_t M, int64_t E) { return (sort_blocks(M) + 1) * E + 1; }

Status dispatch(const int64_t* indices, int64_t M, int64_t k, int64_t E, int32_t* scratch, int32_t* first_row, int64_t* counts, int64_t* slot, int64_t* token, int64_t* row, Stream stream) {
  const dim3 blocks = grid_of(sort_blocks(M));
  Status bad = launch(count_kernel, blocks, dim3(kSlots), kSlots * sizeof(int32_t), stream, indices, M, E, scratch);
  if (!bad) bad = launch(scan_kernel, grid_of(ceil_div(E, kSlots)), dim3(kSlots), 0, stream, scratch, sort_blocks(M), E, counts);
  if (!bad) bad = expert_rows(counts, E, M, first_row, scratch + sort_blocks(M) * E, stream);
  if (!bad) bad = launch(place_kernel, blocks, dim3(kSlots), kSlots * sizeof(int32_t), stream, indices, M, k, E, scratch, first_row, slot, token, row);
  return bad;
}

Status take_rows(const void* x, const int64_t* token, void* y, Type type, int64_t M, int64_t D, Stream stream) {
  return by_type(type, D, {x, y}, [&](auto t, auto wide) {
    using T = decltype(t);
    return launch((take_kernel<T, wide.value>), grid_of(M), dim3(kThreads), 0, stream, static_cast<const T*>(x), token, static_cast<T*>(y), D);
  });
}

Status sum_rows(const void* y, const float* weights, const int64_t* row, void* out, Type type, int64_t N, int64_t k, int64_t D, Stream stream) {
  return by_type(type, D, {y, out}, [&](auto t, auto wide) {
    using T = decltype(t);
    return launch((sum_kernel<T, wide.value>), grid_of(N), dim3(kThreads), 0, stream, static_cast<const T*>(y), weights, row, static_cast<T*>(out), k, D);
  });
}

Status spread_rows(const void* dout, const float* weights, const int64_t* row, void* dy, Type type, int64_t N, int64_t k, int64_t D, Stream stream) {
  return by_type(type, D, {dout, dy}, [&](auto t, auto wide) {
    using T = decltype(t);
    return launch((spread_kernel<T, wide.value>), grid_of(N), dim3(kThreads), 0, stream, static_cast<const T*>(dout), weights, row, static_cast<T*>(dy), k, D);
  });
}

Status row_products(const void* dout, const void* y, const int64_t* row, float* dweights, Type type, int64_t N, int64_t k, int64_t D, Stream stream) {
  return by_type(type, D, {dout, y}, [&](auto t, auto wide) {
    using T = decltype(t);
    return launch((products_kernel<T, wide.value>), grid_of(N), dim3(kThreads), 0, stream, static_cast<const T*>(dout), static_cast<const T*>(y), row, dweights, k, D);
  });
}

}  // namespace tessera::gpu
