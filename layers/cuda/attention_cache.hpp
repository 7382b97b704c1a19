// Kernels of attention to a cache of keys and values, on plain pointers.
// Letters: N new tokens, H query heads, K key-value heads, R = H / K, P channels of a head, S slots, L positions of a slot.
#pragma once
#include "layers/cuda/types.hpp"

namespace tessera::gpu {

constexpr int kQueryRows = 16;    // queries of a block: tokens x heads that read the same keys
constexpr int kCacheChunk = 256;  // keys of a block
constexpr int kMostHeadDim = 256;

struct CacheSpans {
  const int32_t* table;  // [spans, 5], as Spans::table
  const int64_t* rows;   // [spans + 1], a span's first token
  int64_t num_spans, longest, most_keys;  // tokens of the longest span; keys up to the last position of any
};

struct CacheAttention {
  const void *q, *k, *v;  // q [N, H, P], k and v [S, L, K, P], contiguous, in `type`
  Type type;
  int64_t H, K, P, L;
  CacheSpans spans;
  float scale;
  int64_t window;  // keys that a query sees up to its own; 0: all
};

// Query row i of a span is token i / R, head i % R of those that read one kv head; a tile has kQueryRows of them.
int64_t cache_tiles(const CacheAttention& in);
int64_t cache_splits(const CacheAttention& in);
// partial: fp32 of cache_partial(in) elements.
inline int64_t cache_partial(const CacheAttention& in) { return cache_tiles(in) * cache_splits(in) * kQueryRows * (in.P + 2); }
// out [N, H, P] in `type`. P is at most kMostHeadDim.
Status attend_cache(const CacheAttention& in, float* partial, void* out, Stream stream);

// Rows of k and v, [N, width] contiguous in `type`, to their slots and positions. span_n, position_n: int64 [N].
Status write_cache(const void* k, const void* v, Type type, int64_t N, int64_t width, int64_t L, const int32_t* table, const int64_t* span_n, const int64_t* position_n, void* k_cache, void* v_cache,
                   Stream stream);

}  // namespace tessera::gpu
