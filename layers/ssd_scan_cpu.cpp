// Chunked scan on the CPU. One task is a block of heads of one group over one span; it walks the span's chunks with the state in cache.
// i: output row of a chunk, j: input row; Lam: inclusive sum of a = A d; head_i = exp(Lam_i), tail_j = exp(Lam_last - Lam_j).
// States and their gradients K are held transposed, [S, P], so that the products read them along P.
#include "layers/ssd_scan_cpu.hpp"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "layers/tile_gemm.hpp"
#include "layers/vector_math.hpp"

namespace tessera::ssd_cpu {
namespace {

// Heads [begin, end) of one group; `part` numbers the blocks of a group.
struct Unit {
  int64_t group, begin, end, part;
};

// Enough units to feed every thread where the heads allow it.
std::vector<Unit> make_units(const SsdSizes& z) {
  const int64_t per_group = z.num_heads / z.num_groups;
  const int64_t parts = std::clamp<int64_t>((at::get_num_threads() + z.num_groups - 1) / z.num_groups, 1, per_group);
  std::vector<Unit> units;
  for (int64_t g = 0; g < z.num_groups; ++g)
    for (int64_t p = 0; p < parts; ++p)
      units.push_back({g, g * per_group + p * per_group / parts, g * per_group + (p + 1) * per_group / parts, p});
  return units;
}

// Runs task(scratch, unit, span) for all pairs, cut over the threads by tokens; make_scratch() once a thread.
template <class MakeScratch, class Task>
void for_each_task(const std::vector<Unit>& units, const std::vector<int64_t>& rows, MakeScratch make_scratch, Task task) {
  const int64_t num_tokens = rows.back(), num_spans = static_cast<int64_t>(rows.size()) - 1;
  at::parallel_for(0, static_cast<int64_t>(units.size()) * num_tokens, 64, [&](int64_t begin, int64_t end) {
    auto scratch = make_scratch();
    for (int64_t u = begin / num_tokens; u * num_tokens < end; ++u)
      for (int64_t s = 0; s < num_spans; ++s) {
        const int64_t at = u * num_tokens + rows[s];
        if (at >= begin && at < end) task(scratch, units[u], s);
      }
  });
}

template <class T>
struct Problem {
  explicit Problem(const Inputs& in)
      : z(in.sizes), xbc(in.xbc_nc.const_data_ptr<T>()), ld(in.xbc_nc.stride(0)), dt(in.dt_nh.const_data_ptr<float>()),
        bias(in.dt_bias_h.const_data_ptr<float>()), A_log(in.A_log_h.const_data_ptr<float>()), D(in.D_h.const_data_ptr<float>()) {
    H = z.num_heads, P = z.head_dim, S = z.state_size, inner = H * P, channels = inner + 2 * z.num_groups * S;
    int64_t longest = 0;
    for (size_t s = 0; s + 1 < in.rows.size(); ++s) longest = std::max(longest, in.rows[s + 1] - in.rows[s]);
    Q = std::min(z.chunk, longest), max_chunks = (longest + Q - 1) / Q;
    Q16 = pad_cols(Q), P16 = pad_cols(P), S16 = pad_cols(S);
  }
  SsdSizes z;
  const T* xbc;
  int64_t ld;
  const float *dt, *bias, *A_log, *D;
  int64_t H, P, S, inner, channels, Q, max_chunks, Q16, P16, S16;

  const T* x(int64_t row, int64_t head) const { return xbc + row * ld + head * P; }
  const T* b(int64_t row, int64_t group) const { return xbc + row * ld + inner + group * S; }
  const T* c(int64_t row, int64_t group) const { return b(row, group) + z.num_groups * S; }
};

template <class T>
void load_tile(const T* from, int64_t ld, int64_t rows, int64_t cols, float* to, int64_t ld_to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) to[r * ld_to + c] = vec::load(from + r * ld + c);
}

// to = diag(scale) from, whole padded rows.
void scale_rows(const float* scale, const float* from, int64_t rows, int64_t ld, float* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < ld; ++c) to[r * ld + c] = scale[r] * from[r * ld + c];
}

