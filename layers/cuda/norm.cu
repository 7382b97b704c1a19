// A team of warps keeps the channels of one group, 8 or 16 a thread, and goes through a run of rows: the row that it computes lies in registers, the next two are on
// their way to shared memory, each thread's part to a place of its own; weights and the sums of their gradient stay in registers. Groups that no block holds (over
// 8192 channels, 4096 with a gate, 2048 where accesses are not whole vectors) are read twice.
// Bytes a token and channel in bf16: rms_norm forward 2 read + 2 written, backward 4 + 2; gated forward 4 + 2, backward 6 + 4 (y in fp32: forward 6 + 2, backward
// 8 + 6). Besides: rstd, 4 a group, and backward a row of fp32 partial sums a block, of which there are 264. Nano, bf16, at 4.3 TB/s: rms_norm (2688 channels) 2.5 and
// 3.8 ns a token, gated (4096 channels) 5.7 and 9.5 ns.
#include "layers/cuda/norm.hpp"

#include <type_traits>

#include "layers/cuda/launch.hpp"

namespace tessera::gpu {

// Two blocks a multiprocessor, about: each leaves a row of partial sums.
int64_t norm_partials(const NormShape& shape) { return std::clamp<int64_t>(264 / shape.groups, 1, max<int64_t>(1, shape.N / 4)); }

namespace {

constexpr int kMostWarps = 16;        // of a block
constexpr int64_t kRowsForward = 8;   // of a team at least, so that its weights are worth loading
constexpr int64_t kBlocksForward = 2048;

constexpr size_t kSums = 2 * kMostWarps * sizeof(float);  // of shared memory
template <bool kWide>
constexpr int kVector = kWide ? 8 : 1;  // elements of one access
constexpr int kScalars = 4;             // accesses of a thread where they are single elements

template <class Z>
using Gate = std::conditional_t<std::is_void_v<Z>, float, Z>;

// How a launch is laid out: teams of `warps` warps, `teams` of them in a block, all of the same group; `parts` runs of rows, each a block's.
struct Layout {
  int warps, teams;
  int64_t parts;
  float inverse;  // 1 / channels of a group
  int threads() const { return warps * teams * kWarp; }
};

// Which team a thread belongs to, and its rows: first, first + teams, ... below end; `turns` of them for the whole block.
struct Place {
  int team, lane, size;  // lane of `size` threads
  int64_t group, part, first, end, turns;
};
__device__ inline Place place(const NormShape& shape, const Layout& layout) {
  Place p;
  p.size = layout.warps * kWarp;
  p.team = static_cast<int>(threadIdx.x) / p.size, p.lane = static_cast<int>(threadIdx.x) % p.size;
  p.group = blockIdx.x % shape.groups, p.part = blockIdx.x / shape.groups;
  const int64_t begin = shape.N * p.part / layout.parts;
  p.end = shape.N * (p.part + 1) / layout.parts;
  p.first = begin + p.team;
  p.turns = ceil_div(p.end - begin, layout.teams);
  return p;
}

// Over the team. `sums`: a float a warp, twice, by turns: a barrier a sum is enough.
__device__ inline float team_sum(float v, const Layout& layout, int team, int64_t turn, float* sums) {
  v = warp_sum(v);
  if (layout.warps == 1) return v;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  float* const mine = sums + (turn % 2) * kMostWarps;
  if (threadIdx.x % kWarp == 0) mine[warp] = v;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return warp_sum<kMostWarps>(lane % kMostWarps < layout.warps ? mine[team * layout.warps + lane % kMostWarps] : 0.0f);
}

template <class T>
__device__ inline const T* row_of(const NormRows& rows, int64_t row, int64_t c) {
  return static_cast<const T*>(rows.data) + row * rows.stride + c;
}
__device__ inline float weight_of(const NormInputs& in, int64_t c) {
  return in.weight_type == Type::kFloat ? static_cast<const float*>(in.weight)[c] : to_float(static_cast<const bf16*>(in.weight)[c]);
}

// Rows of one array as a thread sees them. In whole vectors they are fetched ahead, `stages` rows in flight, to shared memory: [stage][16 bytes][thread], from `at` on.
template <class T, bool kWide, int kCount>
struct Incoming {
  static constexpr int V = kVector<kWide>, kWords = V * static_cast<int>(sizeof(T)) / 16, kBytes = kWide ? kCount * kWords * 16 : 0;  // of a thread and stage
  const T* from;  // the group's first channel in row 0
  int64_t stride;
  unsigned char* shared;

