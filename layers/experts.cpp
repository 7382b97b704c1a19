#include "layers/experts.hpp"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "layers/collectives.hpp"
#include "layers/gpu.hpp"
#include "tessera/device.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kGrain = 1 << 15;  // elements a thread takes at least

[[noreturn]] void fail(const char* op, const std::string& what) { throw Error(ExitCode::kRuntime, fmt::format("[{}] {}", op, what)); }

at::ScalarType sum_type(const at::Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls body(n, scratch_d) for every token, in parallel; scratch is the thread's own row of D sums.
template <class A, class Body>
void for_tokens(int64_t N, int64_t k, int64_t D, const Body& body) {
  at::parallel_for(0, N, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, k * D)), [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(static_cast<size_t>(D));
    for (int64_t n = begin; n < end; ++n) body(n, scratch.data());
  });
}

#define TESSERA_FOR_TYPE(tensor, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, (tensor).scalar_type(), "experts", __VA_ARGS__)

// y[m] = x[token[m]]
at::Tensor take_rows(const at::Tensor& x_nd, const at::Tensor& token_m) {
  if (on_gpu(x_nd) && token_m.numel() > 0) return gpu_kernels()->take_rows(x_nd, token_m);
  if (!x_nd.is_cpu()) return x_nd.index_select(0, token_m);
  const auto M = token_m.size(0), bytes = x_nd.size(1) * static_cast<int64_t>(x_nd.element_size());
  auto y_md = at::empty({M, x_nd.size(1)}, x_nd.options());
  const auto* x = static_cast<const char*>(x_nd.const_data_ptr());
  auto* y = static_cast<char*>(y_md.mutable_data_ptr());
  const auto* token = token_m.const_data_ptr<int64_t>();
  at::parallel_for(0, M, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, x_nd.size(1))), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) std::memcpy(y + m * bytes, x + token[m] * bytes, static_cast<size_t>(bytes));
  });
  return y_md;
}

// out[n] = sum_j w[n, j] y[row[n, j]]; w undefined: ones.
at::Tensor sum_rows(const at::Tensor& y_md, const at::Tensor& w_nk, const at::Tensor& row_nk) {
  const auto N = row_nk.size(0), k = row_nk.size(1), D = y_md.size(1);
  if (on_gpu(y_md)) return gpu_kernels()->sum_rows(y_md, w_nk, row_nk);
  if (!y_md.is_cpu()) {
    auto sum_nd = at::zeros({N, D}, y_md.options().dtype(sum_type(y_md)));
    for (int64_t j = 0; j < k; ++j) {
      const auto y_nd = y_md.index_select(0, row_nk.select(1, j));
      if (w_nk.defined()) sum_nd.addcmul_(y_nd.to(sum_nd.scalar_type()), w_nk.narrow(1, j, 1));
      else sum_nd.add_(y_nd);
    }
    return sum_nd.to(y_md.scalar_type());
  }
  auto out_nd = at::empty({N, D}, y_md.options());
  TESSERA_FOR_TYPE(y_md, [&] {
    using A = Sum<scalar_t>;
    const auto* y = y_md.const_data_ptr<scalar_t>();
    const auto* w = w_nk.defined() ? w_nk.const_data_ptr<A>() : nullptr;
    const auto* row = row_nk.const_data_ptr<int64_t>();
    auto* out = out_nd.mutable_data_ptr<scalar_t>();
    for_tokens<A>(N, k, D, [=](int64_t n, A* sum) {
      std::fill_n(sum, D, A{0});
      for (int64_t j = 0; j < k; ++j) {
        const A weight = w ? w[n * k + j] : A{1};
        const scalar_t* from = y + row[n * k + j] * D;
        for (int64_t d = 0; d < D; ++d) sum[d] += weight * static_cast<A>(from[d]);
      }
      for (int64_t d = 0; d < D; ++d) out[n * D + d] = static_cast<scalar_t>(sum[d]);
    });
  });
  return out_nd;
}

// dy[row[n, j]] = w[n, j] dout[n]
at::Tensor spread_rows(const at::Tensor& dout_nd, const at::Tensor& w_nk, const Dispatch& d) {
  const auto N = d.row_nk.size(0), k = d.row_nk.size(1), D = dout_nd.size(1);
  if (on_gpu(dout_nd)) return gpu_kernels()->spread_rows(dout_nd, w_nk, d.row_nk);
  if (!dout_nd.is_cpu()) {
    const auto w_m = w_nk.flatten().index_select(0, d.slot_m);
    return (dout_nd.index_select(0, d.token_m) * w_m.unsqueeze(1)).to(dout_nd.scalar_type());
  }
  auto dy_md = at::empty({N * k, D}, dout_nd.options());
  TESSERA_FOR_TYPE(dout_nd, [&] {
    using A = Sum<scalar_t>;
    const auto* dout = dout_nd.const_data_ptr<scalar_t>();
    const auto* w = w_nk.const_data_ptr<A>();
    const auto* row = d.row_nk.const_data_ptr<int64_t>();
    auto* dy = dy_md.mutable_data_ptr<scalar_t>();
    for_tokens<A>(N, k, D, [=](int64_t n, A* wide) {
      for (int64_t i = 0; i < D; ++i) wide[i] = static_cast<A>(dout[n * D + i]);
      for (int64_t j = 0; j < k; ++j) {
        const A weight = w[n * k + j];
        scalar_t* to = dy + row[n * k + j] * D;
        for (int64_t i = 0; i < D; ++i) to[i] = static_cast<scalar_t>(weight * wide[i]);
      }
    });
  });
  return dy_md;
}

