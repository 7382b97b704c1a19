#include "layers/attention.hpp"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "layers/attention_cache.hpp"
#include "layers/attention_check.hpp"
#include "layers/gpu.hpp"
#include "tessera/device.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {

// Pieces of documents that share one batched product: row i of `queries` (tokens of the batch, -1: padding) reads `keys`.
// Padding lies behind the real tokens, so that causality hides it.
struct Bucket {
  int64_t batch = 0, num_queries = 0, num_keys = 0;
  std::vector<int64_t> queries, keys;  // [batch * num_queries], [batch * num_keys]; empty: all tokens in order
  int64_t before = 0;                  // keys that lie before the first query; > 0 or a window needs a mask
};

constexpr double kFill = 0.8;          // documents share a bucket when the shortest is at least this part of the longest
constexpr int64_t kShort = 16;         // or none is longer than this
constexpr int64_t kNarrow = 128;       // queries up to which bf16 is computed in fp32: small bf16 products are slower
constexpr int64_t kMinBlock = 64;      // queries of a block under a window
constexpr int64_t kFold = 16;          // continued spans up to this length put the heads of one kv head side by side as queries

struct Piece {
  int64_t row, begin, length, document_len;  // queries [begin, begin + length) of the document that starts at `row`
};

void add_bucket(std::vector<Bucket>& out, const Piece* pieces, int64_t batch, int64_t num_queries, int64_t before) {
  Bucket b{.batch = batch, .num_queries = num_queries, .num_keys = num_queries + before, .queries = {}, .keys = {}, .before = before};
  const auto append = [](std::vector<int64_t>& rows, const Piece& p, int64_t from, int64_t to) {
    for (auto t = from; t < to; ++t) rows.push_back(t >= 0 && t < p.document_len ? p.row + t : -1);
  };
  for (int64_t i = 0; i < batch; ++i) {
    append(b.queries, pieces[i], pieces[i].begin, pieces[i].begin + num_queries);
    append(b.keys, pieces[i], pieces[i].begin - before, pieces[i].begin + num_queries);
  }
  out.push_back(std::move(b));
}

// Documents of like lengths side by side; under a window, those longer than it in blocks that see their own keys and the window before.
std::vector<Bucket> plan(const std::vector<int64_t>& lengths, int64_t window) {
  const auto longest = lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  const bool uniform = std::all_of(lengths.begin(), lengths.end(), [&](int64_t n) { return n == longest; });
  const auto batch = static_cast<int64_t>(lengths.size());
  if (uniform && (window == 0 || longest <= window)) return {Bucket{.batch = batch, .num_queries = longest, .num_keys = longest, .queries = {}, .keys = {}}};
  const auto block = std::max(window, kMinBlock);
  std::vector<Piece> plain, heads, tails;
  for (int64_t i = 0, row = 0; i < batch; row += lengths[i++]) {
    if (window == 0 || lengths[i] <= window) {
      plain.push_back({row, 0, lengths[i], lengths[i]});
      continue;
    }
    for (int64_t begin = 0; begin < lengths[i]; begin += block)
      (begin == 0 ? heads : tails).push_back({row, begin, std::min(block, lengths[i] - begin), lengths[i]});
  }
  std::vector<Bucket> out;
  for (auto* pieces : {&plain, &heads, &tails}) {
    std::stable_sort(pieces->begin(), pieces->end(), [](const Piece& a, const Piece& b) { return a.length > b.length; });
    for (size_t i = 0, end = 0; i < pieces->size(); i = end) {
      const auto top = (*pieces)[i].length;
      for (end = i; end < pieces->size() && ((*pieces)[end].length >= kFill * top || top <= kShort);) ++end;
      add_bucket(out, pieces->data() + i, end - i, top, pieces == &tails ? window - 1 : 0);
    }
  }
  return out;
}

at::ScalarType compute_dtype(const Bucket& b, const at::Tensor& q_nhp) {
  return q_nhp.scalar_type() != at::kDouble && b.num_queries <= kNarrow ? at::kFloat : q_nhp.scalar_type();
}

// 0 where query i sees key j, -inf elsewhere; undefined where plain causality says it all.
std::optional<at::Tensor> mask(const Bucket& b, int64_t window, const at::TensorOptions& options) {
  if (b.before == 0 && (window == 0 || b.num_queries <= window)) return std::nullopt;
  const auto i_n1 = at::arange(b.num_queries, options.dtype(at::kLong)).unsqueeze(1) + b.before;
  const auto j_1m = at::arange(b.num_keys, options.dtype(at::kLong)).unsqueeze(0);
  const auto seen_nm = (j_1m <= i_n1).logical_and(j_1m > i_n1 - window);
  return at::where(seen_nm, at::zeros({}, options), at::full({}, -std::numeric_limits<double>::infinity(), options));
}