  __device__ unsigned char* slot(int64_t stage, int word) const { return shared + ((stage * kCount * kWords + word) * blockDim.x + threadIdx.x) * 16; }
  __device__ void fetch(int64_t row, int64_t stage, const Place& p, int vectors) const {
    if constexpr (kWide) {
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (k * p.size + p.lane < vectors)
#pragma unroll
          for (int w = 0; w < kWords; ++w) cp_async16(slot(stage, k * kWords + w), from + row * stride + (k * p.size + p.lane) * V + w * (V / kWords));
    }
  }
  __device__ void get(int64_t row, int64_t stage, int k, const Place& p, float (&v)[V]) const {
    if constexpr (kWide) {
      Pack<true, T, V> pack;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint4 part = load16(slot(stage, k * kWords + w));
        pack.word[4 * w] = part.x, pack.word[4 * w + 1] = part.y, pack.word[4 * w + 2] = part.z, pack.word[4 * w + 3] = part.w;
      }
      pack.get(v);
    } else {
      v[0] = to_float(from[row * stride + k * p.size + p.lane]);
    }
  }
};
template <class T, bool kWide, int kCount>
__device__ inline Incoming<T, kWide, kCount> incoming(const NormRows& rows, int64_t c, unsigned char*& shared, int stages) {
  using In = Incoming<T, kWide, kCount>;
  const In in{static_cast<const T*>(rows.data) + c, rows.stride, shared};
  shared += static_cast<size_t>(stages) * In::kBytes * blockDim.x;
  return in;
}
// Rows in flight and the one computed.
constexpr int stages_of(int bytes) { return bytes > 96 ? 2 : 3; }

template <class T, bool kWide, int kCount, int V>
__device__ inline void store_vectors(T* to, const Place& p, int vectors, const float (&v)[kCount][V]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    if (k * p.size + p.lane < vectors) store<kWide>(to + (k * p.size + p.lane) * V, v[k]);
}
template <int kCount, int V>
__device__ inline void load_weight(const NormInputs& in, const Place& p, int vectors, int64_t c, float (&w)[kCount][V]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k)
#pragma unroll
    for (int v = 0; v < V; ++v) w[k][v] = k * p.size + p.lane < vectors ? weight_of(in, c + (k * p.size + p.lane) * V + v) : 0.0f;
}

template <class Y, class Z, bool kWide, int kCount>
constexpr int bytes_forward = kWide ? kCount * 8 * static_cast<int>(sizeof(Y) + (std::is_void_v<Z> ? 0 : sizeof(Gate<Z>))) : 0;
template <class Y, class Z, class Out, bool kWide, int kCount>
constexpr int bytes_backward = kWide ? bytes_forward<Y, Z, kWide, kCount> + kCount * 8 * static_cast<int>(sizeof(Out)) : 0;