// dw[n, j] = <dout[n], y[row[n, j]]>
at::Tensor row_products(const at::Tensor& dout_nd, const at::Tensor& y_md, const at::Tensor& row_nk) {
  const auto N = row_nk.size(0), k = row_nk.size(1), D = y_md.size(1);
  if (on_gpu(y_md)) return gpu_kernels()->row_products(dout_nd, y_md, row_nk);
  if (!y_md.is_cpu()) {
    const auto wide_nd = dout_nd.to(sum_type(y_md));
    std::vector<at::Tensor> columns;
    for (int64_t j = 0; j < k; ++j) columns.push_back((wide_nd * y_md.index_select(0, row_nk.select(1, j))).sum(1));
    return at::stack(columns, 1);
  }
  auto dw_nk = at::empty({N, k}, y_md.options().dtype(sum_type(y_md)));
  TESSERA_FOR_TYPE(y_md, [&] {
    using A = Sum<scalar_t>;
    constexpr int64_t kLanes = 16;  // independent sums: the compiler may not reorder one
    const auto* dout = dout_nd.const_data_ptr<scalar_t>();
    const auto* y = y_md.const_data_ptr<scalar_t>();
    const auto* row = row_nk.const_data_ptr<int64_t>();
    auto* dw = dw_nk.mutable_data_ptr<A>();
    for_tokens<A>(N, k, D, [=](int64_t n, A* wide) {
      for (int64_t i = 0; i < D; ++i) wide[i] = static_cast<A>(dout[n * D + i]);
      for (int64_t j = 0; j < k; ++j) {
        const scalar_t* from = y + row[n * k + j] * D;
        A lanes[kLanes] = {};
        int64_t i = 0;
        for (; i + kLanes <= D; i += kLanes)
          for (int64_t l = 0; l < kLanes; ++l) lanes[l] += wide[i + l] * static_cast<A>(from[i + l]);
        for (; i < D; ++i) lanes[i % kLanes] += wide[i] * static_cast<A>(from[i]);
        A sum = 0;
        for (const A lane : lanes) sum += lane;
        dw[n * k + j] = sum;
      }
    });
  });
  return dw_nk;
}

struct Permute : torch::autograd::Function<Permute> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_nd, const at::Tensor& token_m, const at::Tensor& row_nk) {
    ctx->save_for_backward({row_nk});
    return take_rows(x_nd, token_m);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto row_nk = ctx->get_saved_variables()[0];
    return {sum_rows(grads[0].contiguous(), {}, row_nk), {}, {}};
  }
};

struct Combine : torch::autograd::Function<Combine> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& y_md, const at::Tensor& w_nk, const at::Tensor& slot_m,
                            const at::Tensor& token_m, const at::Tensor& row_nk) {
    ctx->save_for_backward({y_md, w_nk, slot_m, token_m, row_nk});
    return sum_rows(y_md, w_nk, row_nk);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &y_md = saved[0], &w_nk = saved[1];
    const Dispatch d{.slot_m = saved[2], .token_m = saved[3], .row_nk = saved[4]};
    const auto dout_nd = grads[0].contiguous();
    at::Tensor dy_md, dw_nk;
    if (ctx->needs_input_grad(0)) dy_md = spread_rows(dout_nd, w_nk, d);
    if (ctx->needs_input_grad(1)) dw_nk = row_products(dout_nd, y_md, d.row_nk);
    return {dy_md, dw_nk, {}, {}, {}};
  }
};

Dispatch gpu_dispatch(const at::Tensor& indices_nk, int64_t num_experts) {
  const auto [counts_e, slot_m, token_m, row_nk] = gpu_kernels()->dispatch(indices_nk, num_experts);
  return {counts_e, slot_m, token_m, row_nk};
}

void check_rows(const char* op, const char* name, const at::Tensor& t, int64_t rows) {
  if (t.dim() != 2 || t.size(0) != rows) fail(op, fmt::format("{} must be [{}, D], got [{}]", name, rows, fmt::join(t.sizes(), ", ")));
}

}  // namespace

