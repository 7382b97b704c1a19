// Row by row, all channels of a row at once. A task is a piece of one span; the gradient's task recomputes the width-1 rows that follow it.
#include "layers/conv.hpp"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <vector>

#include "layers/gpu.hpp"
#include "layers/vector_math.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {

// Rows [begin, end) of the span [first, last).
struct Piece {
  int64_t begin, end, first, last;
};

// Pieces of at most `rows` / 32 rows, whatever the number of threads: the weight's gradient is a sum of one partial sum a group of pieces.
std::vector<Piece> cut(const std::vector<int64_t>& rows) {
  const int64_t most = std::max<int64_t>(16, (rows.back() + 31) / 32);
  std::vector<Piece> pieces;
  for (size_t s = 0; s + 1 < rows.size(); ++s)
    for (int64_t begin = rows[s]; begin < rows[s + 1]; begin += most)
      pieces.push_back({begin, std::min(begin + most, rows[s + 1]), rows[s], rows[s + 1]});
  return pieces;
}

constexpr int64_t kGroups = 32;

// task(group, piece) for all pieces; a group's pieces run in order on one thread.
template <class Task>
void for_each_piece(const std::vector<Piece>& pieces, Task task) {
  const int64_t n = static_cast<int64_t>(pieces.size()), groups = std::min(n, kGroups);
  at::parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g)
      for (int64_t p = n * g / groups; p < n * (g + 1) / groups; ++p) task(g, pieces[p]);
  });
}

struct Taps {
  Taps(const at::Tensor& weight_c1w, const at::Tensor& bias_c) {
    const at::Tensor w = weight_c1w.detach().to(at::kFloat).contiguous();
    C = w.size(0), W = w.size(2);
    weight.resize(C * W);
    bias.assign(C, 0.0f);
    for (int64_t c = 0; c < C; ++c)
      for (int64_t k = 0; k < W; ++k) weight[k * C + c] = w.const_data_ptr<float>()[c * W + k];
    if (bias_c.defined()) {
      const at::Tensor b = bias_c.detach().to(at::kFloat).contiguous();
      std::copy_n(b.const_data_ptr<float>(), C, bias.begin());
    }
  }
  const float* tap(int64_t k) const { return weight.data() + k * C; }
  int64_t C, W;
  std::vector<float> weight, bias;  // [W, C], [C]
};

// out = bias + sum_k tap_k * row_k; rows[k] may be null, which counts as zeros.
template <class T>
void convolve(const Taps& t, const T* const* rows, float* out) {
  const float* bias = t.bias.data();
  if (t.W == 4 && rows[0] && rows[1] && rows[2]) {
    const float *w0 = t.tap(0), *w1 = t.tap(1), *w2 = t.tap(2), *w3 = t.tap(3);
    const T *x0 = rows[0], *x1 = rows[1], *x2 = rows[2], *x3 = rows[3];
#pragma GCC ivdep
    for (int64_t c = 0; c < t.C; ++c)
      out[c] = bias[c] + w3[c] * vec::load(x3 + c) + w2[c] * vec::load(x2 + c) + w1[c] * vec::load(x1 + c) + w0[c] * vec::load(x0 + c);
    return;
  }
  std::copy_n(bias, t.C, out);
  for (int64_t k = t.W - 1; k >= 0; --k) {
    if (!rows[k]) continue;
    const float* w = t.tap(k);
    const T* x = rows[k];
    for (int64_t c = 0; c < t.C; ++c) out[c] += w[c] * vec::load(x + c);
  }
}

// The W rows of x that row i reads: null where they lie before the span, or in `halo` [W-1, C] when it is given.
template <class T>
void gather(const T* x, int64_t ld, int64_t i, int64_t first, const T* halo, const Taps& t, std::vector<const T*>& rows) {
  for (int64_t k = 0; k < t.W; ++k) {
    const int64_t row = i - (t.W - 1) + k;
    rows[k] = row >= first ? x + row * ld : halo ? halo + (row - first + t.W - 1) * t.C : nullptr;
  }
}

template <class T>
void finish(const float* pre, int64_t C, bool silu, T* out) {
  if (silu)
    for (int64_t c = 0; c < C; ++c) vec::store(out + c, pre[c] * vec::sigmoid(pre[c]));
  else
    for (int64_t c = 0; c < C; ++c) vec::store(out + c, pre[c]);
}

template <class T>
void forward_as(const at::Tensor& x_nc, const Taps& taps, const std::vector<int64_t>& rows, bool silu, at::Tensor& out_nc) {
  const T* x = x_nc.const_data_ptr<T>();
  T* out = out_nc.mutable_data_ptr<T>();
  const int64_t ld = x_nc.stride(0);
  for_each_piece(cut(rows), [&](int64_t, const Piece& piece) {
    std::vector<float> pre(taps.C);
    std::vector<const T*> inputs(taps.W);
    for (int64_t i = piece.begin; i < piece.end; ++i) {
      gather<T>(x, ld, i, piece.first, nullptr, taps, inputs);
      convolve(taps, inputs.data(), pre.data());
      finish(pre.data(), taps.C, silu, out + i * taps.C);
    }
  });
}