template <class Y, class Z, class Out, bool kWide, int kCount>
__global__ void __launch_bounds__(kMostWarps * kWarp) forward_kernel(NormShape shape, Layout layout, NormInputs in, float eps, Out* out, float* rstd) {
  constexpr int V = kVector<kWide>;
  float* const sums = reinterpret_cast<float*>(shared_memory());
  const Place p = place(shape, layout);
  const int64_t c = p.group * shape.D;
  const int vectors = static_cast<int>(shape.D / V);
  float weight[kCount][V];
  load_weight(in, p, vectors, c, weight);
  constexpr int kStages = stages_of(bytes_forward<Y, Z, kWide, kCount>);
  unsigned char* shared = shared_memory() + kSums;
  const auto y = incoming<Y, kWide, kCount>(in.y, c, shared, kStages);
  const auto z = incoming<Gate<Z>, kWide && !std::is_void_v<Z>, kCount>(in.z, c, shared, kStages);
  const auto fetch = [&](int64_t turn) {
    const int64_t row = p.first + turn * layout.teams, stage = turn % kStages;
    if (row < p.end) {
      y.fetch(row, stage, p, vectors);
      if constexpr (!std::is_void_v<Z>) z.fetch(row, stage, p, vectors);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int turn = 0; turn < kStages - 1; ++turn) fetch(turn);
#pragma unroll 1
  for (int64_t turn = 0; turn < p.turns; ++turn) {
    const int64_t row = p.first + turn * layout.teams, stage = turn % kStages;
    fetch(turn + kStages - 1);
    cp_async_wait<kStages - 1>();
    float v[kCount][V], sum = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int j = 0; j < V; ++j) v[k][j] = 0;
      if (k * p.size + p.lane >= vectors || row >= p.end) continue;
      y.get(row, stage, k, p, v[k]);
      if constexpr (!std::is_void_v<Z>) {
        float gate[V];
        z.get(row, stage, k, p, gate);
#pragma unroll
        for (int j = 0; j < V; ++j) v[k][j] *= gate[j] * sigmoid_for<Z>(gate[j]);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) sum = fmaf(v[k][j], v[k][j], sum);
    }
    const float scale = rsqrtf(fmaf(team_sum(sum, layout, p.team, turn, sums), layout.inverse, eps));
    if (row >= p.end) continue;
#pragma unroll
    for (int k = 0; k < kCount; ++k)
#pragma unroll
      for (int j = 0; j < V; ++j) v[k][j] = v[k][j] * scale * weight[k][j];
    store_vectors<Out, kWide>(out + row * shape.groups * shape.D + c, p, vectors, v);
    if (p.lane == 0) rstd[row * shape.groups + p.group] = scale;
  }
}

template <class Y, class Z, class Out, bool kWide, int kCount>
__global__ void __launch_bounds__(kMostWarps * kWarp) backward_kernel(NormShape shape, Layout layout, NormInputs in, const float* rstd, NormRows dout, Y* dy, Gate<Z>* dz,
                                                                      float* partials) {
  constexpr bool kGated = !std::is_void_v<Z>;
  constexpr int V = kVector<kWide>;
  float* const sums = reinterpret_cast<float*>(shared_memory());
  const Place p = place(shape, layout);
  const int64_t c = p.group * shape.D, I = shape.groups * shape.D;
  const int vectors = static_cast<int>(shape.D / V);
  float weight[kCount][V], dw[kCount][V];
  load_weight(in, p, vectors, c, weight);
#pragma unroll
  for (int k = 0; k < kCount; ++k)
#pragma unroll
    for (int j = 0; j < V; ++j) dw[k][j] = 0;
  constexpr int kStages = stages_of(bytes_backward<Y, Z, Out, kWide, kCount>);
  unsigned char* shared = shared_memory() + kSums;
  const auto y = incoming<Y, kWide, kCount>(in.y, c, shared, kStages);
  const auto z = incoming<Gate<Z>, kWide && !std::is_void_v<Z>, kCount>(in.z, c, shared, kStages);
  const auto g = incoming<Out, kWide, kCount>(dout, c, shared, kStages);
  const auto fetch = [&](int64_t turn) {
    const int64_t row = p.first + turn * layout.teams, stage = turn % kStages;
    if (row < p.end) {
      y.fetch(row, stage, p, vectors);
      if constexpr (kGated) z.fetch(row, stage, p, vectors);
      g.fetch(row, stage, p, vectors);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int turn = 0; turn < kStages - 1; ++turn) fetch(turn);
  float next_scale = p.first < p.end ? rstd[p.first * shape.groups + p.group] : 0.0f;
#pragma unroll 1
  for (int64_t turn = 0; turn < p.turns; ++turn) {
    const int64_t row = p.first + turn * layout.teams, stage = turn % kStages;
    const float scale = next_scale;
    fetch(turn + kStages - 1);
    if (row + layout.teams < p.end) next_scale = rstd[(row + layout.teams) * shape.groups + p.group];
    cp_async_wait<kStages - 1>();
    // What goes to y is dv * gate, to the gate dv * slope.
    float normed[kCount][V], grad[kCount][V], gate[kGated ? kCount : 1][V], slope[kGated ? kCount : 1][V], sum = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int j = 0; j < V; ++j) normed[k][j] = grad[k][j] = 0;
      if constexpr (kGated)
#pragma unroll
        for (int j = 0; j < V; ++j) gate[k][j] = slope[k][j] = 0;
      if (k * p.size + p.lane >= vectors || row >= p.end) continue;
      y.get(row, stage, k, p, normed[k]);
      g.get(row, stage, k, p, grad[k]);
      if constexpr (kGated) {
        float raw[V];
        z.get(row, stage, k, p, raw);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float s = sigmoid_for<Z>(raw[j]);
          gate[k][j] = raw[j] * s;
          slope[k][j] = normed[k][j] * s * (1.0f + raw[j] * (1.0f - s));
          normed[k][j] *= gate[k][j];
        }
      }
#pragma unroll
      for (int j = 0; j < V; ++j) {
        normed[k][j] *= scale;
        dw[k][j] = fmaf(grad[k][j], normed[k][j], dw[k][j]);
        grad[k][j] *= weight[k][j];
        sum = fmaf(normed[k][j], grad[k][j], sum);
      }
    }
    const float mean = team_sum(sum, layout, p.team, turn, sums) * layout.inverse;
    if (row >= p.end) continue;
