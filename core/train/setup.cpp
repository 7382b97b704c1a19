#include "train/setup.hpp"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <fmt/format.h>
#include <malloc.h>

#include <thread>

#include "memory/kept_blocks.hpp"
#include "metrics/machine.hpp"

namespace tessera {

at::Device choose_device(const std::string& device, int64_t local_rank) {
  const bool cuda = at::globalContext().hasCUDA();
  if (device == "cuda" && !cuda)
    throw Error(ExitCode::kUsage, "training.device: cuda is asked for, but libtorch sees no CUDA device", "set training.device = \"cpu\" or \"auto\"");
  if (!(device == "cuda" || (device == "auto" && cuda))) return at::kCPU;
  const auto gpus = static_cast<int64_t>(at::getNumGPUs());
  if (local_rank >= gpus)
    throw Error(ExitCode::kUsage, fmt::format("training.device: local rank {} has no GPU of its own, this machine has {}", local_rank, gpus),
                "start as many ranks on a machine as it has GPUs, or set training.device = \"cpu\"");
  return {at::kCUDA, static_cast<at::DeviceIndex>(local_rank)};
}

at::Device choose_device(const std::string& device, const MeshGroups* ranks) {
  if (!ranks) return choose_device(device);
  const at::Device compute = ranks->world().compute;
  if (device != "auto" && device != c10::DeviceTypeName(compute.type(), /*lower_case=*/true))
    throw Error(ExitCode::kUsage, fmt::format("training.device: {} is asked for, but the ranks exchange tensors of {}", device, compute.str()), "add --set training.device=auto");
  return compute;
}

at::ScalarType choose_dtype(const std::string& dtype, at::Device device) {
  if (dtype == "float32") return at::kFloat;
  if (dtype == "bfloat16") return at::kBFloat16;
  return device.is_cuda() || supports_fast_bf16() ? at::kBFloat16 : at::kFloat;
}

at::ScalarType choose_dtype(const std::string& dtype, at::Device device, const MeshGroups* ranks) {
  const at::ScalarType own = choose_dtype(dtype, device);
  if (!ranks || !ranks->all() || dtype != "auto") return own;
  ranks->whereabouts().place = "the choice of a dtype";
  const at::Tensor bf16 = at::full({1}, own == at::kBFloat16 ? 1 : 0, at::TensorOptions(at::kInt).device(device));
  ranks->all()->all_reduce(bf16, Reduce::kMax);
  return bf16.item<int>() ? at::kBFloat16 : at::kFloat;
}

int64_t num_threads(const TrainingConfig& training, int64_t local_size) {
  const auto cores = static_cast<int64_t>(std::thread::hardware_concurrency());
  return training.num_threads > 0 ? training.num_threads : std::max<int64_t>(cores / local_size, 1);
}

void apply_runtime(const TrainingConfig& training, int64_t local_size) {
  at::set_num_threads(static_cast<int>(num_threads(training, local_size)));
  keep_large_blocks();
  // The same for operators' scratch and small tensors.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  at::globalContext().setDeterministicAlgorithms(training.deterministic, false);
  at::globalContext().setDeterministicFillUninitializedMemory(false);
  if (training.deterministic) setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 0);
}

std::vector<std::string> recomputed_bindings(const ActivationCheckpointConfig& config) {
  if (config.mode == "full") return {"*"};
  return config.mode == "selective" ? config.block_types : std::vector<std::string>{};
}

std::string dtype_name(at::ScalarType dtype) { return dtype == at::kBFloat16 ? "bfloat16" : "float32"; }

}  // namespace tessera
