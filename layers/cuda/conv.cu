// A thread keeps a few channels over a run of tokens: weights, the last W-1 inputs and, backward, the last W-1 gradients stay in
// registers, so that a row is read once but for the W-1 rows before a piece (forward: 3 of 32 to 64, mostly from L2).
// Bytes a token and channel in bf16: forward 2 read + 2 written, backward 4 read + 2 written, and a row of fp32 partial sums a group (about N/64 rows).
#include "layers/cuda/conv.hpp"

#include "layers/cuda/launch.hpp"

namespace tessera::gpu {
namespace {

constexpr int kThreads = 128, kBlocks = 4, kBlocksBackward = 4;  // at least these blocks a multiprocessor: 128 registers a thread
constexpr int kAhead = 4;                                        // rows whose loads are in flight before the first is used
constexpr int kMostUnrolled = 4;                               // widths up to this one have kernels of their own

// The channels of a thread: 16 bytes of a row (backward 4 channels, for the registers), or one.
template <class T, bool kWide>
constexpr int kChannels = kWide ? 16 / static_cast<int>(sizeof(T)) : 1;
template <bool kWide>
constexpr int kChannelsBackward = kWide ? 4 : 1;

// Which piece (or group of pieces) and which channels: neighbours in the grid share rows.
struct Place {
  int64_t item, c;
};
template <int V>
__device__ inline Place place(int64_t C) {
  const int64_t blocks = ceil_div(C, int64_t{V} * kThreads), b = blockIdx.x;
  return {b / blocks, (b % blocks * kThreads + threadIdx.x) * V};
}

// weight[k][v] of tap k, channel c + v; bias[v].
template <class TW, int W, int V, bool kWide>
__device__ inline void load_taps(const ConvInputs& in, int64_t c, float (&weight)[W][V], float (&bias)[V]) {
  float all[W * V];
  load<kWide>(static_cast<const TW*>(in.weight) + c * W, all);
#pragma unroll
  for (int k = 0; k < W; ++k)
#pragma unroll
    for (int v = 0; v < V; ++v) weight[k][v] = all[v * W + k];
#pragma unroll
  for (int v = 0; v < V; ++v) bias[v] = 0;
  if (in.bias) load<kWide>(static_cast<const TW*>(in.bias) + c, bias);
}

// The D rows before `begin`: of the span, else of its state, else zeros. A piece that is not its span's first has at least D rows before it.
template <class T, int D, int V, bool kWide>
__device__ inline void load_window(const ConvPiece& piece, const T* x, int64_t stride, const T* state, int64_t C, int64_t c, float (&window)[D + 1][V]) {
#pragma unroll
  for (int k = 0; k <= D; ++k)
#pragma unroll
    for (int v = 0; v < V; ++v) window[k][v] = 0;
  if (piece.begin > piece.first) {
#pragma unroll
    for (int k = 0; k < D; ++k) load<kWide>(x + (piece.begin - D + k) * stride, window[k]);
  } else if constexpr (D > 0) {
    if (state && piece.resumes) {
      float kept[V * D];
      load<kWide>(state + (piece.slot * C + c) * D, kept);
#pragma unroll
      for (int k = 0; k < D; ++k)
#pragma unroll
        for (int v = 0; v < V; ++v) window[k][v] = kept[v * D + k];
    }
  }
}

template <int W, int V>
__device__ inline void shift(float (&window)[W][V]) {
#pragma unroll
  for (int k = 0; k + 1 < W; ++k)
#pragma unroll
    for (int v = 0; v < V; ++v) window[k][v] = window[k + 1][v];
}

template <int W, int V>
__device__ inline void convolve(const float (&weight)[W][V], const float (&bias)[V], const float (&window)[W][V], float (&out)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    out[v] = bias[v];
#pragma unroll
    for (int k = W - 1; k >= 0; --k) out[v] = fmaf(weight[k][v], window[k][v], out[v]);
  }
}

template <class T>
__device__ inline float silu_gradient(float pre) {
  const float s = sigmoid_for<T>(pre);
  return s * (1.0f + pre * (1.0f - s));
}

template <class T, class TW, int W, bool kWide>
__global__ void __launch_bounds__(kThreads, kBlocks) forward_kernel(ConvInputs in, T* out, T* state, bool write_state) {
  constexpr int V = kChannels<T, kWide>, D = W - 1;
  const auto [item, c] = place<V>(in.C);
  if (c >= in.C) return;
  const ConvPiece piece = in.pieces[item];
  const T* x = static_cast<const T*>(in.x) + c;
  float weight[W][V], bias[V], window[W][V];
  load_taps<TW, W, V, kWide>(in, c, weight, bias);
  load_window<T, D, V, kWide>(piece, x, in.x_stride, state, in.C, c, window);
  const int rows = static_cast<int>(piece.end - piece.begin);
  x += piece.begin * in.x_stride;
  out += piece.begin * in.C + c;
  const auto step = [&](const Pack<kWide, T, V>& inputs) {
    inputs.get(window[D]);
    float y[V];
    convolve(weight, bias, window, y);
    if (in.silu)
#pragma unroll
      for (int v = 0; v < V; ++v) y[v] *= sigmoid_for<T>(y[v]);
    store<kWide>(out, y);
    out += in.C;
    shift(window);
  };
  int row = 0;
  for (; row + kAhead <= rows; row += kAhead) {
    Pack<kWide, T, V> ahead[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) ahead[u].load(x + u * in.x_stride);
    x += kAhead * in.x_stride;
#pragma unroll
    for (int u = 0; u < kAhead; ++u) step(ahead[u]);
  }
  for (; row < rows; ++row) {
    Pack<kWide, T, V> one;
    one.load(x);
    x += in.x_stride;
    step(one);
  }
  if constexpr (D > 0) {
    if (!state || !write_state) return;
    float kept[V * D];
#pragma unroll
    for (int k = 0; k < D; ++k)
#pragma unroll
      for (int v = 0; v < V; ++v) kept[v * D + k] = window[k][v];
    store<kWide>(state + (piece.slot * in.C + c) * D, kept);
  }
}

template <class T, class TW, int W, bool kWide>
__global__ void __launch_bounds__(kThreads, kBlocksBackward) backward_kernel(ConvInputs in, const T* dout, int64_t dout_stride, T* dx, float* partials, int64_t groups) {
  constexpr int V = kChannelsBackward<kWide>, D = W - 1;
  const auto [group, c] = place<V>(in.C);
  if (c >= in.C) return;
  const T* x = static_cast<const T*>(in.x) + c;
  dout += c, dx += c;
  float weight[W][V], bias[V], dw[W * V], db[V];
  load_taps<TW, W, V, kWide>(in, c, weight, bias);
#pragma unroll
  for (int i = 0; i < W * V; ++i) dw[i] = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) db[v] = 0;
  for (int64_t p = in.num_pieces * group / groups; p < in.num_pieces * (group + 1) / groups; ++p) {
    const ConvPiece piece = in.pieces[p];
    float window[W][V], g[W][V];  // inputs, and gradients before the activation, of the last W rows
    load_window<T, D, V, kWide>(piece, x, in.x_stride, static_cast<const T*>(nullptr), in.C, c, window);
#pragma unroll
    for (int k = 0; k < W; ++k)
#pragma unroll
      for (int v = 0; v < V; ++v) g[k][v] = 0;
    // Rows of the piece, then the D rows after it, whose gradients reach into it; those after the span count as zeros.
    const int rows = static_cast<int>(piece.end - piece.begin), inside = static_cast<int>(min(piece.end + D, piece.last) - piece.begin);
    const T *from = x + piece.begin * in.x_stride, *gradient = dout + piece.begin * dout_stride;
    T* to = dx + piece.begin * in.C;
    const auto step = [&](int row, const Pack<kWide, T, V>& inputs, const Pack<kWide, T, V>& gradients) {
#pragma unroll
      for (int v = 0; v < V; ++v) g[D][v] = 0;
      if (row < inside) {
        inputs.get(window[D]);
        gradients.get(g[D]);
        if (in.silu) {
          float pre[V];
          convolve(weight, bias, window, pre);
#pragma unroll
          for (int v = 0; v < V; ++v) g[D][v] *= silu_gradient<T>(pre[v]);
        }
      }
      if (row < rows) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          db[v] += g[D][v];
#pragma unroll
          for (int k = 0; k < W; ++k) dw[v * W + k] = fmaf(g[D][v], window[k][v], dw[v * W + k]);
        }
      }
      if (row >= D) {  // every row that reads row - D is in g
        float total[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          total[v] = 0;
#pragma unroll
          for (int k = 0; k < W; ++k) total[v] = fmaf(weight[W - 1 - k][v], g[k][v], total[v]);
        }
        store<kWide>(to, total);
        to += in.C;
      }
      shift(window);
      shift(g);
    };
    int row = 0;
    for (; row + kAhead <= inside; row += kAhead) {
      Pack<kWide, T, V> xs[kAhead], gs[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) xs[u].load(from + u * in.x_stride), gs[u].load(gradient + u * dout_stride);
      from += kAhead * in.x_stride;
      gradient += kAhead * dout_stride;
#pragma unroll
      for (int u = 0; u < kAhead; ++u) step(row + u, xs[u], gs[u]);
    }
    for (; row < rows + D; ++row) {
      Pack<kWide, T, V> xs, gs;
      if (row < inside) xs.load(from), gs.load(gradient);
      from += in.x_stride;
      gradient += dout_stride;
      step(row, xs, gs);
    }
  }
  float* sums = partials + group * in.C * (W + 1);
  store<kWide>(sums + c * W, dw);
  store<kWide>(sums + in.C * W + c, db);
}