#pragma unroll
    for (int k = 0; k < kCount; ++k)
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float dv = scale * (grad[k][j] - normed[k][j] * mean);
        grad[k][j] = dv;
        if constexpr (kGated) grad[k][j] = dv * gate[k][j], slope[k][j] *= dv;
      }
    store_vectors<Y, kWide>(dy + row * I + c, p, vectors, grad);
    if constexpr (kGated) store_vectors<Z, kWide>(dz + row * I + c, p, vectors, slope);
  }
  // The teams' sums, in the order of the teams.
  float* const to = partials + p.part * I + c;
  if (layout.teams == 1) return store_vectors<float, kWide>(to, p, vectors, dw);
  __syncthreads();  // nobody reads rows any more
  float* const all = reinterpret_cast<float*>(shared_memory() + kSums);
  store_vectors<float, kWide>(all + p.team * shape.D, p, vectors, dw);
  __syncthreads();
  for (int64_t i = threadIdx.x; i < shape.D; i += blockDim.x) {
    float sum = 0;
    for (int t = 0; t < layout.teams; ++t) sum += all[t * shape.D + i];
    to[i] = sum;
  }
}

// --- groups that no block holds: a block a row, which is read twice ---------------------------------------------------------------
template <class Y, class Z>
__device__ inline float gated(const NormInputs& in, int64_t row, int64_t c) {
  const float v = to_float(*row_of<Y>(in.y, row, c));
  if constexpr (std::is_void_v<Z>) return v;
  else {
    const float gate = to_float(*row_of<Z>(in.z, row, c));
    return v * (gate * sigmoid_for<Z>(gate));
  }
}

template <class Y, class Z, class Out>
__global__ void __launch_bounds__(kMostWarps * kWarp, 1) forward_long_kernel(NormShape shape, Layout layout, NormInputs in, float eps, Out* out, float* rstd) {
  float* const sums = reinterpret_cast<float*>(shared_memory());
  const Place p = place(shape, layout);
  const int64_t c = p.group * shape.D, I = shape.groups * shape.D;
  for (int64_t turn = 0; turn < p.turns; ++turn) {
    const int64_t row = p.first + turn;
    float sum = 0;
#pragma unroll 4
    for (int64_t i = p.lane; i < shape.D; i += p.size) {
      const float v = gated<Y, Z>(in, row, c + i);
      sum = fmaf(v, v, sum);
    }
    const float scale = rsqrtf(fmaf(team_sum(sum, layout, 0, turn, sums), layout.inverse, eps));
#pragma unroll 4
    for (int64_t i = p.lane; i < shape.D; i += p.size) out[row * I + c + i] = from_float<Out>(gated<Y, Z>(in, row, c + i) * scale * weight_of(in, c + i));
    if (p.lane == 0) rstd[row * shape.groups + p.group] = scale;
  }
}

