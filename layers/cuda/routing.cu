// A warp takes a token. Its scores lie in shared memory; each of k rounds finds the greatest that is left, the lower index first, and marks it taken; the marks,
// in order, are the choice. Bytes a token: 4 E read and 8 k written, at E = 128 and k = 6 0.13 ns at 4.3 TB/s; the rounds take longer, about k (E/32 + 30)
// instructions a warp. Weights read 8 k and k sectors of the logits; backward writes 4 E.
#include "layers/cuda/routing.hpp"

#include "layers/cuda/launch.hpp"

namespace tessera::gpu {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr float kTiny = 1e-20f;

__device__ inline bool is_nan(float v) { return v != v; }
__device__ inline float lowest() { return -INFINITY; }
__device__ inline float taken() { return NAN; }  // no score is

// The index of the greatest of values that are not taken, the lower one among equals.
__device__ inline int greatest(const float* values, int size) {
  float top = lowest();
  int at = size;
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < size; i += kWarp) {
    const float v = values[i];
    if (!is_nan(v) && (at == size || v > top)) top = v, at = i;
  }
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(top, mask);
    const int other_at = shuffle_xor(at, mask);
    if (other > top || (other == top && other_at < at)) top = other, at = other_at;
  }
  return at;
}

// Marks the `count` greatest as taken.
__device__ inline void take(float* values, int size, int count) {
  for (int round = 0; round < count; ++round) {
    const int at = greatest(values, size);
    if (static_cast<int>(threadIdx.x) % kWarp == at % kWarp) values[at] = taken();
    __syncwarp();
  }
}

__global__ void __launch_bounds__(kThreads) choose_kernel(Choices c, const float* scores, bool of_logits, const float* bias, int64_t* chosen) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (n >= c.N) return;
  const int E = static_cast<int>(c.E), groups = static_cast<int>(c.num_groups), size = E / groups;
  float *const values = reinterpret_cast<float*>(shared_memory()) + warp * (E + groups), *const of_group = values + E;
#pragma unroll 4
  for (int e = lane; e < E; e += kWarp) {
    float v = scores[n * c.E + e];
    if (of_logits) v = sigmoid_for<float>(v);
    if (bias) v += bias[e];
    values[e] = is_nan(v) ? lowest() : v;
  }
  __syncwarp();
  if (groups > 1) {
    for (int g = lane; g < groups; g += kWarp) {
      float best = lowest(), second = lowest();
      for (int e = g * size; e < (g + 1) * size; ++e) {
        second = fmaxf(second, fminf(best, values[e]));
        best = fmaxf(best, values[e]);
      }
      of_group[g] = is_nan(best + second) ? lowest() : best + second;
    }
    __syncwarp();
    take(of_group, groups, static_cast<int>(c.topk_group));
    for (int e = lane; e < E; e += kWarp)
      if (!is_nan(of_group[e / size])) values[e] = lowest();
    __syncwarp();
  }
  take(values, E, static_cast<int>(c.k));
  int64_t* to = chosen + n * c.k;
  for (int first = 0; first < E; first += kWarp) {
    const int e = first + lane;
    const bool mine = e < E && is_nan(values[min(e, E - 1)]);
    const uint32_t marks = ballot(mine);
    if (mine) to[__popc(marks & ((1u << lane) - 1u))] = e;
    to += __popc(marks);
  }
}

// --- counts: each block has a stretch of the choices ------------------------------------------------------------------------------
constexpr int kCountThreads = 256;

__global__ void __launch_bounds__(kCountThreads) count_kernel(Choices c, const int64_t* chosen, const bool* valid, float* partials) {
  int* const counts = reinterpret_cast<int*>(shared_memory());
  for (int64_t e = threadIdx.x; e < c.E; e += kCountThreads) counts[e] = 0;
  __syncthreads();
  const int64_t total = c.N * c.k, end = total * (blockIdx.x + 1) / gridDim.x;
#pragma unroll 4
  for (int64_t i = total * blockIdx.x / gridDim.x + threadIdx.x; i < end; i += kCountThreads)
    if (!valid || valid[i / c.k]) atomicAdd(&counts[chosen[i]], 1);
  __syncthreads();
  for (int64_t e = threadIdx.x; e < c.E; e += kCountThreads) partials[blockIdx.x * c.E + e] = static_cast<float>(counts[e]);
}