// --- any width: one channel a thread, every tap read from memory -----------------------------------------------------------------
template <class T>
__device__ inline float input(const ConvInputs& in, const ConvPiece& piece, const T* state, int64_t row, int64_t c) {
  if (row >= piece.first) return to_float(static_cast<const T*>(in.x)[row * in.x_stride + c]);
  return state && piece.resumes ? to_float(state[(piece.slot * in.C + c) * (in.W - 1) + row - piece.first + in.W - 1]) : 0.0f;
}
template <class T, class TW>
__device__ inline float convolve_any(const ConvInputs& in, const ConvPiece& piece, const T* state, int64_t row, int64_t c) {
  float sum = in.bias ? to_float(static_cast<const TW*>(in.bias)[c]) : 0.0f;
  for (int64_t k = in.W - 1; k >= 0; --k) sum = fmaf(to_float(static_cast<const TW*>(in.weight)[c * in.W + k]), input(in, piece, state, row - (in.W - 1) + k, c), sum);
  return sum;
}

template <class T, class TW>
__global__ void __launch_bounds__(kThreads) forward_any_kernel(ConvInputs in, T* out, const T* state) {
  const auto [item, c] = place<1>(in.C);
  if (c >= in.C) return;
  const ConvPiece piece = in.pieces[item];
  for (int64_t row = piece.begin; row < piece.end; ++row) {
    const float pre = convolve_any<T, TW>(in, piece, state, row, c);
    out[row * in.C + c] = from_float<T>(in.silu ? pre * sigmoid_for<T>(pre) : pre);
  }
}