// A thread's own channels of `partials` hold its sums.
template <class Y, class Z, class Out>
__global__ void __launch_bounds__(kMostWarps * kWarp, 1) backward_long_kernel(NormShape shape, Layout layout, NormInputs in, const float* rstd, NormRows dout, Y* dy, Gate<Z>* dz,
                                                                           float* partials) {
  float* const sums = reinterpret_cast<float*>(shared_memory());
  const Place p = place(shape, layout);
  const int64_t c = p.group * shape.D, I = shape.groups * shape.D;
  float* const dw = partials + p.part * I + c;
  for (int64_t i = p.lane; i < shape.D; i += p.size) dw[i] = 0;
  for (int64_t turn = 0; turn < p.turns; ++turn) {
    const int64_t row = p.first + turn;
    const float scale = rstd[row * shape.groups + p.group];
    float sum = 0;
#pragma unroll 1
    for (int64_t i = p.lane; i < shape.D; i += p.size) {
      const float normed = gated<Y, Z>(in, row, c + i) * scale, grad = to_float(*row_of<Out>(dout, row, c + i));
      dw[i] += grad * normed;
      sum = fmaf(normed, grad * weight_of(in, c + i), sum);
    }
    const float mean = team_sum(sum, layout, 0, turn, sums) * layout.inverse;
#pragma unroll 1
    for (int64_t i = p.lane; i < shape.D; i += p.size) {
      const float normed = gated<Y, Z>(in, row, c + i) * scale, grad = to_float(*row_of<Out>(dout, row, c + i)) * weight_of(in, c + i);
      const float dv = scale * (grad - normed * mean);
      if constexpr (std::is_void_v<Z>) dy[row * I + c + i] = from_float<Y>(dv);
      else {
        const float raw = to_float(*row_of<Z>(in.z, row, c + i)), s = sigmoid_for<Z>(raw);
        dy[row * I + c + i] = from_float<Y>(dv * raw * s);
        dz[row * I + c + i] = from_float<Z>(dv * to_float(*row_of<Y>(in.y, row, c + i)) * s * (1.0f + raw * (1.0f - s)));
      }
    }
  }
}

// --- launches --------------------------------------------------------------------------------------------------------------------
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
bool aligned(const NormRows& rows) { return rows.stride % 8 == 0 && aligned(rows.data); }

template <class Z>
constexpr int kMostCount = std::is_void_v<Z> ? 2 : 1;  // wide accesses of a thread, for the registers
constexpr int kHeldElsewhere = 0;  // a thread's accesses of a group that no block holds

// A thread's accesses, of `vector` elements, at most `most` of them where they are wide.
int count_of(const NormShape& shape, int vector, int most) {
  if (vector == 1) return shape.D <= kScalars * kMostWarps * kWarp ? kScalars : kHeldElsewhere;
  for (int count = 1; count <= most; ++count)
    if (shape.D <= int64_t{count} * vector * kMostWarps * kWarp) return count;
  return kHeldElsewhere;
}

// Teams as small as hold a group; several of them in a block, which has `most` threads then.
Layout teams_of(const NormShape& shape, int elements, int most) {
  const float inverse = 1.0f / static_cast<float>(shape.D);
  if (elements == kHeldElsewhere) return {.warps = kMostWarps, .teams = 1, .parts = 1, .inverse = inverse};
  const int warps = static_cast<int>(ceil_div(shape.D, int64_t{elements} * kWarp));
  return {.warps = warps, .teams = max(1, most / (warps * kWarp)), .parts = 1, .inverse = inverse};
}
Layout forward_layout(const NormShape& shape, int elements) {
  Layout layout = teams_of(shape, elements, 256);
  layout.parts = max<int64_t>(1, max(min(shape.N / layout.teams, kBlocksForward / shape.groups), shape.N / (layout.teams * kRowsForward)));
  return layout;
}
Layout backward_layout(const NormShape& shape, int elements) {
  Layout layout = teams_of(shape, elements, 320);
  layout.parts = norm_partials(shape);  // whatever the accesses are
  return layout;
}

dim3 grid(const NormShape& shape, const Layout& layout) { return dim3(static_cast<unsigned>(shape.N > 0 ? layout.parts * shape.groups : 0)); }

