#include "layers/linear.hpp"

#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <atomic>
#include <numeric>

#include "layers/few_rows.hpp"
#include "layers/gpu.hpp"
#include "layers/matmul.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {

std::string shape(const at::Tensor& t) { return fmt::format("[{}]", fmt::join(t.sizes(), ", ")); }

[[noreturn]] void fail(const char* op, const std::string& what) { throw Error(ExitCode::kRuntime, fmt::format("[{}] {}", op, what)); }

// at::linear with its products through product().
struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x_nd, const at::Tensor& w_od) {
    ctx->save_for_backward({x_nd, w_od});
    return product(x_nd, w_od.t());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto dy_no = grads[0].contiguous();
    at::Tensor dx_nd, dw_od;
    if (ctx->needs_input_grad(0)) dx_nd = product(dy_no, saved[1]);
    if (ctx->needs_input_grad(1)) dw_od = product(dy_no.t(), saved[0]);
    return {dx_nd, dw_od};
  }
};

// task(e, first row, rows) for every expert, the largest first: threads take one after the other where there are enough of like size, else all share each product.
template <class Task>
void for_experts(const std::vector<int64_t>& counts, Task task) {
  std::vector<int64_t> first(counts.size()), order(counts.size());
  std::exclusive_scan(counts.begin(), counts.end(), first.begin(), int64_t{0});
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return counts[a] > counts[b]; });
  const int64_t threads = at::get_num_threads(), total = first.back() + counts.back();
  if (threads == 1 || at::in_parallel_region() || threads * counts[order[0]] > total) {
    for (const int64_t e : order) task(e, first[e], counts[e]);
    return;
  }
  std::atomic<size_t> next = 0;
  const at::ThreadLocalState modes;  // of gradients and of inference, which are a thread's own
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const at::ThreadLocalStateGuard same(modes);
    for (size_t i; (i = next++) < order.size();) task(order[i], first[order[i]], counts[order[i]]);
  });
}

// One matrix product an expert into slices of one output.
struct GroupedLinear : torch::autograd::Function<GroupedLinear> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x_md, const at::Tensor& w_eod,
                            const std::vector<int64_t>& counts) {
    auto y_mo = at::empty({x_md.size(0), w_eod.size(1)}, x_md.options());
    if (*std::max_element(counts.begin(), counts.end()) <= kFewRows && few_rows_fit(y_mo, x_md, w_eod))
      few_rows_grouped(y_mo, x_md, w_eod, counts);
    else
      for_experts(counts, [&](int64_t e, int64_t row, int64_t count) {
        if (count == 0) return;
        auto out = y_mo.narrow(0, row, count);
        product_into(out, x_md.narrow(0, row, count), w_eod.select(0, e).t());
      });
    ctx->save_for_backward({x_md, w_eod});
    ctx->saved_data["counts"] = counts;
    return y_mo;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &x_md = saved[0], &w_eod = saved[1];
    const auto counts = ctx->saved_data["counts"].toIntVector();
    const auto dy_mo = grads[0].contiguous();
    at::Tensor dx_md, dw_eod;
    if (ctx->needs_input_grad(0)) dx_md = at::empty(x_md.sizes(), x_md.options());
    if (ctx->needs_input_grad(1)) dw_eod = at::empty(w_eod.sizes(), w_eod.options());
    for_experts(counts, [&](int64_t e, int64_t row, int64_t count) {
      if (count == 0) {
        if (dw_eod.defined()) dw_eod.select(0, e).zero_();
        return;
      }
      const auto dy = dy_mo.narrow(0, row, count);
      if (dx_md.defined()) {
        auto out = dx_md.narrow(0, row, count);
        product_into(out, dy, w_eod.select(0, e));
      }
      if (dw_eod.defined()) {
        auto out = dw_eod.select(0, e);
        product_into(out, dy.t(), x_md.narrow(0, row, count));
      }
    });
    return {dx_md, dw_eod, {}};
  }
};

