// A block has the queries of up to 16 (token, head) pairs that read one kv head, and 256 keys, 16 at a time for each of its 4 warps, which softmax them apart
// and join at the end; a second kernel joins the blocks of a query in the order of the keys. Keys and values are read once for all heads that share them:
// 4 P bytes a key and kv head in bf16, against 2 x 16 x 2 P multiply-adds on the tensor cores; the partial sums are 1/16 of that, in fp32.
#include "layers/cuda/attention_cache.hpp"

#include "layers/cuda/fragments.hpp"
#include "layers/cuda/launch.hpp"

namespace tessera::gpu {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kKeys = 16;  // keys of a step of a warp

template <class T, int kP>
struct Shared {
  static constexpr int kStride = kP + 16 / static_cast<int>(sizeof(T));
  static constexpr int kStages = sizeof(T) == 2 ? 2 : 1;
  T queries[kQueryRows * kStride];
  union {
    T keys[kWarps][kStages][2][kKeys * kStride];  // and values
    float sums[kWarps][kQueryRows * kP];
  };
  float max[kWarps][kQueryRows], sum[kWarps][kQueryRows];
};

// The queries of a block, and the keys that any of them sees.
struct Place {
  int64_t span, head, first_query, queries, low, high, slot, start, first_token;
};
__device__ inline Place place(const CacheAttention& in, int64_t item, int64_t tiles) {
  const int64_t tile = item % tiles, head = item / tiles % in.K, span = item / tiles / in.K, R = in.H / in.K;
  const int32_t* const row = in.spans.table + 5 * span;
  const int64_t start = row[1], length = row[2], first = tile * kQueryRows, last = min(first + kQueryRows, length * R);
  const int64_t low = in.window > 0 ? max(int64_t{0}, start + first / R + 1 - in.window) : 0, high = start + (last - 1) / R + 1;
  return {span, head, first, max(int64_t{0}, last - first), low, high, row[4], start, in.spans.rows[span]};
}

// `wide`: whole 16-byte vectors.
template <class T, int kP>
__device__ inline void load_keys(T* to, const T* from, int64_t stride, int rows, int P, bool wide) {
  constexpr int V = 16 / static_cast<int>(sizeof(T)), kStride = Shared<T, kP>::kStride;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (wide) {
#pragma unroll 1
    for (int i = lane; i < kKeys * (kP / V); i += kWarp) {
      const int r = i / (kP / V), c = i % (kP / V) * V;
      const bool inside = r < rows && c < P;
      cp_async16(to + r * kStride + c, inside ? from + r * stride + c : from, inside ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (int i = lane; i < kKeys * kP; i += kWarp) {
      const int r = i / kP, c = i % kP;
      to[r * kStride + c] = r < rows && c < P ? from[r * stride + c] : from_float<T>(0.0f);
    }
  }
}

template <class T, int kP>
__global__ void __launch_bounds__(kThreads) attend_kernel(CacheAttention in, float* partial, int64_t tiles, int64_t splits, bool wide) {
  using Memory = Shared<T, kP>;
  constexpr int kStride = Memory::kStride, kStages = Memory::kStages;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const int64_t item = blockIdx.x / splits, split = blockIdx.x % splits, R = in.H / in.K;
  const Place at = place(in, item, tiles);
  const int64_t first = split * kCacheChunk, last = min(first + kCacheChunk, at.high);
  if (at.queries == 0 || last <= at.low || first >= at.high) return;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, P = static_cast<int>(in.P);

  const T* const q = static_cast<const T*>(in.q) + (at.first_token * in.H + at.head * R) * in.P;
  for (int i = thread; i < kQueryRows * kP; i += kThreads) {
    const int r = i / kP, c = i % kP;
    const int64_t query = at.first_query + r;
    shared.queries[r * kStride + c] = r < at.queries && c < P ? q[(query / R * in.H + query % R) * in.P + c] : from_float<T>(0.0f);
  }
  __syncthreads();

  const int64_t stride = in.K * in.P, base = (at.slot * in.L * in.K + at.head) * in.P;
  const T* const k = static_cast<const T*>(in.k) + base;
  const T* const v = static_cast<const T*>(in.v) + base;
  const auto load = [&](int64_t key, int stage) {
    if (key < last) {
      const int rows = static_cast<int>(min(int64_t{kKeys}, last - key));
      load_keys<T, kP>(shared.keys[warp][stage][0], k + key * stride, stride, rows, P, wide);
      load_keys<T, kP>(shared.keys[warp][stage][1], v + key * stride, stride, rows, P, wide);
    }
    cp_async_commit();
  };
  int64_t sees[2];  // the position of this lane's two queries
#pragma unroll
  for (int h = 0; h < 2; ++h) sees[h] = at.start + (at.first_query + row_of(2 * h)) / R;

  float greatest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, sums[kP / 8][4] = {};
  int stage = 0;
  if (kStages == 2) load(first + warp * kKeys, 0);
  for (int64_t key = first + warp * kKeys; key < last; key += kWarps * kKeys) {
    load(kStages == 2 ? key + kWarps * kKeys : key, kStages == 2 ? 1 - stage : 0);
    cp_async_wait<kStages - 1>();
    __syncwarp();
    float scores[2][4] = {};
#pragma unroll
    for (int c = 0; c < kP; c += 16) {
      FragmentA<T> a;
      FragmentB<T> b[2];
      load_a<false>(a, shared.queries, kStride, 0, c);
      load_b<false>(b, shared.keys[warp][stage][0], kStride, 0, c);
      multiply(scores[0], a, b[0]);
      multiply(scores[1], a, b[1]);
    }
    float top[2] = {greatest[0], greatest[1]};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t position = key + 8 * n + column_of(e);
        const bool seen = position < last && position <= sees[e / 2] && (in.window == 0 || position > sees[e / 2] - in.window);
        scores[n][e] = seen ? scores[n][e] * in.scale : -INFINITY;
        top[e / 2] = fmaxf(top[e / 2], scores[n][e]);
      }
    float shrink[2], base_of[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = warp_max<4>(top[h]);
      base_of[h] = top[h] == -INFINITY ? 0.0f : top[h];
      shrink[h] = expf(greatest[h] - base_of[h]);
      greatest[h] = top[h];
      total[h] *= shrink[h];
    }
    FragmentA<T> weights;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float low = expf(scores[n][2 * h] - base_of[h]), high = expf(scores[n][2 * h + 1] - base_of[h]);
        total[h] += low + high;
        weights.set(2 * n + h, low, high);
      }
#pragma unroll
    for (int c = 0; c < kP; c += 16) {
      FragmentB<T> b[2];
      load_b<true>(b, shared.keys[warp][stage][1], kStride, c, 0);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float(&d)[4] = sums[c / 8 + j];
#pragma unroll
        for (int e = 0; e < 4; ++e) d[e] *= shrink[e / 2];
        multiply(d, weights, b[j]);
      }
    }
    __syncwarp();  // the stage has been read
    stage = kStages == 2 ? 1 - stage : 0;
  }
  cp_async_wait<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) total[h] = warp_sum<4>(total[h]);
  __syncthreads();  // sums lie where keys were
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (thread % 4 == 0) shared.max[warp][row_of(2 * h)] = greatest[h], shared.sum[warp][row_of(2 * h)] = total[h];
#pragma unroll
  for (int j = 0; j < kP / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) shared.sums[warp][row_of(e) * kP + 8 * j + column_of(e)] = sums[j][e];
  __syncthreads();

  float* const to = partial + (item * splits + split) * kQueryRows * (in.P + 2);
  for (int i = thread; i < kQueryRows * (P + 1); i += kThreads) {
    const int r = i / (P + 1), c = i % (P + 1);
    float all = -INFINITY, sum = 0;
    for (int w = 0; w < kWarps; ++w) all = fmaxf(all, shared.max[w][r]);
    const float from = all == -INFINITY ? 0.0f : all;
    for (int w = 0; w < kWarps; ++w) sum += expf(shared.max[w][r] - from) * (c < P ? shared.sums[w][r * kP + c] : shared.sum[w][r]);
    to[r * (P + 2) + c] = sum;
    if (c == P) to[r * (P + 2) + P + 1] = all;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) join_kernel(CacheAttention in, const float* partial, T* out, int64_t tiles, int64_t splits) {
  const int64_t item = blockIdx.x, R = in.H / in.K;
  const Place at = place(in, item, tiles);
  const int P = static_cast<int>(in.P);
  const int64_t begin = at.low / kCacheChunk, end = ceil_div(at.high, kCacheChunk), size = kQueryRows * (in.P + 2);
  for (int64_t i = threadIdx.x; i < at.queries * P; i += kThreads) {
    const int64_t r = i / P, query = at.first_query + r;
    const float* const from = partial + item * splits * size + r * (P + 2);
    float greatest = -INFINITY, sum = 0, total = 0;
    for (int64_t s = begin; s < end; ++s) greatest = fmaxf(greatest, from[s * size + P + 1]);
    for (int64_t s = begin; s < end; ++s) {
      const float weight = expf(from[s * size + P + 1] - greatest);
      sum += weight * from[s * size + i % P], total += weight * from[s * size + P];
    }
    out[((at.first_token + query / R) * in.H + at.head * R + query % R) * in.P + i % P] = from_float<T>(sum / total);
  }
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) write_kernel(const T* k, const T* v, int64_t width, int64_t L, const int32_t* table, const int64_t* span_n, const int64_t* position_n, T* k_cache,
                                                         T* v_cache) {
  constexpr int V = kWide ? 16 / static_cast<int>(sizeof(T)) : 1;
  const int64_t n = blockIdx.x, to = (table[5 * span_n[n] + 4] * L + position_n[n]) * width;
  for (int64_t c = int64_t{V} * threadIdx.x; c < width; c += V * kThreads) {
    Pack<kWide, T, V> a, b;
    a.load(k + n * width + c), b.load(v + n * width + c);
    a.store(k_cache + to + c), b.store(v_cache + to + c);
  }
}