template <class T>
void with_state_as(const at::Tensor& x_nc, const Taps& taps, const Spans& spans, bool silu, const at::Tensor& state_scw, at::Tensor& out_nc) {
  const T* x = x_nc.const_data_ptr<T>();
  T *out = out_nc.mutable_data_ptr<T>(), *states = state_scw.mutable_data_ptr<T>();
  const int64_t ld = x_nc.stride(0), C = taps.C, depth = taps.W - 1;
  at::parallel_for(0, spans.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> pre(C);
    std::vector<const T*> inputs(taps.W);
    std::vector<T> halo(depth * C);
    for (int64_t s = begin; s < end; ++s) {
      const Span& span = spans.list()[s];
      T* state = states + span.state_slot * C * depth;
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t c = 0; c < C; ++c) halo[k * C + c] = span.start > 0 ? state[c * depth + k] : T(0.0f);
      const int64_t first = spans.rows()[s], last = spans.rows()[s + 1];
      for (int64_t i = first; i < last; ++i) {
        gather<T>(x, ld, i, first, halo.data(), taps, inputs);
        convolve(taps, inputs.data(), pre.data());
        finish(pre.data(), C, silu, out + i * C);
      }
      gather<T>(x, ld, last, first, halo.data(), taps, inputs);  // the row after the span reads what the state must hold
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t c = 0; c < C; ++c) state[c * depth + k] = inputs[k][c];
    }
  });
}

template <class T>
void backward_as(const at::Tensor& x_nc, const at::Tensor& dout_nc, const Taps& taps, const std::vector<int64_t>& rows, bool silu,
                 at::Tensor& dx_nc, std::vector<float>& dw, std::vector<float>& db) {
  const T *x = x_nc.const_data_ptr<T>(), *dout = dout_nc.const_data_ptr<T>();
  T* dx = dx_nc.mutable_data_ptr<T>();
  const int64_t ld = x_nc.stride(0), C = taps.C, W = taps.W;
  std::vector<float> dw_groups(kGroups * W * C, 0.0f), db_groups(kGroups * C, 0.0f);
  for_each_piece(cut(rows), [&](int64_t group, const Piece& piece) {
    std::vector<float> ring(W * C), total(C);  // gradients before the activation of the last W rows
    std::vector<const T*> inputs(W);
    float *dw_group = dw_groups.data() + group * W * C, *db_group = db_groups.data() + group * C;
    for (int64_t i = piece.begin; i < std::min(piece.end + W - 1, piece.last + W - 1); ++i) {
      float* pre = ring.data() + (i - piece.begin) % W * C;
      if (i < piece.last) {
        gather<T>(x, ld, i, piece.first, nullptr, taps, inputs);
        const T* g = dout + i * dout_nc.stride(0);
        if (silu) {
          convolve(taps, inputs.data(), pre);
#pragma GCC ivdep
          for (int64_t c = 0; c < C; ++c) {
            const float s = vec::sigmoid(pre[c]);
            pre[c] = vec::load(g + c) * s * (1.0f + pre[c] * (1.0f - s));
          }
        } else {
          for (int64_t c = 0; c < C; ++c) pre[c] = vec::load(g + c);
        }
        for (int64_t k = 0; i < piece.end && k < W; ++k) {
          if (!inputs[k]) continue;
          float* to = dw_group + k * C;
#pragma GCC ivdep
          for (int64_t c = 0; c < C; ++c) to[c] += pre[c] * vec::load(inputs[k] + c);
        }
        for (int64_t c = 0; i < piece.end && c < C; ++c) db_group[c] += pre[c];
      } else {
        std::fill_n(pre, C, 0.0f);
      }
      const int64_t j = i - (W - 1);  // every row that reads row j is now in the ring
      if (j < piece.begin) continue;
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t k = 0; k < W; ++k) {
        const float *w = taps.tap(k), *from = ring.data() + (j + W - 1 - k - piece.begin) % W * C;
#pragma GCC ivdep
        for (int64_t c = 0; c < C; ++c) total[c] += w[c] * from[c];
      }
      for (int64_t c = 0; c < C; ++c) vec::store(dx + j * C + c, total[c]);
    }
  });
  for (int64_t g = 0; g < kGroups; ++g) {
    for (int64_t k = 0; k < W; ++k)
      for (int64_t c = 0; c < C; ++c) dw[c * W + k] += dw_groups[(g * W + k) * C + c];
    for (int64_t c = 0; c < C; ++c) db[c] += db_groups[g * C + c];
  }
}