// Rows of x_nhp as [batch, heads, len, P], every kv head repeated for the query heads that read it.
at::Tensor pack(const at::Tensor& x_nhp, const std::vector<int64_t>& rows, int64_t batch, int64_t len, int64_t repeats, at::ScalarType dtype) {
  const auto heads = x_nhp.size(1), dim = x_nhp.size(2);
  auto x_bthp = x_nhp;
  if (rows.empty()) {
    x_bthp = x_nhp.unflatten(0, {batch, len});
    if (x_nhp.stride(2) != 1) x_bthp = x_bthp.contiguous();
  } else {
    const auto source = x_nhp.stride(2) == 1 && x_nhp.stride(1) == dim ? x_nhp : x_nhp.contiguous();
    x_bthp = at::empty({batch, len, heads, dim}, x_nhp.options());
    const auto width = heads * dim * x_nhp.element_size(), stride = source.stride(0) * x_nhp.element_size();
    const auto* from = static_cast<const char*>(source.const_data_ptr());
    auto* to = static_cast<char*>(x_bthp.data_ptr());
    at::parallel_for(0, batch * len, 256, [&](int64_t begin, int64_t end) {
      for (auto r = begin; r < end; ++r) {
        if (rows[r] >= 0) std::memcpy(to + r * width, from + rows[r] * stride, width);
        else std::memset(to + r * width, 0, width);
      }
    });
  }
  x_bthp = x_bthp.to(dtype);
  if (repeats > 1) x_bthp = x_bthp.unsqueeze(3).expand({batch, len, heads, repeats, dim}).reshape({batch, len, heads * repeats, dim});
  return x_bthp.transpose(1, 2);
}

// The inverse: x_bhtp into the rows of out_nhp; each row of out is met once.
void unpack(const at::Tensor& x_bhtp, const std::vector<int64_t>& rows, const at::Tensor& out_nhp) {
  const auto x_bthp = x_bhtp.transpose(1, 2);
  if (rows.empty()) return void(out_nhp.view(x_bthp.sizes()).copy_(x_bthp));
  const auto source = x_bthp.to(out_nhp.scalar_type()).contiguous();
  const auto width = out_nhp.size(1) * out_nhp.size(2) * out_nhp.element_size();
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(out_nhp.data_ptr());
  at::parallel_for(0, static_cast<int64_t>(rows.size()), 256, [&](int64_t begin, int64_t end) {
    for (auto r = begin; r < end; ++r)
      if (rows[r] >= 0) std::memcpy(to + rows[r] * width, from + r * width, width);
  });
}

// Adds dx of repeated heads to acc_nkp: rows of keys that several blocks read are met more than once.
void add_rows(const at::Tensor& dx_btkp, const std::vector<int64_t>& rows, const at::Tensor& acc_nkp) {
  const auto rows_r = at::tensor(rows, at::kLong), real_m = at::nonzero(rows_r.ge(0)).squeeze(1);
  acc_nkp.index_add_(0, rows_r.index_select(0, real_m), dx_btkp.flatten(0, 1).index_select(0, real_m).to(acc_nkp.scalar_type()));
}