// The decay factors of one head over one chunk.
struct Decay {
  explicit Decay(int64_t n) : raw(n), soft(n), d(n), high(n), low(n), head(n), tail(n), weight(n) {}
  std::vector<float> raw, soft, d;  // dt + bias, softplus of it, clamped; zero beyond the chunk's length
  std::vector<float> high, low;     // Lam = high + low: differences of long sums keep fp32's accuracy
  std::vector<float> head, tail, weight;  // exp(Lam_i), exp(Lam_last - Lam_j), tail * d
  float A, total;                   // total = exp(Lam_last)

  template <class T>
  void compute(const Problem<T>& p, int64_t head_index, int64_t row, int64_t len) {
    A = -std::exp(p.A_log[head_index]);
    const float bias = p.bias[head_index];
    const float low_limit = static_cast<float>(p.z.dt_min), high_limit = static_cast<float>(p.z.dt_max);
    const int64_t n = pad_cols(len);
    for (int64_t j = 0; j < len; ++j) raw[j] = p.dt[(row + j) * p.H + head_index] + bias;
    for (int64_t j = 0; j < n; ++j) {
      soft[j] = vec::softplus(raw[j]);
      const float raised = soft[j] < low_limit ? low_limit : soft[j];
      d[j] = j < len ? (raised > high_limit ? high_limit : raised) : 0.0f;
    }
    double sum = 0;
    for (int64_t j = 0; j < len; ++j) {
      sum += static_cast<double>(A) * d[j];
      high[j] = static_cast<float>(sum), low[j] = static_cast<float>(sum - high[j]);
    }
    const float last_high = high[len - 1], last_low = low[len - 1];
    for (int64_t j = 0; j < n; ++j) {
      head[j] = vec::exp(high[j]) * (1.0f + low[j]);
      tail[j] = vec::exp((last_high - high[j]) + (last_low - low[j]));
      weight[j] = tail[j] * d[j];
    }
    total = head[len - 1];
  }
};

// M_ij = G_ij exp(Lam_i - Lam_j) d_j for j <= i, zeros up to the end of the row's block of columns.
void mix_matrix(const Decay& decay, const float* G, int64_t ld, int64_t len, float* M) {
  const float *high = decay.high.data(), *low = decay.low.data(), *d = decay.d.data();
  for (int64_t i = 0; i < len; ++i) {
    const int64_t n = pad_cols(i + 1);
    const float hi = high[i], lo = low[i];
    for (int64_t j = 0; j < n; ++j) {
      const float value = G[i * ld + j] * vec::exp((hi - high[j]) + (lo - low[j])) * d[j];
      M[i * ld + j] = j <= i ? value : 0.0f;
    }
  }
}

// What forward and backward keep for the group of a unit over one chunk.
struct GroupTiles {
  GroupTiles(int64_t Q16, int64_t S16) : B(Q16 * S16), C(Q16 * S16), Bt(S16 * Q16), G(Q16 * Q16) {}
  std::vector<float> B, C, Bt, G;

  template <class T>
  void load(const Problem<T>& p, int64_t group, int64_t row, int64_t len, bool want_G) {
    load_tile(p.b(row, group), p.ld, len, p.S, B.data(), p.S16);
    if (!want_G) return;
    load_tile(p.c(row, group), p.ld, len, p.S, C.data(), p.S16);
    tile_transpose(len, p.S, B.data(), p.S16, Bt.data(), p.Q16);
    tile_gemm_to_lower(len, p.S, C.data(), p.S16, 1, Bt.data(), p.Q16, G.data(), p.Q16);
  }
};

// H = exp(Lam_last) H + sum_j B_j (tail_j d_j x_j)^T; `xw` is scratch.
void advance_state(const Decay& decay, const float* B, int64_t S, int64_t S16, const float* x, int64_t len, int64_t P, int64_t P16, bool zero,
                   float* xw, float* state) {
  scale_rows(decay.weight.data(), x, len, P16, xw);
  if (zero) {
    tile_gemm<false>(S, P, len, B, 1, S16, xw, P16, state, P16);
    return;
  }
  for (int64_t k = 0; k < S * P16; ++k) state[k] *= decay.total;
  tile_gemm<true>(S, P, len, B, 1, S16, xw, P16, state, P16);
}

