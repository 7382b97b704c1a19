// relu2, uniform and dropout on the GPU: tensors to pointers.
#include "layers/cuda/pointwise.hpp"

#include <ATen/ops/empty.h>

#include "layers/cuda/table.hpp"
#include "layers/cuda/tensors.hpp"

namespace tessera::gpu {
namespace {

at::Tensor like(const at::Tensor& x) { return at::empty(x.sizes(), x.options()); }

at::Tensor forward(const at::Tensor& x) {
  const Launches launches("relu2", x);
  const at::Tensor from = x.contiguous();
  at::Tensor y = like(x);
  launches.check(relu2_forward(from.const_data_ptr(), y.mutable_data_ptr(), x.numel(), type_of(x), launches.stream()));
  return y;
}

at::Tensor backward(const at::Tensor& x, const at::Tensor& dy) {
  const Launches launches("relu2", x);
  const at::Tensor from = x.contiguous(), gradient = dy.contiguous();
  at::Tensor dx = like(x);
  launches.check(relu2_backward(from.const_data_ptr(), gradient.const_data_ptr(), dx.mutable_data_ptr(), x.numel(), type_of(x), launches.stream()));
  return dx;
}

DrawShape shape_of(uint64_t key, const at::Tensor& token_n, int64_t width, int64_t first) {
  return {.key = key, .token = token_n.const_data_ptr<int64_t>(), .N = token_n.numel(), .width = width, .first = first};
}

at::Tensor uniform(uint64_t key, const at::Tensor& token_n, int64_t width, int64_t first) {
  const Launches launches("uniform", token_n);
  const at::Tensor token = token_n.contiguous();
  at::Tensor out = at::empty({token.numel(), width}, token.options().dtype(at::kFloat));
  launches.check(draw_uniform(shape_of(key, token, width, first), out.mutable_data_ptr<float>(), launches.stream()));
  return out;
}

at::Tensor dropout(const at::Tensor& x_nw, uint64_t key, const at::Tensor& token_n, int64_t first, double p) {
  const Launches launches("dropout", x_nw);
  const at::Tensor x = x_nw.contiguous(), token = token_n.contiguous();
  at::Tensor out = like(x);
  launches.check(draw_dropout(shape_of(key, token, x.size(1), first), x.const_data_ptr(), out.mutable_data_ptr(), type_of(x), static_cast<float>(p),
                              static_cast<float>(1 - p), launches.stream()));
  return out;
}

}  // namespace

void add_pointwise(GpuKernels& table) {
  table.relu2_forward = forward;
  table.relu2_backward = backward;
  table.uniform = uniform;
  table.dropout = dropout;
}

}  // namespace tessera::gpu