// One flash-attention call a bucket; keeps q, k, v, the output and its log-sum-exp, and repeats kv heads again in the backward pass.
struct SpanAttention : torch::autograd::Function<SpanAttention> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q_nhp, const at::Tensor& k_nkp, const at::Tensor& v_nkp,
                            const std::vector<int64_t>& lengths, int64_t window, double scale) {
    const auto repeats = q_nhp.size(1) / k_nkp.size(1);
    auto out_nhp = at::empty(q_nhp.sizes(), q_nhp.options());
    std::vector<at::Tensor> saved{q_nhp, k_nkp, v_nkp, out_nhp};
    for (const auto& b : plan(lengths, window)) {
      const auto dtype = compute_dtype(b, q_nhp);
      const auto m = mask(b, window, q_nhp.options().dtype(dtype));
      const auto [o_bhtp, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
          pack(q_nhp, b.queries, b.batch, b.num_queries, 1, dtype), pack(k_nkp, b.keys, b.batch, b.num_keys, repeats, dtype),
          pack(v_nkp, b.keys, b.batch, b.num_keys, repeats, dtype), 0.0, !m, m, scale);
      unpack(o_bhtp, b.queries, out_nhp);
      saved.push_back(lse);
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["lengths"] = lengths;
    ctx->saved_data["window"] = window;
    ctx->saved_data["scale"] = scale;
    return out_nhp;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &q_nhp = saved[0], &k_nkp = saved[1], &v_nkp = saved[2], &out_nhp = saved[3];
    const auto window = ctx->saved_data["window"].toInt();
    const auto repeats = q_nhp.size(1) / k_nkp.size(1);
    const auto dout_nhp = grads[0].contiguous();
    const bool sums = window > 0;
    const auto acc = sums && q_nhp.scalar_type() != at::kDouble ? at::kFloat : q_nhp.scalar_type();
    const auto dq_nhp = at::empty(q_nhp.sizes(), q_nhp.options());
    const auto options = k_nkp.options().dtype(acc);
    const auto dk_nkp = sums ? at::zeros(k_nkp.sizes(), options) : at::empty(k_nkp.sizes(), options);
    const auto dv_nkp = sums ? at::zeros(v_nkp.sizes(), options) : at::empty(v_nkp.sizes(), options);
    size_t next = 4;
    for (const auto& b : plan(ctx->saved_data["lengths"].toIntVector(), window)) {
      const auto dtype = compute_dtype(b, q_nhp);
      const auto m = mask(b, window, q_nhp.options().dtype(dtype));
      const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          pack(dout_nhp, b.queries, b.batch, b.num_queries, 1, dtype), pack(q_nhp, b.queries, b.batch, b.num_queries, 1, dtype),
          pack(k_nkp, b.keys, b.batch, b.num_keys, repeats, dtype), pack(v_nkp, b.keys, b.batch, b.num_keys, repeats, dtype),
          pack(out_nhp, b.queries, b.batch, b.num_queries, 1, dtype), saved[next++], 0.0, !m, m, ctx->saved_data["scale"].toDouble());
      unpack(dq, b.queries, dq_nhp);
      const auto collect = [&](const at::Tensor& d_bhtp, const at::Tensor& out_nkp) {
        const auto d_bktp = repeats > 1 ? d_bhtp.unflatten(1, {k_nkp.size(1), repeats}).sum(2) : d_bhtp;
        if (sums && !b.keys.empty()) add_rows(d_bktp.transpose(1, 2), b.keys, out_nkp);
        else unpack(d_bktp, b.keys, out_nkp);
      };
      collect(dk, dk_nkp), collect(dv, dv_nkp);
    }
    return {dq_nhp, dk_nkp.to(k_nkp.scalar_type()), dv_nkp.to(v_nkp.scalar_type()), {}, {}, {}};
  }
};

// Documents one by one, by the library's own choice of kernel: what runs where the flash call above does not.
at::Tensor composed(const at::Tensor& q_nhp, const at::Tensor& k_nkp, const at::Tensor& v_nkp, const std::vector<int64_t>& lengths,
                    int64_t window, double scale) {
  if (window > 0 || lengths.empty()) return attention_ref(q_nhp, k_nkp, v_nkp, Spans::documents(lengths), scale, window);
  const auto repeats = q_nhp.size(1) / k_nkp.size(1);
  const bool uniform = std::all_of(lengths.begin(), lengths.end(), [&](int64_t n) { return n == lengths[0]; });
  const auto k_nhp = k_nkp.repeat_interleave(repeats, 1), v_nhp = v_nkp.repeat_interleave(repeats, 1);
  const auto one = [&](int64_t row, int64_t batch, int64_t len) {
    const auto rows = [&](const at::Tensor& x) { return x.narrow(0, row, batch * len).unflatten(0, {batch, len}).transpose(1, 2); };
    return at::scaled_dot_product_attention(rows(q_nhp), rows(k_nhp), rows(v_nhp), {}, 0.0, true, scale).transpose(1, 2).flatten(0, 1);
  };
  if (uniform) return one(0, static_cast<int64_t>(lengths.size()), lengths[0]);
  std::vector<at::Tensor> outputs;
  for (int64_t i = 0, row = 0; i < static_cast<int64_t>(lengths.size()); row += lengths[i++]) outputs.push_back(one(row, 1, lengths[i]));
  return at::cat(outputs, 0);
}

// Rows of x into the cache at their slots and positions.
void write_cache(const at::Tensor& x_nkp, const Spans& spans, const at::Tensor& cache_slkp) {
  const auto capacity = cache_slkp.size(1);
  const auto x = x_nkp.to(cache_slkp.scalar_type()).contiguous();
  if (!cache_slkp.is_cpu()) {
    std::vector<int64_t> rows;
    for (const auto& span : spans.list())
      for (int64_t t = 0; t < span.length; ++t) rows.push_back(span.state_slot * capacity + span.start + t);
    cache_slkp.flatten(0, 1).index_copy_(0, to_device(rows, x.device()), x);
    return;
  }
  const auto width = x.size(1) * x.size(2) * x.element_size();
  auto* to = static_cast<char*>(cache_slkp.data_ptr());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  for (int64_t s = 0; s < spans.size(); ++s) {
    const auto& span = spans.list()[s];
    std::memcpy(to + (span.state_slot * capacity + span.start) * width, from + spans.rows()[s] * width, span.length * width);
  }
}