template <class T>
struct ForwardScratch {
  ForwardScratch(const Problem<T>& p, int64_t heads)
      : group(p.Q16, p.S16), decay(p.Q16), Cs(p.Q16 * p.S16), M(p.Q16 * p.Q16), x(p.Q16 * p.P16), xw(p.Q16 * p.P16), y(p.Q16 * p.P16),
        states(heads * p.S16 * p.P16) {}
  GroupTiles group;
  Decay decay;
  std::vector<float> Cs, M, x, xw, y, states;
};

template <class T>
at::Tensor forward_as(const Inputs& in, const Spans* spans, const at::Tensor& state_shps) {
  const Problem<T> p(in);
  const std::vector<Unit> units = make_units(p.z);
  at::Tensor y_ni = at::empty({in.rows.back(), p.inner}, in.dt_nh.options());
  float* out = y_ni.mutable_data_ptr<float>();
  const int64_t heads = p.H / p.z.num_groups, state_len = p.S16 * p.P16;
  for_each_task(units, in.rows, [&] { return ForwardScratch<T>(p, heads); }, [&](ForwardScratch<T>& t, const Unit& unit, int64_t span) {
    const int64_t begin = in.rows[span], end = in.rows[span + 1];
    const bool resumes = spans && spans->list()[span].start > 0;
    for (int64_t h = unit.begin; spans && h < unit.end; ++h) {
      const float* slot = state_shps.const_data_ptr<float>() + (spans->list()[span].state_slot * p.H + h) * p.P * p.S;
      float* state = t.states.data() + (h - unit.begin) * state_len;
      for (int64_t k = 0; resumes && k < p.P * p.S; ++k) state[k % p.S * p.P16 + k / p.S] = slot[k];
    }
    for (int64_t row = begin; row < end; row += p.Q) {
      const int64_t len = std::min(p.Q, end - row);
      const bool zero = row == begin && !resumes, last = row + len == end && !spans;
      t.group.load(p, unit.group, row, len, true);
      for (int64_t h = unit.begin; h < unit.end; ++h) {
        float* state = t.states.data() + (h - unit.begin) * state_len;
        load_tile(p.x(row, h), p.ld, len, p.P, t.x.data(), p.P16);
        t.decay.compute(p, h, row, len);
        mix_matrix(t.decay, t.group.G.data(), p.Q16, len, t.M.data());
        tile_gemm<false>(len, p.P, len, t.M.data(), p.Q16, 1, t.x.data(), p.P16, t.y.data(), p.P16, Triangle::kLower);
        if (!zero) {
          scale_rows(t.decay.head.data(), t.group.C.data(), len, p.S16, t.Cs.data());
          tile_gemm<true>(len, p.P, p.S, t.Cs.data(), p.S16, 1, state, p.P16, t.y.data(), p.P16);
        }
        const float skip = p.D[h];
        for (int64_t i = 0; i < len; ++i) {
          float* y = out + (row + i) * p.inner + h * p.P;
          for (int64_t k = 0; k < p.P; ++k) y[k] = t.y[i * p.P16 + k] + skip * t.x[i * p.P16 + k];
        }
        if (!last) advance_state(t.decay, t.group.B.data(), p.S, p.S16, t.x.data(), len, p.P, p.P16, zero, t.xw.data(), state);
      }
    }
    for (int64_t h = unit.begin; spans && h < unit.end; ++h) {
      float* slot = state_shps.mutable_data_ptr<float>() + (spans->list()[span].state_slot * p.H + h) * p.P * p.S;
      const float* state = t.states.data() + (h - unit.begin) * state_len;
      for (int64_t k = 0; k < p.P * p.S; ++k) slot[k] = state[k % p.S * p.P16 + k / p.S];
    }
  });
  return y_ni;
}