template <class T>
struct Kind {
  using type = T;
};
// task(types of y, z and out)
template <class Task>
Status by_types(const NormInputs& in, Type out, Task task) {
  const auto by_out = [&](auto y, auto z) { return out == Type::kFloat ? task(y, z, Kind<float>{}) : task(y, z, Kind<bf16>{}); };
  if (!in.z.data) return in.y.type == Type::kFloat ? by_out(Kind<float>{}, Kind<void>{}) : by_out(Kind<bf16>{}, Kind<void>{});
  if (in.y.type == Type::kBf16) return by_out(Kind<bf16>{}, Kind<bf16>{});
  return in.z.type == Type::kFloat ? by_out(Kind<float>{}, Kind<float>{}) : by_out(Kind<float>{}, Kind<bf16>{});
}

template <class Y, class Z, class Out>
Status forward_as(const NormShape& shape, const NormInputs& in, float eps, Out* out, float* rstd, Stream stream) {
  const int vector = shape.D % 8 == 0 && aligned(in.y) && aligned(in.z) && aligned(out) ? 8 : 1, count = count_of(shape, vector, kMostCount<Z>);
  const Layout layout = forward_layout(shape, vector * count);
  const auto go = [&](auto norm_forward_kernel, int bytes = 0) {
    const size_t shared = kSums + static_cast<size_t>(stages_of(bytes) * bytes * layout.threads());
    return launch(norm_forward_kernel, grid(shape, layout), dim3(static_cast<unsigned>(layout.threads())), shared, stream, shape, layout, in, eps, out, rstd);
  };
  if (count == kHeldElsewhere) return go(forward_long_kernel<Y, Z, Out>);
  if (vector == 1) return go(forward_kernel<Y, Z, Out, false, kScalars>);
  if constexpr (kMostCount<Z> > 1)
    if (count == 2) return go(forward_kernel<Y, Z, Out, true, 2>, bytes_forward<Y, Z, true, 2>);
  return go(forward_kernel<Y, Z, Out, true, 1>, bytes_forward<Y, Z, true, 1>);
}

template <class Y, class Z, class Out>
Status backward_as(const NormShape& shape, const NormInputs& in, const float* rstd, const NormRows& dout, Y* dy, Gate<Z>* dz, float* partials, Stream stream) {
  const bool wide = shape.D % 8 == 0 && aligned(in.y) && aligned(in.z) && aligned(dout) && aligned(dy) && aligned(dz) && aligned(partials);
  const int vector = wide ? 8 : 1, count = count_of(shape, vector, kMostCount<Z>);
  const Layout layout = backward_layout(shape, vector * count);
  const size_t sums = layout.teams > 1 ? static_cast<size_t>(layout.teams * shape.D) * sizeof(float) : 0;
  const auto go = [&](auto norm_backward_kernel, int bytes = 0) {
    const size_t shared = kSums + std::max(sums, static_cast<size_t>(stages_of(bytes) * bytes * layout.threads()));
    return launch(norm_backward_kernel, grid(shape, layout), dim3(static_cast<unsigned>(layout.threads())), shared, stream, shape, layout, in, rstd, dout, dy, dz, partials);
  };
  if (count == kHeldElsewhere) return go(backward_long_kernel<Y, Z, Out>);
  if (vector == 1) return go(backward_kernel<Y, Z, Out, false, kScalars>);
  if constexpr (kMostCount<Z> > 1)
    if (count == 2) return go(backward_kernel<Y, Z, Out, true, 2>, bytes_backward<Y, Z, Out, true, 2>);
  return go(backward_kernel<Y, Z, Out, true, 1>, bytes_backward<Y, Z, Out, true, 1>);
}

}  // namespace

Status norm_forward(const NormShape& shape, const NormInputs& in, float eps, void* out, Type out_type, float* rstd, Stream stream) {
  return by_types(in, out_type, [&]<class Y, class Z, class Out>(Kind<Y>, Kind<Z>, Kind<Out>) {
    return forward_as<Y, Z, Out>(shape, in, eps, static_cast<Out*>(out), rstd, stream);
  });
}



Status norm_backward(const NormShape& shape, const NormInputs& in, const float* rstd, const NormRows& dout, void* dy, void* dz, float* partials, Stream stream) {
  return by_types(in, dout.type, [&]<class Y, class Z, class Out>(Kind<Y>, Kind<Z>, Kind<Out>) {
    return backward_as<Y, Z, Out>(shape, in, rstd, dout, static_cast<Y*>(dy), static_cast<Gate<Z>*>(dz), partials, stream);
  });
}

}  // namespace tessera::gpu