// Attention of spans to the cache, those of like length and context together. In short ones the query heads of one kv head lie side by
// side as its queries, so that keys and values are read once.
void attend_cache(const at::Tensor& q_nhp, const Spans& spans, double scale, int64_t window, const at::Tensor& k_cache_slkp,
                  const at::Tensor& v_cache_slkp, const at::Tensor& out_nhp) {
  const auto H = q_nhp.size(1), K = k_cache_slkp.size(2), P = q_nhp.size(2), repeats = H / K;
  const auto& list = spans.list();
  const auto long_options = q_nhp.options().dtype(at::kLong);
  const auto on_device = [&](const std::vector<int64_t>& values) { return to_device(values, q_nhp.device()); };
  const auto context = [&](int64_t i) { return list[i].start + list[i].length; };
  std::vector<int64_t> order(spans.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return list[a].length != list[b].length ? list[a].length > list[b].length : context(a) > context(b);
  });
  for (size_t begin = 0, end = 0; begin < order.size(); begin = end) {
    const auto len = list[order[begin]].length, top = context(order[begin]);
    while (end < order.size() && list[order[end]].length == len && 2 * context(order[end]) >= top) ++end;
    std::vector<int64_t> group(order.begin() + begin, order.begin() + end), rows, slots, starts;
    std::sort(group.begin(), group.end());
    const auto batch = static_cast<int64_t>(group.size());
    bool adjacent = true;
    for (const auto i : group) {
      adjacent = adjacent && (slots.empty() || list[i].state_slot == slots.back() + 1);
      slots.push_back(list[i].state_slot), starts.push_back(list[i].start);
      for (int64_t t = 0; t < len; ++t) rows.push_back(spans.rows()[i] + t);
    }
    const auto low = window > 0 ? std::max<int64_t>(0, *std::min_element(starts.begin(), starts.end()) + 1 - window) : 0, num_keys = top - low;
    const bool fold = len <= kFold;
    const auto read = [&](const at::Tensor& cache_slkp) {
      const auto x_slkp = cache_slkp.narrow(1, low, num_keys);
      const auto x_bktp = (adjacent ? x_slkp.narrow(0, slots[0], batch) : x_slkp.index_select(0, on_device(slots))).transpose(1, 2);
      return fold ? x_bktp : x_bktp.repeat_interleave(repeats, 1);
    };
    const auto query_b1t1 = on_device(starts).view({batch, 1, 1, 1}) + at::arange(len, long_options).view({1, 1, len, 1});
    const auto key_111m = at::arange(low, top, long_options).view({1, 1, 1, num_keys});
    auto seen = key_111m <= query_b1t1;
    if (window > 0) seen = seen.logical_and(key_111m > query_b1t1 - window);
    const auto rows_r = on_device(rows);
    const auto q_bthp = q_nhp.index_select(0, rows_r).view({batch, len, H, P});
    at::Tensor out_bthp;
    if (fold) {
      seen = seen.expand({batch, repeats, len, num_keys}).reshape({batch, 1, repeats * len, num_keys});
      const auto q_bkqp = q_bthp.view({batch, len, K, repeats, P}).permute({0, 2, 3, 1, 4}).reshape({batch, K, repeats * len, P});
      const auto o_bkqp = at::scaled_dot_product_attention(q_bkqp, read(k_cache_slkp), read(v_cache_slkp), seen, 0.0, false, scale);
      out_bthp = o_bkqp.reshape({batch, K, repeats, len, P}).permute({0, 3, 1, 2, 4});
    } else {
      out_bthp = at::scaled_dot_product_attention(q_bthp.transpose(1, 2), read(k_cache_slkp), read(v_cache_slkp), seen, 0.0, false, scale)
                     .transpose(1, 2);
    }
    out_nhp.index_copy_(0, rows_r, out_bthp.reshape({batch * len, H, P}));
  }
}

std::string shape(const at::Tensor& t) { return t.defined() ? fmt::format("[{}]", fmt::join(t.sizes(), ", ")) : "undefined"; }

}  // namespace

