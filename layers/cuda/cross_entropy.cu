// A block takes a row: one read for its maximum and sum, kept together as it goes; as much of the row as fits stays in shared memory (a thread's own words), so that the
// second pass, which turns logits into their gradient, reads the rest again, mostly from L2: one block a multiprocessor for long rows.
// Bytes a token and word in bf16: 2 read + 2 written, and up to 2 read again where a row passes 160 KB; V = 131072: 122 to 183 ns a token at 4.3 TB/s.
// Two exponentials a word: 73 ns at 16 a clock and multiprocessor, beside the memory's.
#include "layers/cuda/cross_entropy.hpp"

#include "layers/cuda/launch.hpp"

namespace tessera::gpu {
namespace {

constexpr int kMostThreads = 1024, kAhead = 4;
constexpr int64_t kLong = 16384;               // words of a row that a block of kMostThreads takes
constexpr size_t kMostKept = 160 * 1024;       // bytes of a row in shared memory
constexpr size_t kSums = 2 * kWarp * sizeof(float);

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// A row as 16-byte vectors, and the few words before the first and after the last of them.
template <class T>
struct Row {
  static constexpr int V = kVector<T>;
  T* words;
  int64_t size, head, vectors;  // `head` words before the first vector

  __device__ Row(const LogitRows& rows, int64_t row) : words(static_cast<T*>(rows.logits) + row * rows.V), size(rows.V) {
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(words) % 16) / static_cast<int64_t>(sizeof(T));
    head = min<int64_t>(size, past == 0 ? 0 : V - past);
    vectors = (size - head) / V;
  }
  // Words outside vectors, fewer than 2 V, one a thread.
  __device__ int64_t odd() const { return size - vectors * V; }
  __device__ int64_t odd_at(int64_t i) const { return i < head ? i : i + vectors * V; }
};

struct Sum {
  float top, sum;  // sum exp(word - top)
};
__device__ inline Sum nothing() { return {-FLT_MAX, 0.0f}; }  // not -infinity: a difference of two would be no number

template <class T, int V>
__device__ inline void add(Sum& s, const float (&v)[V]) {
  float top = s.top;
#pragma unroll
  for (int i = 0; i < V; ++i) top = fmaxf(top, v[i]);
  if (top > s.top) s.sum *= exp_for<T>(s.top - top), s.top = top;
#pragma unroll
  for (int i = 0; i < V; ++i) s.sum += exp_for<T>(v[i] - s.top);
}

// Over the block, in a fixed order.
template <class T>
__device__ inline Sum block_sum(Sum s, float* shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  const auto over_warp = [](const Sum& mine) {
    const float top = warp_max(mine.top);
    return Sum{top, warp_sum(mine.sum * exp_for<T>(mine.top - top))};
  };
  s = over_warp(s);
  if (lane == 0) shared[2 * warp] = s.top, shared[2 * warp + 1] = s.sum;
  __syncthreads();
  return over_warp(lane < warps ? Sum{shared[2 * lane], shared[2 * lane + 1]} : nothing());
}

// The row's maximum and sum; of vector i of this thread the first `kept` go to shared memory.
template <class T>
__device__ inline Sum read_row(const Row<T>& row, int kept, uint4* own) {
  constexpr int V = kVector<T>;
  Sum s = nothing();
  const int64_t threads = blockDim.x;
  const T* from = row.words + row.head;
  int i = 0;
  for (int64_t v = threadIdx.x; v < row.vectors; v += kAhead * threads, i += kAhead) {
    Pack<true, T, V> packs[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (v + a * threads < row.vectors) packs[a].load(from + (v + a * threads) * V);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (v + a * threads >= row.vectors) break;
      float words[V];
      packs[a].get(words);
      add<T>(s, words);
      if (i + a < kept) store16(own + (i + a) * threads, uint4{packs[a].word[0], packs[a].word[1], packs[a].word[2], packs[a].word[3]});
    }
  }
  if (threadIdx.x < row.odd()) {
    const float word[1] = {to_float(row.words[row.odd_at(threadIdx.x)])};
    add<T>(s, word);
  }
  return s;
}

// Words become exp(word - lse), the target's less 1.
template <class T>
__device__ inline void write_gradient(const Row<T>& row, int64_t target, float lse, int kept, const uint4* own) {
  constexpr int V = kVector<T>;
  const int64_t threads = blockDim.x;
  T* const to = row.words + row.head;
  int i = 0;
  for (int64_t v = threadIdx.x; v < row.vectors; v += kAhead * threads, i += kAhead) {
    Pack<true, T, V> packs[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (v + a * threads >= row.vectors) break;
      if (i + a >= kept) packs[a].load(to + (v + a * threads) * V);
      else {
        const uint4 words = load16(own + (i + a) * threads);
        packs[a].word[0] = words.x, packs[a].word[1] = words.y, packs[a].word[2] = words.z, packs[a].word[3] = words.w;
      }
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (v + a * threads >= row.vectors) break;
      float words[V];
      packs[a].get(words);
      const int64_t at = row.head + (v + a * threads) * V;
#pragma unroll
      for (int w = 0; w < V; ++w) words[w] = exp_for<T>(words[w] - lse) - (at + w == target ? 1.0f : 0.0f);
      store<true>(to + (v + a * threads) * V, words);
    }
  }
  if (threadIdx.x < row.odd()) {
    const int64_t at = row.odd_at(threadIdx.x);
    row.words[at] = from_float<T>(exp_for<T>(to_float(row.words[at]) - lse) - (at == target ? 1.0f : 0.0f));
  }
}

template <class T>
__device__ inline void write_zeros(const Row<T>& row) {
  for (int64_t v = threadIdx.x; v < row.vectors; v += blockDim.x) store16(row.words + row.head + v * kVector<T>, uint4{0, 0, 0, 0});
  if (threadIdx.x < row.odd()) row.words[row.odd_at(threadIdx.x)] = from_float<T>(0.0f);
}

// kept: vectors of a thread in shared memory.
template <class T>
__global__ void __launch_bounds__(kMostThreads) softmax_kernel(LogitRows rows, float* loss, bool want_gradient, int kept) {
  const int64_t n = blockIdx.x, target = rows.targets[n];
  const Row<T> row(rows, n);
  if (target < 0) {
    if (threadIdx.x == 0) loss[n] = 0;
    if (want_gradient) write_zeros(row);
    return;
  }
  const int64_t local = target - rows.first;
  const float picked = threadIdx.x == 0 && local >= 0 && local < rows.V ? to_float(row.words[local]) : 0.0f;  // before anything is written
  uint4* const own = reinterpret_cast<uint4*>(shared_memory() + kSums) + threadIdx.x;
  const Sum s = block_sum<T>(read_row(row, kept, own), reinterpret_cast<float*>(shared_memory()));
  const float lse = s.top + logf(s.sum);
  if (threadIdx.x == 0) loss[n] = lse - picked;
  if (want_gradient) write_gradient(row, local, lse, kept, own);
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) sums_kernel(LogitRows rows, float* greatest, float* sum, float* picked) {
  const int64_t n = blockIdx.x, target = rows.targets[n], local = target - rows.first;
  const Row<T> row(rows, n);
  const Sum s = block_sum<T>(read_row(row, 0, static_cast<uint4*>(nullptr)), reinterpret_cast<float*>(shared_memory()));
  if (threadIdx.x > 0) return;
  greatest[n] = s.top, sum[n] = s.sum;
  picked[n] = target >= 0 && local >= 0 && local < rows.V ? to_float(row.words[local]) : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) gradient_kernel(LogitRows rows, const float* log_sum_exp) {
  const int64_t n = blockIdx.x, target = rows.targets[n];
  const Row<T> row(rows, n);
  if (target < 0) write_zeros(row);
  else write_gradient(row, target - rows.first, log_sum_exp[n], 0, static_cast<const uint4*>(nullptr));
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) count_kernel(LogitRows rows, const float* picked, float* count) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int64_t n = blockIdx.x;
  const Row<T> row(rows, n);
  const float limit = picked[n];
  float as_great = 0;  // exact below 2^24
#pragma unroll 4
  for (int64_t v = threadIdx.x; v < row.vectors; v += blockDim.x) {
    float words[kVector<T>];
    load<true>(row.words + row.head + v * kVector<T>, words);
#pragma unroll
    for (int w = 0; w < kVector<T>; ++w) as_great += words[w] >= limit ? 1.0f : 0.0f;
  }
  if (threadIdx.x < row.odd()) as_great += to_float(row.words[row.odd_at(threadIdx.x)]) >= limit ? 1.0f : 0.0f;
  as_great = warp_sum(as_great);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane == 0) shared[threadIdx.x / kWarp] = as_great;
  __syncthreads();
  as_great = warp_sum(lane < static_cast<int>(blockDim.x) / kWarp ? shared[lane] : 0.0f);
  if (threadIdx.x == 0) count[n] = as_great;
}

