// What a configuration means on this machine: device, compute dtype, threads, determinism.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "config/config.hpp"
#include "parallel/mesh_groups.hpp"

namespace tessera {

// auto takes a GPU when libtorch sees one; of several that with this number. Throws Error(kUsage) when cuda is asked for and there is none, or too few.
at::Device choose_device(const std::string& device, int64_t local_rank = 0);
// Where there are ranks, the device whose tensors they exchange. Throws Error(kUsage) where the configuration asks for another kind.
at::Device choose_device(const std::string& device, const MeshGroups* ranks);
// auto takes bfloat16 where a small product is faster in it than in fp32, which is measured, never assumed.
at::ScalarType choose_dtype(const std::string& dtype, at::Device device);
// The same on all ranks: bfloat16 where it is faster on any of them.
at::ScalarType choose_dtype(const std::string& dtype, at::Device device, const MeshGroups* ranks);
// Of one of `local_size` processes on this machine.
int64_t num_threads(const TrainingConfig& training, int64_t local_size = 1);
// Threads and deterministic algorithms of this process, one of `local_size` on this machine.
void apply_runtime(const TrainingConfig& training, int64_t local_size = 1);
// The bindings that Model recomputes: none, the named ones, or {"*"} for all.
std::vector<std::string> recomputed_bindings(const ActivationCheckpointConfig& config);
// "float32", "bfloat16".
std::string dtype_name(at::ScalarType dtype);

}  // namespace tessera