bool aligned(std::initializer_list<const void*> pointers, int64_t bytes) {
  return bytes % 16 == 0 && std::all_of(pointers.begin(), pointers.end(), [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

template <class T, int kP>
Status attend_as(const CacheAttention& in, float* partial, Stream stream) {
  const int64_t tiles = cache_tiles(in) / (in.spans.num_spans * in.K), splits = cache_splits(in);
  const dim3 blocks(static_cast<unsigned>(cache_tiles(in) * splits));
  const bool wide = aligned({in.k, in.v}, in.P * static_cast<int64_t>(sizeof(T)));
  return launch((attend_kernel<T, kP>), blocks, dim3(kThreads), sizeof(Shared<T, kP>), stream, in, partial, tiles, splits, wide);
}

template <class T>
Status run(const CacheAttention& in, float* partial, void* out, Stream stream) {
  const Status bad = in.P <= 64 ? attend_as<T, 64>(in, partial, stream) : in.P <= 128 ? attend_as<T, 128>(in, partial, stream) : attend_as<T, kMostHeadDim>(in, partial, stream);
  if (bad) return bad;
  const int64_t tiles = cache_tiles(in) / (in.spans.num_spans * in.K);
  return launch((join_kernel<T>), dim3(static_cast<unsigned>(cache_tiles(in))), dim3(kThreads), 0, stream, in, partial, static_cast<T*>(out), tiles, cache_splits(in));
}

}  // namespace

int64_t cache_tiles(const CacheAttention& in) { return in.spans.num_spans * in.K * ceil_div(in.spans.longest * (in.H / in.K), kQueryRows); }
int64_t cache_splits(const CacheAttention& in) { return ceil_div(in.spans.most_keys, kCacheChunk); }

Status attend_cache(const CacheAttention& in, float* partial, void* out, Stream stream) {
  return in.type == Type::kBf16 ? run<bf16>(in, partial, out, stream) : run<float>(in, partial, out, stream);
}

Status write_cache(const void* k, const void* v, Type type, int64_t N, int64_t width, int64_t L, const int32_t* table, const int64_t* span_n, const int64_t* position_n, void* k_cache, void* v_cache,
                   Stream stream) {
  const auto write = [&](auto t) {
    using T = decltype(t);
    const dim3 blocks(static_cast<unsigned>(N));
    const auto go = [&](auto kernel) {
      return launch(kernel, blocks, dim3(kThreads), 0, stream, static_cast<const T*>(k), static_cast<const T*>(v), width, L, table, span_n, position_n, static_cast<T*>(k_cache),
                    static_cast<T*>(v_cache));
    };
    return aligned({k, v, k_cache, v_cache}, width * static_cast<int64_t>(sizeof(T))) ? go(write_kernel<T, true>) : go(write_kernel<T, false>);
  };
  return type == Type::kBf16 ? write(bf16{}) : write(float{});
}

}  // namespace tessera::gpu