// --- weights ---------------------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads) weights_kernel(Choices c, const float* logits, const int64_t* chosen, bool normed, float scaling, float* weights) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (n >= c.N) return;
  const auto score = [&](int64_t j) { return sigmoid_for<float>(logits[n * c.E + chosen[n * c.k + j]]); };
  float sum = 0;
  for (int64_t j = lane; j < c.k; j += kWarp) sum += score(j);
  sum = warp_sum(sum) + kTiny;
  for (int64_t j = lane; j < c.k; j += kWarp) weights[n * c.k + j] = (normed ? score(j) / sum : score(j)) * scaling;
}

__global__ void __launch_bounds__(kThreads) weights_backward_kernel(Choices c, const float* logits, const int64_t* chosen, bool normed, float scaling,
                                                                    const float* dweights, float* dlogits) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (n >= c.N) return;
  const auto score = [&](int64_t j) { return sigmoid_for<float>(logits[n * c.E + chosen[n * c.k + j]]); };
  float sum = 0, moment = 0;
  for (int64_t j = lane; j < c.k; j += kWarp) {
    const float s = score(j);
    sum += s;
    moment = fmaf(s, dweights[n * c.k + j], moment);
  }
  sum = warp_sum(sum) + kTiny;
  const float mean = warp_sum(moment) / sum;
  for (int64_t e = lane; e < c.E; e += kWarp) dlogits[n * c.E + e] = 0;
  __syncwarp();
  for (int64_t j = lane; j < c.k; j += kWarp) {
    const float s = score(j), g = dweights[n * c.k + j], ds = scaling * (normed ? (g - mean) / sum : g);
    dlogits[n * c.E + chosen[n * c.k + j]] = ds * s * (1.0f - s);
  }
}

dim3 tokens(const Choices& c, int warps) { return dim3(static_cast<unsigned>(ceil_div(c.N, warps))); }

}  // namespace

Status choose_experts(const Choices& c, const float* scores, bool of_logits, const float* bias, int64_t* chosen, Stream stream) {
  const int64_t bytes = (c.E + c.num_groups) * static_cast<int64_t>(sizeof(float));
  const int warps = static_cast<int>(std::clamp<int64_t>(48 * 1024 / bytes, 1, kWarps));
  return launch(choose_kernel, tokens(c, warps), dim3(static_cast<unsigned>(warps * kWarp)), static_cast<size_t>(warps * bytes), stream, c, scores, of_logits, bias, chosen);
}

int64_t count_parts(const Choices& c) { return std::clamp<int64_t>(c.N * c.k / 2048, 1, 128); }
Status count_experts(const Choices& c, const int64_t* chosen, const bool* valid, float* partials, Stream stream) {
  return launch(count_kernel, dim3(static_cast<unsigned>(count_parts(c))), dim3(kCountThreads), static_cast<size_t>(c.E) * sizeof(int), stream, c, chosen, valid, partials);
}

Status routed_weights(const Choices& c, const float* logits, const int64_t* chosen, bool normed, float scaling, float* weights, Stream stream) {
  return launch(weights_kernel, tokens(c, kWarps), dim3(kThreads), 0, stream, c, logits, chosen, normed, scaling, weights);
}
Status routed_weights_backward(const Choices& c, const float* logits, const int64_t* chosen, bool normed, float scaling, const float* dweights, float* dlogits, Stream stream) {
  return launch(weights_backward_kernel, tokens(c, kWarps), dim3(kThreads), 0, stream, c, logits, chosen, normed, scaling, dweights, dlogits);
}

}  // namespace tessera::gpu