// The kernels of a GPU, in bf16.
struct GroupedLinearOnGpu : torch::autograd::Function<GroupedLinearOnGpu> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x_md, const at::Tensor& w_eod, const at::Tensor& counts_e) {
    ctx->save_for_backward({x_md, w_eod, counts_e});
    return gpu_kernels()->grouped_linear_forward(x_md, w_eod, counts_e);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto [dx_md, dw_eod] = gpu_kernels()->grouped_linear_backward(saved[0], saved[1], saved[2], grads[0], ctx->needs_input_grad(0), ctx->needs_input_grad(1));
    return {dx_md, dw_eod, {}};
  }
};

}  // namespace

at::Tensor linear(const at::Tensor& x_nd, const at::Tensor& w_od, const at::Tensor& bias_o) {
  if (x_nd.dim() != 2 || w_od.dim() != 2 || x_nd.size(1) != w_od.size(1))
    fail("linear", fmt::format("x [N, D] and weight [O, D] must share D, got x {} and weight {}", shape(x_nd), shape(w_od)));
  if (bias_o.defined() && (bias_o.dim() != 1 || bias_o.size(0) != w_od.size(0)))
    fail("linear", fmt::format("bias must be [O] for weight [O, D], got bias {} and weight {}", shape(bias_o), shape(w_od)));
  const at::Tensor x = x_nd.to(w_od.scalar_type());
  const bool own = x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
  const at::Tensor y_no = own ? Linear::apply(x.contiguous(), w_od) : at::linear(x, w_od);
  return bias_o.defined() ? at::add(y_no, bias_o.to(y_no.scalar_type())) : y_no;
}

at::Tensor linear(Context&, const at::Tensor& x_nd, const Weight& w_od, const Weight& bias_o) {
  return linear(x_nd, w_od.tensor(), bias_o.tensor());
}

at::Tensor partial_sum_linear(Context& ctx, const at::Tensor& x_nd, const Weight& w_od, const Weight& bias_o) {
  const auto tp = ctx.mesh().tp;
  if (!bias_o.defined() || tp == 1) return linear(ctx, x_nd, w_od, bias_o);
  return linear(ctx, x_nd, w_od, Weight(bias_o.tensor().div(tp), &bias_o.row()));
}

at::Tensor grouped_linear(const at::Tensor& x_md, const at::Tensor& w_eod, const at::Tensor& counts_e) {
  constexpr auto op = "grouped_linear";
  if (x_md.dim() != 2 || w_eod.dim() != 3 || x_md.size(1) != w_eod.size(2))
    fail(op, fmt::format("x [M, D] and weight [E, O, D] must share D, got x {} and weight {}", shape(x_md), shape(w_eod)));
  if (counts_e.scalar_type() != at::kLong || counts_e.dim() != 1 || counts_e.size(0) != w_eod.size(0))
    fail(op, fmt::format("counts must be int64 [E] for weight [E, O, D], got {} {} and weight {}",
                         c10::toString(counts_e.scalar_type()), shape(counts_e), shape(w_eod)));
  const bool gpu = on_gpu(w_eod) && w_eod.scalar_type() == at::kBFloat16 && x_md.size(0) > 0;
  if (gpu && !counts_e.is_cpu()) return GroupedLinearOnGpu::apply(x_md.to(at::kBFloat16), w_eod, counts_e);
  const auto host_e = counts_e.cpu().contiguous();
  const std::vector<int64_t> counts(host_e.const_data_ptr<int64_t>(), host_e.const_data_ptr<int64_t>() + host_e.numel());
  for (const auto count : counts)
    if (count < 0) fail(op, fmt::format("counts must not be negative, got [{}]", fmt::join(counts, ", ")));
  const auto sum = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  if (sum != x_md.size(0)) fail(op, fmt::format("counts must sum to the rows of x, got sum {} and x {}", sum, shape(x_md)));
  if (gpu) return GroupedLinearOnGpu::apply(x_md.to(at::kBFloat16), w_eod, counts_e);
  return GroupedLinear::apply(x_md.to(w_eod.scalar_type()), w_eod, counts);
}

at::Tensor grouped_linear(Context&, const at::Tensor& x_md, const Weight& w_eod, const at::Tensor& counts_e) {
  return grouped_linear(x_md, w_eod.tensor(), counts_e);
}

}  // namespace tessera
