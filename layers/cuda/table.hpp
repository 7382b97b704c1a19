// The entries of the table of GPU kernels, one function an operator. Internal to layers/cuda.
#pragma once
#include "layers/gpu.hpp"

namespace tessera::gpu {

void add_conv(GpuKernels& table);
void add_norm(GpuKernels& table);
void add_pointwise(GpuKernels& table);
void add_routing(GpuKernels& table);
void add_cross_entropy(GpuKernels& table);
void add_adamw(GpuKernels& table);
void add_scan(GpuKernels& table);
void add_attention_cache(GpuKernels& table);
void add_experts(GpuKernels& table);
void add_grouped_gemm(GpuKernels& table);

}  // namespace tessera::gpu
