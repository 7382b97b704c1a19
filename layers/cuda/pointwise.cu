// A thread has four accesses of 16 bytes in flight. Bytes an element in bf16: relu2 forward 2 read + 2 written, backward 4 + 2.
// Drawing: a thread makes one turn of the generator, four numbers, so that dropout moves 2 + 2 bytes and a uniform number 4; ten rounds of two 64-bit products for
// four numbers are what bounds them, at about half of the memory's speed.
#include "layers/cuda/pointwise.hpp"

#include "layers/cuda/launch.hpp"

namespace tessera::gpu {
namespace {

constexpr int kThreads = 256, kAhead = 4;

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

__device__ inline float relu(float v) { return v < 0.0f ? 0.0f : v; }  // keeps NaN

// out[i] = task(values of the inputs at i); the elements after the last whole vector, or all where accesses are not aligned, one by one.
template <bool kWide, class T, int kInputs, class Task>
__device__ inline void for_elements(const T* const (&in)[kInputs], T* out, int64_t n, Task task) {
  constexpr int V = kWide ? kVector<T> : 1;
  const int64_t vectors = n / V, begin = static_cast<int64_t>(blockIdx.x) * kThreads * kAhead + threadIdx.x;
  Pack<kWide, T, V> packs[kAhead][kInputs];
#pragma unroll
  for (int a = 0; a < kAhead; ++a)
#pragma unroll
    for (int k = 0; k < kInputs; ++k)
      if (begin + a * kThreads < vectors) packs[a][k].load(in[k] + (begin + a * kThreads) * V);
#pragma unroll
  for (int a = 0; a < kAhead; ++a) {
    if (begin + a * kThreads >= vectors) break;
    float values[kInputs][V], result[V];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) packs[a][k].get(values[k]);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float one[kInputs];
#pragma unroll
      for (int k = 0; k < kInputs; ++k) one[k] = values[k][v];
      result[v] = task(one);
    }
    store<kWide>(out + (begin + a * kThreads) * V, result);
  }
  if constexpr (kWide) {
    const int64_t i = vectors * V + threadIdx.x;
    if (blockIdx.x > 0 || i >= n) return;
    float one[kInputs];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) one[k] = to_float(in[k][i]);
    out[i] = from_float<T>(task(one));
  }
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) relu2_forward_kernel(const T* x, T* y, int64_t n) {
  const T* const in[] = {x};
  for_elements<kWide>(in, y, n, [](const float (&v)[1]) { return relu(v[0]) * relu(v[0]); });
}
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) relu2_backward_kernel(const T* x, const T* dy, T* dx, int64_t n) {
  const T* const in[] = {x, dy};
  for_elements<kWide>(in, dx, n, [](const float (&v)[2]) { return 2.0f * relu(v[0]) * v[1]; });
}

// --- Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011 ---------------------------------------------
constexpr int kAtOnce = 4;  // numbers of a turn

__device__ inline void philox(uint64_t key, uint64_t token, uint64_t turn, float (&number)[kAtOnce]) {
  uint32_t c[4] = {static_cast<uint32_t>(turn), static_cast<uint32_t>(turn >> 32), static_cast<uint32_t>(token), static_cast<uint32_t>(token >> 32)};
  uint32_t k[2] = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{c[0]} * 0xD2511F53u, b = uint64_t{c[2]} * 0xCD9E8D57u;
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b), static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) number[i] = static_cast<float>(c[i] >> 8) * 0x1p-24f;
}

// Which token and which turn of the generator a thread has. Its columns begin `skipped` before the first that is wanted, if positive.
struct Turn {
  int64_t n, turn, column;  // the turn's first column, counted from shape.first: may be negative
};
__host__ __device__ inline int64_t turns_of(const DrawShape& s) { return s.width > 0 ? (s.first + s.width - 1) / kAtOnce - s.first / kAtOnce + 1 : 0; }
__device__ inline Turn turn_of(const DrawShape& s, int64_t item) {
  const int64_t turns = turns_of(s), turn = s.first / kAtOnce + item % turns;
  return {item / turns, turn, turn * kAtOnce - s.first};
}

// store(i, number) for each that is wanted; store4(first of four) where all are and accesses are whole vectors.
template <bool kWide, class Four, class One>
__device__ inline void draw(const DrawShape& s, Four four, One one) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= s.N * turns_of(s)) return;
  const Turn t = turn_of(s, item);
  float number[kAtOnce];
  philox(s.key, static_cast<uint64_t>(s.token[t.n]), static_cast<uint64_t>(t.turn), number);
  if constexpr (kWide) four(t.n * s.width + t.column, number);
  else
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (t.column + i >= 0 && t.column + i < s.width) one(t.n * s.width + t.column + i, number[i]);
}