void check_attention(const at::Tensor& q_nhp, const at::Tensor& k_nkp, const at::Tensor& v_nkp, const Spans& spans, int64_t window, const at::Tensor& k_cache_slkp,
                     const at::Tensor& v_cache_slkp) {
  const auto fail = [](const std::string& what) { throw Error(ExitCode::kRuntime, "[attention] " + what); };
  const auto N = spans.num_tokens();
  if (q_nhp.dim() != 3 || k_nkp.dim() != 3 || k_nkp.sizes() != v_nkp.sizes() || q_nhp.size(0) != N || k_nkp.size(0) != N ||
      q_nhp.size(2) != k_nkp.size(2) || k_nkp.size(1) < 1 || q_nhp.size(1) % k_nkp.size(1) != 0)
    fail(fmt::format("q must be [N, H, P], k and v [N, K, P] with H % K == 0 and the spans' N = {}, got q {}, k {}, v {}", N, shape(q_nhp),
                     shape(k_nkp), shape(v_nkp)));
  if (window < 0) fail(fmt::format("window must be 0 (all tokens) or positive, got {}", window));
  if (!k_cache_slkp.defined()) {
    for (const auto& span : spans.list())
      if (span.start != 0) fail(fmt::format("a span that begins at position {} needs a cache", span.start));
    return;
  }
  if (k_cache_slkp.dim() != 4 || !v_cache_slkp.defined() || k_cache_slkp.sizes() != v_cache_slkp.sizes() ||
      k_cache_slkp.size(2) != k_nkp.size(1) || k_cache_slkp.size(3) != k_nkp.size(2) || !k_cache_slkp.is_contiguous() || !v_cache_slkp.is_contiguous())
    fail(fmt::format("caches must be contiguous [slots, capacity, K, P] for k {}, got {} and {}", shape(k_nkp), shape(k_cache_slkp), shape(v_cache_slkp)));
  for (const auto& span : spans.list())
    if (span.state_slot < 0 || span.state_slot >= k_cache_slkp.size(0) || span.start + span.length > k_cache_slkp.size(1))
      fail(fmt::format("slot {}, positions [{}, {}) must lie in the cache {}", span.state_slot, span.start, span.start + span.length, shape(k_cache_slkp)));
}

at::Tensor attention(const at::Tensor& q_nhp, const at::Tensor& k_nkp, const at::Tensor& v_nkp, const Spans& spans, double scale, int64_t window,
                     const at::Tensor& k_cache_slkp, const at::Tensor& v_cache_slkp) {
  check_attention(q_nhp, k_nkp, v_nkp, spans, window, k_cache_slkp, v_cache_slkp);
  std::vector<int64_t> lengths;
  for (const auto& span : spans.list()) lengths.push_back(span.length);
  const auto fresh = [&] {
    return q_nhp.is_cpu() && !lengths.empty() ? SpanAttention::apply(q_nhp, k_nkp, v_nkp, lengths, window, scale)
                                              : composed(q_nhp, k_nkp, v_nkp, lengths, window, scale);
  };
  if (!k_cache_slkp.defined()) return fresh();

  at::AutoGradMode no_grad(false);
  const bool gpu = on_gpu(k_cache_slkp) && on_gpu(v_cache_slkp) && k_cache_slkp.scalar_type() == v_cache_slkp.scalar_type();
  if (gpu) gpu_kernels()->write_cache(k_nkp, v_nkp, spans, k_cache_slkp, v_cache_slkp);
  else write_cache(k_nkp, spans, k_cache_slkp), write_cache(v_nkp, spans, v_cache_slkp);
  if (std::all_of(spans.list().begin(), spans.list().end(), [](const Span& span) { return span.start == 0; })) return fresh();
  const auto out_nhp = at::empty(q_nhp.sizes(), q_nhp.options());
  const bool own = q_nhp.is_cpu() && (q_nhp.scalar_type() == at::kFloat || q_nhp.scalar_type() == at::kBFloat16) &&
                   k_cache_slkp.scalar_type() == q_nhp.scalar_type() && v_cache_slkp.scalar_type() == q_nhp.scalar_type() &&
                   *std::max_element(lengths.begin(), lengths.end()) <= kFold;
  if (gpu && k_cache_slkp.scalar_type() == q_nhp.scalar_type() && q_nhp.size(2) <= 256) gpu_kernels()->attend_cache(q_nhp, spans, scale, window, k_cache_slkp, v_cache_slkp, out_nhp);
  else if (own) attend_cache_cpu(q_nhp, spans, scale, window, k_cache_slkp, v_cache_slkp, out_nhp);
  else attend_cache(q_nhp, spans, scale, window, k_cache_slkp, v_cache_slkp, out_nhp);
  return out_nhp;
}

}  // namespace tessera