// --- launches --------------------------------------------------------------------------------------------------------------------
int threads_of(const LogitRows& rows) { return rows.V >= kLong ? kMostThreads : 256; }
dim3 blocks(const LogitRows& rows) { return dim3(static_cast<unsigned>(rows.c)); }
dim3 threads(const LogitRows& rows) { return dim3(static_cast<unsigned>(threads_of(rows))); }

template <class T>
Status softmax_as(const LogitRows& rows, float* loss, bool want_gradient, Stream stream) {
  const int64_t each = int64_t{threads_of(rows)} * 16, most = static_cast<int64_t>(kMostKept) / each;
  const int64_t kept = want_gradient ? min(most, ceil_div(rows.V / kVector<T>, threads_of(rows))) : 0;
  return launch(softmax_kernel<T>, blocks(rows), threads(rows), kSums + static_cast<size_t>(kept * each), stream, rows, loss, want_gradient, static_cast<int>(kept));
}

}  // namespace

Status softmax_rows(const LogitRows& rows, float* loss, bool want_gradient, Stream stream) {
  return rows.type == Type::kFloat ? softmax_as<float>(rows, loss, want_gradient, stream) : softmax_as<bf16>(rows, loss, want_gradient, stream);
}
Status softmax_sums(const LogitRows& rows, float* greatest, float* sum, float* picked, Stream stream) {
  if (rows.type == Type::kFloat) return launch(sums_kernel<float>, blocks(rows), threads(rows), kSums, stream, rows, greatest, sum, picked);
  return launch(sums_kernel<bf16>, blocks(rows), threads(rows), kSums, stream, rows, greatest, sum, picked);
}
Status softmax_gradient(const LogitRows& rows, const float* log_sum_exp, Stream stream) {
  if (rows.type == Type::kFloat) return launch(gradient_kernel<float>, blocks(rows), threads(rows), 0, stream, rows, log_sum_exp);
  return launch(gradient_kernel<bf16>, blocks(rows), threads(rows), 0, stream, rows, log_sum_exp);
}
Status count_as_great(const LogitRows& rows, const float* picked, float* count, Stream stream) {
  if (rows.type == Type::kFloat) return launch(count_kernel<float>, blocks(rows), threads(rows), kSums, stream, rows, picked, count);
  return launch(count_kernel<bf16>, blocks(rows), threads(rows), kSums, stream, rows, picked, count);
}

}  // namespace tessera::gpu
