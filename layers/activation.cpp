#include "layers/activation.hpp"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include "layers/gpu.hpp"
#include "layers/vector_math.hpp"

namespace tessera {
namespace {

using vec::load;
using vec::store;

constexpr int64_t kGrain = 1 << 15;

template <class T>
void forward_loop(const T* x, T* y, int64_t n) {
  at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float v = load(x + i), r = v < 0 ? 0.f : v;
      store(y + i, r * r);
    }
  });
}

template <class T>
void backward_loop(const T* x, const T* dy, T* dx, int64_t n) {
  at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float v = load(x + i), r = v < 0 ? 0.f : v;
      store(dx + i, 2.f * r * load(dy + i));
    }
  });
}

template <class T>
T* data(const at::Tensor& t) { return static_cast<T*>(t.data_ptr()); }

struct Relu2 : torch::autograd::Function<Relu2> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x) {
    ctx->save_for_backward({x});
    if (on_gpu(x)) return gpu_kernels()->relu2_forward(x);
    auto y = at::empty_like(x);
    if (x.scalar_type() == at::kFloat) forward_loop(data<float>(x), data<float>(y), x.numel());
    else forward_loop(data<c10::BFloat16>(x), data<c10::BFloat16>(y), x.numel());
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto x = ctx->get_saved_variables()[0];
    if (on_gpu(x)) return {gpu_kernels()->relu2_backward(x, grads[0])};
    const auto dy = grads[0].contiguous();
    auto dx = at::empty_like(x);
    if (x.scalar_type() == at::kFloat) backward_loop(data<float>(x), data<float>(dy), data<float>(dx), x.numel());
    else backward_loop(data<c10::BFloat16>(x), data<c10::BFloat16>(dy), data<c10::BFloat16>(dx), x.numel());
    return {dx};
  }
};

}  // namespace

at::Tensor relu2(const at::Tensor& x) {
  if ((!on_gpu(x) && !x.is_cpu()) || (x.scalar_type() != at::kFloat && x.scalar_type() != at::kBFloat16)) return relu2_ref(x);
  return Relu2::apply(x.contiguous());
}

}  // namespace tessera