template <class T>
struct BackwardScratch {
  BackwardScratch(const Problem<T>& p, int64_t heads)
      : group(p.Q16, p.S16), decay(p.Q16), Ct(p.S16 * p.Q16), M(p.Q16 * p.Q16), dM(p.Q16 * p.Q16), dG(p.Q16 * p.Q16), dBt(p.S16 * p.Q16),
        dCt(p.S16 * p.Q16), Tt(p.S16 * p.Q16), dB(p.Q16 * p.S16), x(p.Q16 * p.P16), dy(p.Q16 * p.P16), xt(p.P16 * p.Q16),
        dyt(p.P16 * p.Q16), dx(p.Q16 * p.P16), scaled(p.Q16 * std::max(p.P16, p.S16)), states(p.max_chunks * heads * p.S16 * p.P16),
        K(heads * p.S16 * p.P16), dd(p.Q16), da(p.Q16), q(p.Q16), u(p.Q16), columns(p.Q16), below(p.Q16) {}
  GroupTiles group;
  Decay decay;
  std::vector<float> Ct, M, dM, dG, dBt, dCt, Tt, dB, x, dy, xt, dyt, dx, scaled, states, K, dd, da, q, u, columns, below;
};

// out_t[s, r] += scale_r T[s, r]; dots_r = sum_s T[s, r] F[s, r].
void add_scaled(const float* T, const float* F, const float* scale, int64_t S, int64_t n, int64_t ld, float* out_t, float* dots) {
  std::fill_n(dots, n, 0.0f);
  for (int64_t s = 0; s < S; ++s)
    for (int64_t r = 0; r < n; ++r) {
      dots[r] += T[s * ld + r] * F[s * ld + r];
      out_t[s * ld + r] += scale[r] * T[s * ld + r];
    }
}

// Rows from the last to the first: rebuilds M, adds to dG, and gathers dd_j = sum_i dM_ij G_ij E_ij and da_k = sum_{j<k<=i} dM_ij M_ij.
// `columns` sums dM_ij M_ij over the rows met so far.
template <class Scratch>
void mix_gradient(Scratch& t, int64_t ld, int64_t len) {
  const float *high = t.decay.high.data(), *low = t.decay.low.data(), *d = t.decay.d.data();
  float *columns = t.columns.data(), *below = t.below.data(), *dd = t.dd.data();
  std::fill(t.columns.begin(), t.columns.end(), 0.0f);
  std::fill(t.dd.begin(), t.dd.end(), 0.0f);
  for (int64_t i = len - 1; i >= 0; --i) {
    const int64_t n = pad_cols(i + 1);
    const float hi = high[i], lo = low[i];
    const float *G = t.group.G.data() + i * ld, *dM = t.dM.data() + i * ld;
    float *M = t.M.data() + i * ld, *dG = t.dG.data() + i * ld;
    for (int64_t j = 0; j < n; ++j) {
      const float decayed = vec::exp((hi - high[j]) + (lo - low[j]));
      const float E = j <= i ? decayed : 0.0f, g = j <= i ? dM[j] : 0.0f;
      const float GE = G[j] * E, product = g * GE;
      M[j] = GE * d[j];
      dG[j] += g * E * d[j];
      dd[j] += product;
      columns[j] += product * d[j];
      below[j] = j < i ? columns[j] : 0.0f;
    }
    t.da[i] = tile_sum(below, n);
  }
}

