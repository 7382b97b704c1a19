#include "layers/gpu.hpp"

#include <atomic>

namespace tessera {
namespace {

std::atomic<const GpuKernels*>& table() {
  static std::atomic<const GpuKernels*> kernels{nullptr};
  return kernels;
}

}  // namespace

const GpuKernels* gpu_kernels() { return table().load(std::memory_order_acquire); }
void use_gpu_kernels(const GpuKernels* kernels) { table().store(kernels, std::memory_order_release); }

bool lies_on_gpu(const at::Tensor& t) {
  const GpuKernels* kernels = gpu_kernels();
  return kernels && kernels->takes(t);
}
bool on_gpu(const at::Tensor& x) {
  return lies_on_gpu(x) && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

}  // namespace tessera