// g [N, C]: gradients before the activation.
template <class T, class TW>
__global__ void __launch_bounds__(kThreads) gradient_any_kernel(ConvInputs in, const T* dout, int64_t dout_stride, float* g) {
  const auto [item, c] = place<1>(in.C);
  if (c >= in.C) return;
  const ConvPiece piece = in.pieces[item];
  for (int64_t row = piece.begin; row < piece.end; ++row) {
    const float slope = in.silu ? silu_gradient<T>(convolve_any<T, TW>(in, piece, static_cast<const T*>(nullptr), row, c)) : 1.0f;
    g[row * in.C + c] = to_float(dout[row * dout_stride + c]) * slope;
  }
}
template <class T, class TW>
__global__ void __launch_bounds__(kThreads) backward_any_kernel(ConvInputs in, const float* g, T* dx, float* partials, int64_t groups) {
  const auto [group, c] = place<1>(in.C);
  if (c >= in.C) return;
  const int64_t begin = in.num_pieces * group / groups, end = in.num_pieces * (group + 1) / groups;
  float* sums = partials + group * in.C * (in.W + 1);
  float db = 0;
  for (int64_t p = begin; p < end; ++p) {
    const ConvPiece piece = in.pieces[p];
    for (int64_t row = piece.begin; row < piece.end; ++row) {
      db += g[row * in.C + c];
      float total = 0;
      for (int64_t k = in.W - 1; k >= 0 && row + in.W - 1 - k < piece.last; --k)
        total = fmaf(to_float(static_cast<const TW*>(in.weight)[c * in.W + k]), g[(row + in.W - 1 - k) * in.C + c], total);
      dx[row * in.C + c] = from_float<T>(total);
    }
  }
  for (int64_t k = 0; k < in.W; ++k) {
    float dw = 0;
    for (int64_t p = begin; p < end; ++p) {
      const ConvPiece piece = in.pieces[p];
      for (int64_t row = piece.begin; row < piece.end; ++row)
        dw = fmaf(g[row * in.C + c], input(in, piece, static_cast<const T*>(nullptr), row - (in.W - 1) + k, c), dw);
    }
    sums[c * in.W + k] = dw;
  }
  sums[in.C * in.W + c] = db;
}