Dispatch dispatch(const at::Tensor& indices_nk, int64_t num_experts) {
  if (indices_nk.dim() != 2 || indices_nk.scalar_type() != at::kLong)
    fail("dispatch", fmt::format("indices must be int64 [N, k], got {} [{}]", c10::toString(indices_nk.scalar_type()),
                                 fmt::join(indices_nk.sizes(), ", ")));
  const bool gpu = lies_on_gpu(indices_nk);
  if (!indices_nk.is_cpu() && !gpu) return dispatch_ref(indices_nk, num_experts);
  const auto indices = indices_nk.contiguous();
  const auto M = indices.numel(), k = indices.size(1);
  if (!indices.is_cpu()) return gpu_dispatch(indices, num_experts);
  const auto* expert = indices.const_data_ptr<int64_t>();
  for (int64_t slot = 0; slot < M; ++slot)
    if (expert[slot] < 0 || expert[slot] >= num_experts)
      fail("dispatch", fmt::format("experts must be in [0, {}), got {} for token {}", num_experts, expert[slot], slot / k));
  if (gpu) return gpu_dispatch(indices, num_experts);
  Dispatch d{.counts_e = at::zeros({num_experts}, at::kLong), .slot_m = at::empty({M}, at::kLong), .token_m = at::empty({M}, at::kLong),
             .row_nk = at::empty_like(indices)};
  auto* counts = d.counts_e.mutable_data_ptr<int64_t>();
  for (int64_t slot = 0; slot < M; ++slot) ++counts[expert[slot]];
  std::vector<int64_t> next(static_cast<size_t>(num_experts), 0);
  for (int64_t e = 1; e < num_experts; ++e) next[e] = next[e - 1] + counts[e - 1];
  auto* slots = d.slot_m.mutable_data_ptr<int64_t>();
  auto* tokens = d.token_m.mutable_data_ptr<int64_t>();
  auto* rows = d.row_nk.mutable_data_ptr<int64_t>();
  for (int64_t n = 0, slot = 0; slot < M; ++n)
    for (int64_t j = 0; j < k; ++j, ++slot) {
      const auto row = next[expert[slot]]++;
      slots[row] = slot, tokens[row] = n, rows[slot] = row;
    }
  return d;
}

at::Tensor permute_tokens(const at::Tensor& x_nd, const Dispatch& d) {
  check_rows("permute_tokens", "x", x_nd, d.row_nk.size(0));
  return Permute::apply(x_nd.contiguous(), d.token_m, d.row_nk);
}

at::Tensor combine_tokens(const at::Tensor& y_md, const at::Tensor& weights_nk, const Dispatch& d) {
  check_rows("combine_tokens", "y", y_md, d.slot_m.size(0));
  if (weights_nk.sizes() != d.row_nk.sizes())
    fail("combine_tokens", fmt::format("weights must be [{}], got [{}]", fmt::join(d.row_nk.sizes(), ", "), fmt::join(weights_nk.sizes(), ", ")));
  return Combine::apply(y_md.contiguous(), weights_nk.to(sum_type(y_md)).contiguous(), d.slot_m, d.token_m, d.row_nk);
}

at::Tensor copies_of_experts(const at::Tensor& indices_nk, int64_t num_experts, const Group& group, int64_t etp) {
  if (etp == 1) return indices_nk;
  const auto N = indices_nk.size(0), k = indices_nk.size(1), size = num_experts * etp / group.size();
  const auto first_nk = indices_nk.div(size, "floor") * (etp * size) + indices_nk.remainder(size);
  return (first_nk.unsqueeze(2) + at::arange(etp, indices_nk.options()) * size).view({N, k * etp});
}

at::Tensor exchange_counts(const at::Tensor& counts_e, const Group& group, at::Device device) {
  const auto sent_e = counts_e.to(device), arriving_e = at::empty_like(sent_e);
  const std::vector<int64_t> even(static_cast<size_t>(group.size()), counts_e.size(0) / group.size());
  group.all_to_all(arriving_e, sent_e, even, even);
  return arriving_e.cpu();
}

ExpertRoute expert_route(const at::Tensor& counts_e, const at::Tensor& arriving_e, const Group& group, at::Device device) {
  const auto ranks = group.size(), size = counts_e.size(0) / ranks;
  ExpertRoute route;
  std::vector<int64_t> expert_m;
  const auto counts_here = counts_e.cpu(), arriving_here = arriving_e.cpu();
  const auto *counts = counts_here.const_data_ptr<int64_t>(), *arriving = arriving_here.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < ranks; ++r) {
    route.sent.push_back(std::accumulate(counts + r * size, counts + (r + 1) * size, int64_t{0}));
    route.received.push_back(std::accumulate(arriving + r * size, arriving + (r + 1) * size, int64_t{0}));
    for (int64_t e = 0; e < size; ++e) expert_m.insert(expert_m.end(), static_cast<size_t>(arriving[r * size + e]), e);
  }
  route.arrived = dispatch(to_device(expert_m, device).unsqueeze(1), size);
  return route;
}

at::Tensor rows_to_experts(const at::Tensor& x_md, const ExpertRoute& route, const Group& group) {
  return permute_tokens(exchange_rows(x_md, route.sent, route.received, &group), route.arrived);
}

at::Tensor rows_from_experts(const at::Tensor& y_md, const ExpertRoute& route, const Group& group) {
  const Dispatch back{.token_m = route.arrived.row_nk.flatten(), .row_nk = route.arrived.slot_m.unsqueeze(1)};
  return exchange_rows(permute_tokens(y_md, back), route.received, route.sent, &group);
}

}  // namespace tessera