template <bool kWide>
__global__ void __launch_bounds__(kThreads) uniform_kernel(DrawShape shape, float* out) {
  draw<kWide>(shape, [=](int64_t at, const float (&number)[kAtOnce]) { store<true>(out + at, number); }, [=](int64_t at, float number) { out[at] = number; });
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) dropout_kernel(DrawShape shape, const T* x, T* out, float p, float keep) {
  draw<kWide>(
      shape,
      [=](int64_t at, const float (&number)[kAtOnce]) {
        float v[kAtOnce];
        load<true>(x + at, v);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) v[i] = number[i] >= p ? v[i] / keep : 0.0f;
        store<true>(out + at, v);
      },
      [=](int64_t at, float number) { out[at] = from_float<T>(number >= p ? to_float(x[at]) / keep : 0.0f); });
}

// --- launches --------------------------------------------------------------------------------------------------------------------
template <class... P>
bool aligned(P... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

dim3 blocks_of(int64_t items, int64_t of_block) { return dim3(static_cast<unsigned>(ceil_div(items, of_block))); }

template <class T, bool kWide>
dim3 element_blocks(int64_t n) {
  return blocks_of(n, int64_t{kThreads} * kAhead * (kWide ? kVector<T> : 1));
}

template <class T>
Status relu2_forward_as(const T* x, T* y, int64_t n, Stream stream) {
  if (aligned(x, y)) return launch((relu2_forward_kernel<T, true>), element_blocks<T, true>(n), dim3(kThreads), 0, stream, x, y, n);
  return launch((relu2_forward_kernel<T, false>), element_blocks<T, false>(n), dim3(kThreads), 0, stream, x, y, n);
}
template <class T>
Status relu2_backward_as(const T* x, const T* dy, T* dx, int64_t n, Stream stream) {
  if (aligned(x, dy, dx)) return launch((relu2_backward_kernel<T, true>), element_blocks<T, true>(n), dim3(kThreads), 0, stream, x, dy, dx, n);
  return launch((relu2_backward_kernel<T, false>), element_blocks<T, false>(n), dim3(kThreads), 0, stream, x, dy, dx, n);
}

bool wide(const DrawShape& s) { return s.first % kAtOnce == 0 && s.width % kAtOnce == 0; }

template <class T>
Status dropout_as(const DrawShape& s, const T* x, T* out, float p, float keep, Stream stream) {
  const dim3 blocks = blocks_of(s.N * turns_of(s), kThreads);
  if (wide(s) && aligned(x, out)) return launch((dropout_kernel<T, true>), blocks, dim3(kThreads), 0, stream, s, x, out, p, keep);
  return launch((dropout_kernel<T, false>), blocks, dim3(kThreads), 0, stream, s, x, out, p, keep);
}

}  // namespace

Status relu2_forward(const void* x, void* y, int64_t n, Type type, Stream stream) {
  if (type == Type::kFloat) return relu2_forward_as(static_cast<const float*>(x), static_cast<float*>(y), n, stream);
  return relu2_forward_as(static_cast<const bf16*>(x), static_cast<bf16*>(y), n, stream);
}
Status relu2_backward(const void* x, const void* dy, void* dx, int64_t n, Type type, Stream stream) {
  if (type == Type::kFloat) return relu2_backward_as(static_cast<const float*>(x), static_cast<const float*>(dy), static_cast<float*>(dx), n, stream);
  return relu2_backward_as(static_cast<const bf16*>(x), static_cast<const bf16*>(dy), static_cast<bf16*>(dx), n, stream);
}

Status draw_uniform(const DrawShape& shape, float* out, Stream stream) {
  const dim3 blocks = blocks_of(shape.N * turns_of(shape), kThreads);
  if (wide(shape) && aligned(out)) return launch(uniform_kernel<true>, blocks, dim3(kThreads), 0, stream, shape, out);
  return launch(uniform_kernel<false>, blocks, dim3(kThreads), 0, stream, shape, out);
}
Status draw_dropout(const DrawShape& shape, const void* x, void* out, Type type, float p, float keep, Stream stream) {
  if (type == Type::kFloat) return dropout_as(shape, static_cast<const float*>(x), static_cast<float*>(out), p, keep, stream);
  return dropout_as(shape, static_cast<const bf16*>(x), static_cast<bf16*>(out), p, keep, stream);
}

}  // namespace tessera::gpu