at::Tensor unit_stride(const at::Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

at::Tensor from_vector(const std::vector<float>& values, const at::Tensor& like) {
  at::Tensor out = at::empty(like.sizes(), like.options().dtype(at::kFloat));
  std::copy(values.begin(), values.end(), out.mutable_data_ptr<float>());
  return out.to(like.scalar_type());
}

class CausalConv : public torch::autograd::Function<CausalConv> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x_nc, const at::Tensor& weight_c1w,
                            const std::optional<at::Tensor>& bias_c, const std::vector<int64_t>& rows, bool silu) {
    ctx->save_for_backward({x_nc, weight_c1w, bias_c.value_or(at::Tensor())});
    ctx->saved_data["rows"] = rows;
    ctx->saved_data["silu"] = silu;
    if (on_gpu(x_nc)) return gpu_kernels()->conv_forward(x_nc, weight_c1w, bias_c.value_or(at::Tensor()), rows, silu);
    const at::Tensor x = unit_stride(x_nc.detach());
    at::Tensor out = at::empty(x.sizes(), x.options());
    const Taps taps(weight_c1w, bias_c.value_or(at::Tensor()));
    if (x.scalar_type() == at::kBFloat16) forward_as<c10::BFloat16>(x, taps, rows, silu, out);
    else forward_as<float>(x, taps, rows, silu, out);
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto rows = ctx->saved_data["rows"].toIntVector();
    const bool silu = ctx->saved_data["silu"].toBool();
    if (on_gpu(saved[0])) {
      const auto [dx, dw, db] = gpu_kernels()->conv_backward(saved[0], grads[0], saved[1], saved[2], rows, silu);
      return {dx, dw, db, at::Tensor(), at::Tensor()};
    }
    const at::Tensor x = unit_stride(saved[0]), dout = unit_stride(grads[0]);
    const Taps taps(saved[1], saved[2]);
    at::Tensor dx = at::empty(x.sizes(), x.options());
    std::vector<float> dw(taps.C * taps.W, 0.0f), db(taps.C, 0.0f);
    if (x.scalar_type() == at::kBFloat16) backward_as<c10::BFloat16>(x, dout, taps, rows, silu, dx, dw, db);
    else backward_as<float>(x, dout, taps, rows, silu, dx, dw, db);
    return {dx, from_vector(dw, saved[1]), saved[2].defined() ? from_vector(db, saved[2]) : at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

std::string text(const at::Tensor& t) {
  return t.defined() ? fmt::format("{} [{}]", c10::toString(t.scalar_type()), fmt::join(t.sizes(), ", ")) : "none";
}

void check(const at::Tensor& x_nc, const at::Tensor& weight_c1w, const at::Tensor& bias_c, const Spans& spans, const at::Tensor& state_scw) {
  if (x_nc.dim() != 2 || x_nc.size(0) != spans.num_tokens() || weight_c1w.dim() != 3 || weight_c1w.size(0) != x_nc.size(1) ||
      weight_c1w.size(1) != 1 || weight_c1w.size(2) < 1 || (bias_c.defined() && (bias_c.dim() != 1 || bias_c.size(0) != x_nc.size(1))))
    throw Error(ExitCode::kRuntime, fmt::format("[causal_conv1d] x must be [{}, C], weight [C, 1, width] and bias [C], got {}, {} and {}",
                                                spans.num_tokens(), text(x_nc), text(weight_c1w), text(bias_c)));
  if (!state_scw.defined()) return;
  int64_t slots = 0;
  for (const Span& span : spans.list()) slots = std::max(slots, span.state_slot + 1);
  if (state_scw.dim() != 3 || state_scw.size(0) < slots || state_scw.size(1) != x_nc.size(1) || state_scw.size(2) != weight_c1w.size(2) - 1 ||
      !state_scw.is_contiguous() || state_scw.scalar_type() != x_nc.scalar_type())
    throw Error(ExitCode::kRuntime, fmt::format("[causal_conv1d] state must be contiguous [{} or more, {}, {}] in x's dtype, got {}", slots,
                                                x_nc.size(1), weight_c1w.size(2) - 1, text(state_scw)));
}

}  // namespace

at::Tensor causal_conv1d(const at::Tensor& x_nc, const at::Tensor& weight_c1w, const at::Tensor& bias_c, const Spans& spans, bool silu,
                         const at::Tensor& state_scw) {
  check(x_nc, weight_c1w, bias_c, spans, state_scw);
  const bool gpu = on_gpu(x_nc);
  if ((!gpu && !x_nc.is_cpu()) || (x_nc.scalar_type() != at::kFloat && x_nc.scalar_type() != at::kBFloat16) || x_nc.numel() == 0)
    return causal_conv1d_ref(x_nc, weight_c1w, bias_c, spans, silu, state_scw);
  if (!state_scw.defined())
    return CausalConv::apply(x_nc, weight_c1w, bias_c.defined() ? std::optional(bias_c) : std::nullopt, spans.rows(), silu);
  const at::NoGradGuard no_grad;
  if (gpu) return gpu_kernels()->conv_with_state(x_nc, weight_c1w, bias_c, spans, silu, state_scw);
  const at::Tensor x = unit_stride(x_nc.detach());
  at::Tensor out = at::empty(x.sizes(), x.options());
  const Taps taps(weight_c1w, bias_c);
  if (x.scalar_type() == at::kBFloat16) with_state_as<c10::BFloat16>(x, taps, spans, silu, state_scw, out);
  else with_state_as<float>(x, taps, spans, silu, state_scw, out);
  return out;
}

}  // namespace tessera