// A thread moves one channel's window forward, in place: what it reads lies behind what it has written.
template <class T>
__global__ void __launch_bounds__(kThreads) state_kernel(ConvInputs in, T* state) {
  const auto [item, c] = place<1>(in.C);
  if (c >= in.C) return;
  const ConvPiece piece = in.pieces[item];
  T* kept = state + (piece.slot * in.C + c) * (in.W - 1);
  for (int64_t k = 0; k < in.W - 1; ++k) kept[k] = from_float<T>(input(in, piece, state, piece.last - (in.W - 1) + k, c));
}

// --- launches --------------------------------------------------------------------------------------------------------------------
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

bool wide(const ConvInputs& in, int64_t stride) {
  const int64_t V = in.type == Type::kFloat ? 4 : 8;
  return in.C % V == 0 && in.x_stride % V == 0 && stride % V == 0 && aligned(in.x) && aligned(in.weight) && aligned(in.bias);
}

dim3 grid(const ConvInputs& in, int64_t items, int V) { return dim3(static_cast<unsigned>(items * ceil_div(in.C, int64_t{V} * kThreads))); }

// task(x's type, weight's type)
template <class Task>
Status by_types(const ConvInputs& in, Task task) {
  if (in.type == Type::kFloat) return task(float{}, float{});
  return in.weight_type == Type::kFloat ? task(bf16{}, float{}) : task(bf16{}, bf16{});
}

template <int W>
struct Width {};
template <class Task>
Status by_width(int64_t W, Task task) {
  if (W == 1) return task(Width<1>{});
  if (W == 2) return task(Width<2>{});
  if (W == 3) return task(Width<3>{});
  return task(Width<4>{});
}

template <class T, class TW, int W, bool kWide>
Status forward_as(const ConvInputs& in, void* out, void* state, bool write_state, Stream stream) {
  return launch((forward_kernel<T, TW, W, kWide>), grid(in, in.num_pieces, kChannels<T, kWide>), dim3(kThreads), 0, stream, in, static_cast<T*>(out),
                static_cast<T*>(state), write_state);
}
template <class T, class TW, int W, bool kWide>
Status backward_as(const ConvInputs& in, const void* dout, int64_t dout_stride, void* dx, float* partials, Stream stream) {
  const int64_t groups = conv_groups(in.num_pieces, in.C);
  return launch((backward_kernel<T, TW, W, kWide>), grid(in, groups, kChannelsBackward<kWide>), dim3(kThreads), 0, stream, in, static_cast<const T*>(dout), dout_stride,
                static_cast<T*>(dx), partials, groups);
}

