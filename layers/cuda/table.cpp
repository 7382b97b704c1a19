#include "layers/cuda/table.hpp"

namespace tessera::gpu {
namespace {

GpuKernels make_table() {
  GpuKernels table;
#ifdef TESSERA_SIMT
  table.takes = [](const at::Tensor& t) { return t.is_cpu(); };
#else
  table.takes = [](const at::Tensor& t) { return t.is_cuda(); };
#endif
  add_conv(table);
  add_norm(table);
  add_pointwise(table);
  add_routing(table);
  add_cross_entropy(table);
  add_adamw(table);
  add_scan(table);
  add_attention_cache(table);
  add_experts(table);
  add_grouped_gemm(table);
  return table;
}

const GpuKernels kTable = make_table();
[[maybe_unused]] const bool kGiven = (use_gpu_kernels(&kTable), true);

}  // namespace
}  // namespace tessera::gpu