template <class T>
Gradients backward_as(const Inputs& in, const at::Tensor& dy_ni) {
  const Problem<T> p(in);
  const std::vector<Unit> units = make_units(p.z);
  const int64_t num_tokens = in.rows.back(), num_spans = static_cast<int64_t>(in.rows.size()) - 1, GS = p.z.num_groups * p.S;
  const int64_t heads = p.H / p.z.num_groups, state_len = p.S16 * p.P16, parts = units.back().part + 1;
  Gradients out;
  out.xbc_nc = at::empty({num_tokens, p.channels}, in.xbc_nc.options());
  out.dt_nh = at::empty({num_tokens, p.H}, in.dt_nh.options());
  // The sums over tokens, one row a span, and dB, dC of a group's further blocks of heads are added up at the end in a fixed order.
  std::vector<double> sums(static_cast<size_t>(num_spans * p.H * 3), 0.0);
  at::Tensor extra = parts > 1 ? at::empty({parts, num_tokens, 2 * GS}, in.dt_nh.options()) : at::Tensor();
  T* dxbc = out.xbc_nc.template mutable_data_ptr<T>();
  float* ddt = out.dt_nh.template mutable_data_ptr<float>();
  const float* dout = dy_ni.const_data_ptr<float>();

  for_each_task(units, in.rows, [&] { return BackwardScratch<T>(p, heads); }, [&](BackwardScratch<T>& t, const Unit& unit, int64_t span) {
    const int64_t begin = in.rows[span], end = in.rows[span + 1], num_chunks = (end - begin + p.Q - 1) / p.Q;
    auto state_of = [&](int64_t chunk, int64_t h) { return t.states.data() + (chunk * heads + h - unit.begin) * state_len; };
    for (int64_t c = 0; c + 1 < num_chunks; ++c) {
      const int64_t row = begin + c * p.Q;
      t.group.load(p, unit.group, row, p.Q, false);
      for (int64_t h = unit.begin; h < unit.end; ++h) {
        load_tile(p.x(row, h), p.ld, p.Q, p.P, t.x.data(), p.P16);
        t.decay.compute(p, h, row, p.Q);
        if (c > 0) std::copy_n(state_of(c, h), state_len, state_of(c + 1, h));
        advance_state(t.decay, t.group.B.data(), p.S, p.S16, t.x.data(), p.Q, p.P, p.P16, c == 0, t.scaled.data(), state_of(c + 1, h));
      }
    }
    for (int64_t c = num_chunks - 1; c >= 0; --c) {
      const int64_t row = begin + c * p.Q, len = std::min(p.Q, end - row), n = pad_cols(len);
      const bool enters = c > 0, leaves = c + 1 < num_chunks;
      t.group.load(p, unit.group, row, len, true);
      tile_transpose(len, p.S, t.group.C.data(), p.S16, t.Ct.data(), p.Q16);
      for (std::vector<float>* zeroed : {&t.dG, &t.dBt, &t.dCt}) std::fill(zeroed->begin(), zeroed->end(), 0.0f);
      for (int64_t h = unit.begin; h < unit.end; ++h) {
        const float* state = state_of(c, h);
        float* K = t.K.data() + (h - unit.begin) * state_len;
        load_tile(p.x(row, h), p.ld, len, p.P, t.x.data(), p.P16);
        load_tile(dout + row * p.inner + h * p.P, p.inner, len, p.P, t.dy.data(), p.P16);
        tile_transpose(len, p.P, t.x.data(), p.P16, t.xt.data(), p.Q16);
        t.decay.compute(p, h, row, len);
        tile_gemm_to_lower(len, p.P, t.dy.data(), p.P16, 1, t.xt.data(), p.Q16, t.dM.data(), p.Q16);
        mix_gradient(t, p.Q16, len);
        tile_gemm<false>(len, p.P, len, t.M.data(), 1, p.Q16, t.dy.data(), p.P16, t.dx.data(), p.P16, Triangle::kUpper);
        std::fill(t.q.begin(), t.q.end(), 0.0f);
        std::fill(t.u.begin(), t.u.end(), 0.0f);
        if (leaves) {
          tile_gemm<false>(p.S, len, p.P, K, p.P16, 1, t.xt.data(), p.Q16, t.Tt.data(), p.Q16);
          add_scaled(t.Tt.data(), t.group.Bt.data(), t.decay.weight.data(), p.S, n, p.Q16, t.dBt.data(), t.q.data());
          scale_rows(t.decay.weight.data(), t.group.B.data(), len, p.S16, t.scaled.data());
          tile_gemm<true>(len, p.P, p.S, t.scaled.data(), p.S16, 1, K, p.P16, t.dx.data(), p.P16);
        }
        if (enters) {
          tile_transpose(len, p.P, t.dy.data(), p.P16, t.dyt.data(), p.Q16);
          tile_gemm<false>(p.S, len, p.P, state, p.P16, 1, t.dyt.data(), p.Q16, t.Tt.data(), p.Q16);
          add_scaled(t.Tt.data(), t.Ct.data(), t.decay.head.data(), p.S, n, p.Q16, t.dCt.data(), t.u.data());
        }
        double* sum = sums.data() + (span * p.H + h) * 3;
        float through = leaves && enters ? t.decay.total * tile_dot(state, K, p.S * p.P16) : 0.0f;
        if (enters) {
          scale_rows(t.decay.head.data(), t.dy.data(), len, p.P16, t.scaled.data());
          for (int64_t k = 0; leaves && k < p.S * p.P16; ++k) K[k] *= t.decay.total;
          if (leaves) tile_gemm<true>(p.S, p.P, len, t.group.C.data(), 1, p.S16, t.scaled.data(), p.P16, K, p.P16);
          else tile_gemm<false>(p.S, p.P, len, t.group.C.data(), 1, p.S16, t.scaled.data(), p.P16, K, p.P16);
        }
        double after = 0, before = 0;
        for (int64_t k = len - 1; k >= 0; --k) after += t.u[k] * t.decay.head[k], t.da[k] += static_cast<float>(after) + through;
        const float low_limit = static_cast<float>(p.z.dt_min), high_limit = static_cast<float>(p.z.dt_max);
        for (int64_t k = 0; k < len; ++k) {
          const float da = t.da[k] + static_cast<float>(before), q = t.q[k] * t.decay.tail[k];
          before += q * t.decay.d[k];
          const float dd = t.dd[k] + q + t.decay.A * da;
          const bool free = t.decay.soft[k] >= low_limit && t.decay.soft[k] <= high_limit;
          const float draw = free ? dd * vec::sigmoid(t.decay.raw[k]) : 0.0f;
          ddt[(row + k) * p.H + h] = draw;
          sum[0] += draw;
          sum[1] += static_cast<double>(t.decay.d[k]) * da * t.decay.A;
        }
        for (int64_t k = 0; k < len; k += 4)  // a few rows in fp32, the rest of the sum in fp64
          sum[2] += tile_dot(t.dy.data() + k * p.P16, t.x.data() + k * p.P16, std::min<int64_t>(4, len - k) * p.P16);
        const float skip = p.D[h];
        for (int64_t j = 0; j < len; ++j) {
          T* to = dxbc + (row + j) * p.channels + h * p.P;
          for (int64_t k = 0; k < p.P; ++k) vec::store(to + k, t.dx[j * p.P16 + k] + skip * t.dy[j * p.P16 + k]);
        }
      }
      // dB = dG^T C + (transposed sums), dC = dG B + (transposed sums).
      for (const bool is_C : {false, true}) {
        tile_transpose(p.S, len, is_C ? t.dCt.data() : t.dBt.data(), p.Q16, t.dB.data(), p.S16);
        tile_gemm<true>(len, p.S, len, t.dG.data(), is_C ? p.Q16 : 1, is_C ? 1 : p.Q16, is_C ? t.group.B.data() : t.group.C.data(), p.S16,
                        t.dB.data(), p.S16, is_C ? Triangle::kLower : Triangle::kUpper);
        const int64_t column = (is_C ? GS : 0) + unit.group * p.S;
        for (int64_t j = 0; j < len; ++j) {
          const float* from = t.dB.data() + j * p.S16;
          if (parts == 1)
            for (int64_t s = 0; s < p.S; ++s) vec::store(dxbc + (row + j) * p.channels + p.inner + column + s, from[s]);
          else std::copy_n(from, p.S, extra.mutable_data_ptr<float>() + (unit.part * num_tokens + row + j) * 2 * GS + column);
        }
      }
    }
  });

  if (parts > 1)
    at::parallel_for(0, num_tokens, 32, [&](int64_t begin, int64_t end) {
      std::vector<float> total(2 * GS);
      for (int64_t row = begin; row < end; ++row) {
        std::fill(total.begin(), total.end(), 0.0f);
        for (int64_t part = 0; part < parts; ++part) {
          const float* from = extra.const_data_ptr<float>() + (part * num_tokens + row) * 2 * GS;
          for (int64_t k = 0; k < 2 * GS; ++k) total[k] += from[k];
        }
        for (int64_t k = 0; k < 2 * GS; ++k) vec::store(dxbc + row * p.channels + p.inner + k, total[k]);
      }
    });
  at::Tensor* vectors[3] = {&out.dt_bias_h, &out.A_log_h, &out.D_h};
  for (int64_t v = 0; v < 3; ++v) {
    *vectors[v] = at::empty({p.H}, in.dt_nh.options());
    for (int64_t h = 0; h < p.H; ++h) {
      double total = 0;
      for (int64_t s = 0; s < num_spans; ++s) total += sums[(s * p.H + h) * 3 + v];
      vectors[v]->mutable_data_ptr<float>()[h] = static_cast<float>(total);
    }
  }
  return out;
}