constexpr int64_t kGroupThreads = 64 * 1024;  // of the backward pass: 512 blocks of 128 fill 132 multiprocessors at kBlocksBackward each

}  // namespace

int64_t conv_piece_rows(int64_t N, int64_t C) { return std::clamp<int64_t>(ceil_div(N * ceil_div(C, 8), int64_t{200} * 1024 * 16) * 16, 16, 64); }
int64_t conv_backward_piece_rows(int64_t N, int64_t C) {
  const int64_t groups = std::max<int64_t>(1, kGroupThreads / ceil_div(C, 4));
  return std::max<int64_t>(16, ceil_div(N, groups));
}
int64_t conv_groups(int64_t num_pieces, int64_t C) {
  return std::clamp<int64_t>(kGroupThreads / ceil_div(C, 4), 1, std::max<int64_t>(1, num_pieces));
}
int64_t conv_scratch(int64_t N, int64_t C, int64_t W) { return W > kMostUnrolled ? N * C : 0; }

Status conv_forward(const ConvInputs& in, void* out, void* state, bool whole_spans, Stream stream) {
  return by_types(in, [&](auto x, auto w) -> Status {
    using T = decltype(x);
    using TW = decltype(w);
    if (in.W > kMostUnrolled) {
      const Status bad = launch((forward_any_kernel<T, TW>), grid(in, in.num_pieces, 1), dim3(kThreads), 0, stream, in, static_cast<T*>(out), static_cast<const T*>(state));
      return bad || !state || !whole_spans ? bad : conv_state(in, state, stream);
    }
    const bool vectors = wide(in, 0) && aligned(out) && aligned(state);
    return by_width(in.W, [&]<int W>(Width<W>) {
      return vectors ? forward_as<T, TW, W, true>(in, out, state, whole_spans, stream) : forward_as<T, TW, W, false>(in, out, state, whole_spans, stream);
    });
  });
}

Status conv_state(const ConvInputs& in, void* state, Stream stream) {
  if (in.W == 1) return nullptr;
  if (in.type == Type::kFloat) return launch(state_kernel<float>, grid(in, in.num_pieces, 1), dim3(kThreads), 0, stream, in, static_cast<float*>(state));
  return launch(state_kernel<bf16>, grid(in, in.num_pieces, 1), dim3(kThreads), 0, stream, in, static_cast<bf16*>(state));
}

Status conv_backward(const ConvInputs& in, const void* dout, int64_t dout_stride, void* dx, float* partials, float* scratch, Stream stream) {
  return by_types(in, [&](auto x, auto w) -> Status {
    using T = decltype(x);
    using TW = decltype(w);
    if (in.W > kMostUnrolled) {
      const Status bad = launch((gradient_any_kernel<T, TW>), grid(in, in.num_pieces, 1), dim3(kThreads), 0, stream, in, static_cast<const T*>(dout), dout_stride, scratch);
      const int64_t groups = conv_groups(in.num_pieces, in.C);
      return bad ? bad : launch((backward_any_kernel<T, TW>), grid(in, groups, 1), dim3(kThreads), 0, stream, in, scratch, static_cast<T*>(dx), partials, groups);
    }
    const bool vectors = wide(in, dout_stride) && aligned(dout) && aligned(dx) && aligned(partials);
    return by_width(in.W, [&]<int W>(Width<W>) {
      return vectors ? backward_as<T, TW, W, true>(in, dout, dout_stride, dx, partials, stream)
                     : backward_as<T, TW, W, false>(in, dout, dout_stride, dx, partials, stream);
    });
  });
}

}  // namespace tessera::gpu
