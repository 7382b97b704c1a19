// Products of experts on the GPU: tensors to pointers.
#include "layers/cuda/grouped_gemm.hpp"

#include <ATen/ops/empty.h>

#include "layers/cuda/table.hpp"
#include "layers/cuda/tensors.hpp"
#include "layers/experts.hpp"

namespace tessera::gpu {
namespace {

// Where experts' rows and tiles begin, kept for as long as their pointers are used.
struct Sorted {
  Sorted(const Launches& launches, const at::Tensor& counts_e, int64_t M, const at::Tensor& like) : counts(counts_e.to(like.device(), /*non_blocking=*/true).contiguous()) {
    const int64_t E = counts.size(0);
    starts = at::empty({2, E + 1}, like.options().dtype(at::kInt));
    int32_t* const first_row = starts.mutable_data_ptr<int32_t>();
    launches.check(expert_rows(counts.const_data_ptr<int64_t>(), E, M, first_row, first_row + E + 1, launches.stream()));
    rows = {first_row, first_row + E + 1, E, M};
  }
  at::Tensor counts, starts;
  ExpertRows rows{};
};

Operand operand(const at::Tensor& x_md) { return {.data = x_md.const_data_ptr(), .stride = x_md.stride(0), .row = nullptr, .relu2 = false}; }
Operand gathered(const at::Tensor& x_nd, const at::Tensor& row_m) { return {.data = x_nd.const_data_ptr(), .stride = x_nd.stride(0), .row = row_m.const_data_ptr<int64_t>(), .relu2 = false}; }
Operand squared(const at::Tensor& u_mf) { return {.data = u_mf.const_data_ptr(), .stride = u_mf.stride(0), .row = nullptr, .relu2 = true}; }

at::Tensor forward(const at::Tensor& x_md, const at::Tensor& w_eod, const at::Tensor& counts_e) {
  const Launches launches("grouped_linear", x_md);
  const at::Tensor x = unit_stride(x_md.detach()), w = w_eod.detach().contiguous();
  const Sorted sorted(launches, counts_e, x.size(0), x);
  at::Tensor y = at::empty({x.size(0), w.size(1)}, x.options());
  launches.check(grouped_product(sorted.rows, operand(x), w.const_data_ptr(), w.size(1), w.size(2), y.mutable_data_ptr(), {}, launches.stream()));
  return y;
}

std::array<at::Tensor, 2> backward(const at::Tensor& x_md, const at::Tensor& w_eod, const at::Tensor& counts_e, const at::Tensor& dy_mo, bool want_x, bool want_w) {
  const Launches launches("grouped_linear", x_md);
  const at::Tensor x = unit_stride(x_md), w = w_eod.contiguous(), dy = unit_stride(dy_mo);
  const Sorted sorted(launches, counts_e, x.size(0), x);
  at::Tensor dx, dw;
  if (want_x) {
    dx = at::empty({x.size(0), w.size(2)}, x.options());
    launches.check(grouped_product_transposed(sorted.rows, operand(dy), w.const_data_ptr(), w.size(1), w.size(2), dx.mutable_data_ptr(), {}, launches.stream()));
  }
  if (want_w) {
    dw = at::empty(w.sizes(), w.options());
    launches.check(grouped_outer(sorted.rows, operand(dy), operand(x), w.size(1), w.size(2), nullptr, nullptr, dw.mutable_data_ptr(), launches.stream()));
  }
  return {dx, dw};
}

std::array<at::Tensor, 2> mlp_forward(const at::Tensor& x_nw, const at::Tensor& weights_nk, const at::Tensor& up_efw, const at::Tensor& down_ewf, const Dispatch& d) {
  const Launches launches("expert_mlp", x_nw);
  const at::Tensor x = unit_stride(x_nw.detach()), weights = weights_nk.detach().contiguous(), up = up_efw.detach().contiguous(), down = down_ewf.detach().contiguous();
  const int64_t M = d.slot_m.size(0), F = up.size(1), W = up.size(2);
  const Sorted sorted(launches, d.counts_e, M, x);
  at::Tensor u = at::empty({M, F}, x.options()), y = at::empty({M, W}, x.options());
  launches.check(grouped_product(sorted.rows, gathered(x, d.token_m), up.const_data_ptr(), F, W, u.mutable_data_ptr(), {}, launches.stream()));
  const Epilogue scaled{.scale = weights.const_data_ptr<float>(), .slot = d.slot_m.const_data_ptr<int64_t>(), .relu2_of = nullptr, .row_sums = nullptr};
  launches.check(grouped_product(sorted.rows, squared(u), down.const_data_ptr(), W, F, y.mutable_data_ptr(), scaled, launches.stream()));
  return {gpu_kernels()->sum_rows(y, {}, d.row_nk), u};
}

std::array<at::Tensor, 4> mlp_backward(const at::Tensor& x_nw, const at::Tensor& weights_nk, const at::Tensor& up_efw, const at::Tensor& down_ewf, const Dispatch& d, const at::Tensor& u,
                                       const at::Tensor& dout_nw) {
  const Launches launches("expert_mlp", x_nw);
  const at::Tensor x = unit_stride(x_nw), weights = weights_nk.contiguous(), up = up_efw.contiguous(), down = down_ewf.contiguous(), dout = unit_stride(dout_nw);
  const int64_t M = d.slot_m.size(0), F = up.size(1), W = up.size(2), tiles = column_tiles(F);
  const Sorted sorted(launches, d.counts_e, M, x);
  const float* const scale = weights.const_data_ptr<float>();
  const int64_t* const slot = d.slot_m.const_data_ptr<int64_t>();
  at::Tensor du = at::empty({M, F}, x.options()), row_sums = at::empty({tiles, M}, x.options().dtype(at::kFloat)), dweights = at::empty(weights.sizes(), weights.options());
  const Epilogue derivative{.scale = scale, .slot = slot, .relu2_of = u.const_data_ptr(), .row_sums = row_sums.mutable_data_ptr<float>()};
  launches.check(grouped_product_transposed(sorted.rows, gathered(dout, d.token_m), down.const_data_ptr(), W, F, du.mutable_data_ptr(), derivative, launches.stream()));
  launches.check(sum_row_tiles(row_sums.const_data_ptr<float>(), tiles, M, slot, dweights.mutable_data_ptr<float>(), launches.stream()));
  at::Tensor ddown = at::empty(down.sizes(), down.options()), dup = at::empty(up.sizes(), up.options()), dx = at::empty({M, W}, x.options());
  launches.check(grouped_outer(sorted.rows, gathered(dout, d.token_m), squared(u), W, F, scale, slot, ddown.mutable_data_ptr(), launches.stream()));
  launches.check(grouped_outer(sorted.rows, operand(du), gathered(x, d.token_m), F, W, nullptr, nullptr, dup.mutable_data_ptr(), launches.stream()));
  launches.check(grouped_product_transposed(sorted.rows, operand(du), up.const_data_ptr(), F, W, dx.mutable_data_ptr(), {}, launches.stream()));
  return {gpu_kernels()->sum_rows(dx, {}, d.row_nk), dweights, dup, ddown};
}

}  // namespace

void add_grouped_gemm(GpuKernels& table) {
  table.grouped_linear_forward = forward;
  table.grouped_linear_backward = backward;
  table.expert_mlp_forward = mlp_forward;
  table.expert_mlp_backward = mlp_backward;
}

}  // namespace tessera::gpu