template <class T>
at::Tensor step_as(const Inputs& in, const Spans& spans, const at::Tensor& state_shps) {
  const Problem<T> p(in);
  at::Tensor y_ni = at::empty({in.rows.back(), p.inner}, in.dt_nh.options());
  float *out = y_ni.mutable_data_ptr<float>(), *states = state_shps.mutable_data_ptr<float>();
  at::parallel_for(0, spans.size() * p.H, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> b(p.S16), c(p.S16), products(p.S16);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / p.H, h = task % p.H, group = h / (p.H / p.z.num_groups);
      load_tile(p.b(row, group), 0, 1, p.S, b.data(), 0);
      load_tile(p.c(row, group), 0, 1, p.S, c.data(), 0);
      const float soft = vec::softplus(p.dt[row * p.H + h] + p.bias[h]);
      const float d = std::min(std::max(soft, static_cast<float>(p.z.dt_min)), static_cast<float>(p.z.dt_max));
      const float decay = spans.list()[row].start > 0 ? vec::exp(-std::exp(p.A_log[h]) * d) : 0.0f;
      float* state = states + (spans.list()[row].state_slot * p.H + h) * p.P * p.S;
      if (spans.list()[row].start == 0) std::fill_n(state, p.P * p.S, 0.0f);
      for (int64_t k = 0; k < p.P; ++k) {
        const float x = vec::load(p.x(row, h) + k), dx = d * x;
        for (int64_t s = 0; s < p.S; ++s) {
          const float next = decay * state[k * p.S + s] + dx * b[s];
          state[k * p.S + s] = next;
          products[s] = next * c[s];
        }
        out[row * p.inner + h * p.P + k] = tile_sum(products.data(), p.S16) + p.D[h] * x;
      }
    }
  });
  return y_ni;
}

}  // namespace

at::Tensor forward(const Inputs& in, const Spans* spans, const at::Tensor& state_shps) {
  return in.xbc_nc.scalar_type() == at::kBFloat16 ? forward_as<c10::BFloat16>(in, spans, state_shps)
                                                   : forward_as<float>(in, spans, state_shps);
}

Gradients backward(const Inputs& in, const at::Tensor& dy_ni) {
  return in.xbc_nc.scalar_type() == at::kBFloat16 ? backward_as<c10::BFloat16>(in, dy_ni) : backward_as<float>(in, dy_ni);
}

at::Tensor step(const Inputs& in, const Spans& spans, const at::Tensor& state_shps) {
  return in.xbc_nc.scalar_type() == at::kBFloat16 ? step_as<c10::BFloat16>(in, spans, state_shps) : step_as<float>(in, spans, state_shps);
}

}  // namespace tessera::ssd_cpu
