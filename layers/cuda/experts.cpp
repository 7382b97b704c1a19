// Dispatch to experts on the GPU: tensors to pointers.
#include "layers/cuda/experts.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "layers/cuda/table.hpp"
#include "layers/cuda/tensors.hpp"

namespace tessera::gpu {
namespace {

std::array<at::Tensor, 4> dispatch(const at::Tensor& indices_nk, int64_t num_experts) {
  const Launches launches("dispatch", indices_nk);
  const at::Tensor indices = indices_nk.contiguous();
  const auto M = indices.numel();
  const auto longs = indices.options(), ints = indices.options().dtype(at::kInt);
  at::Tensor counts = at::empty({num_experts}, longs), slot = at::empty({M}, longs), token = at::empty({M}, longs), row = at::empty_like(indices);
  at::Tensor scratch = at::empty({dispatch_scratch(M, num_experts)}, ints), first_row = at::empty({num_experts + 1}, ints);
  launches.check(gpu::dispatch(indices.const_data_ptr<int64_t>(), M, std::max<int64_t>(1, indices.size(1)), num_experts, scratch.mutable_data_ptr<int32_t>(), first_row.mutable_data_ptr<int32_t>(),
                          counts.mutable_data_ptr<int64_t>(), slot.mutable_data_ptr<int64_t>(), token.mutable_data_ptr<int64_t>(), row.mutable_data_ptr<int64_t>(), launches.stream()));
  return {counts, slot, token, row};
}

at::Tensor take_rows(const at::Tensor& x_nd, const at::Tensor& token_m) {
  const Launches launches("permute_tokens", x_nd);
  const at::Tensor x = x_nd.contiguous();
  at::Tensor y = at::empty({token_m.size(0), x.size(1)}, x.options());
  launches.check(gpu::take_rows(x.const_data_ptr(), token_m.const_data_ptr<int64_t>(), y.mutable_data_ptr(), type_of(x), y.size(0), y.size(1), launches.stream()));
  return y;
}

at::Tensor sum_rows(const at::Tensor& y_md, const at::Tensor& w_nk, const at::Tensor& row_nk) {
  const Launches launches("combine_tokens", y_md);
  const at::Tensor y = y_md.contiguous();
  at::Tensor out = at::empty({row_nk.size(0), y.size(1)}, y.options());
  launches.check(gpu::sum_rows(y.const_data_ptr(), w_nk.defined() ? w_nk.const_data_ptr<float>() : nullptr, row_nk.const_data_ptr<int64_t>(), out.mutable_data_ptr(), type_of(y), out.size(0),
                          row_nk.size(1), out.size(1), launches.stream()));
  return out;
}

at::Tensor spread_rows(const at::Tensor& dout_nd, const at::Tensor& w_nk, const at::Tensor& row_nk) {
  const Launches launches("combine_tokens", dout_nd);
  const at::Tensor dout = dout_nd.contiguous();
  at::Tensor dy = at::empty({row_nk.numel(), dout.size(1)}, dout.options());
  launches.check(gpu::spread_rows(dout.const_data_ptr(), w_nk.const_data_ptr<float>(), row_nk.const_data_ptr<int64_t>(), dy.mutable_data_ptr(), type_of(dout), dout.size(0), row_nk.size(1),
                             dout.size(1), launches.stream()));
  return dy;
}

at::Tensor row_products(const at::Tensor& dout_nd, const at::Tensor& y_md, const at::Tensor& row_nk) {
  const Launches launches("combine_tokens", dout_nd);
  const at::Tensor dout = dout_nd.contiguous(), y = y_md.contiguous();
  at::Tensor dw = at::empty(row_nk.sizes(), y.options().dtype(at::kFloat));
  launches.check(gpu::row_products(dout.const_data_ptr(), y.const_data_ptr(), row_nk.const_data_ptr<int64_t>(), dw.mutable_data_ptr<float>(), type_of(y), dout.size(0), row_nk.size(1), y.size(1),
                              launches.stream()));
  return dw;
}

}  // namespace

void add_experts(GpuKernels& table) {
  table.dispatch = dispatch;
  table.take_rows = take_rows;
  table.sum_rows = sum_rows;
  table.spread_rows = spread_rows;
  table.row_products = row_products;
}

}  // namespace tessera::gpu
