#include "train/setup.hpp"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <malloc.h>

#include <thread>

#include "memory/kept_blocks.hpp"
#include "metrics/machine.hpp"

namespace tessera {

at::Device choose_device(const std::string& device) {
  const bool cuda = at::globalContext().hasCUDA();
  if (device == "cuda" && !cuda)
    throw Error(ExitCode::kUsage, "training.device: cuda is asked for, but libtorch sees no CUDA device", "set training.device = \"cpu\" or \"auto\"");
  return device == "cuda" || (device == "auto" && cuda) ? at::Device(at::kCUDA, 0) : at::Device(at::kCPU);
}

at::ScalarType choose_dtype(const std::string& dtype, at::Device device) {
  if (dtype == "float32") return at::kFloat;
  if (dtype == "bfloat16") return at::kBFloat16;
  return device.is_cuda() || supports_fast_bf16() ? at::kBFloat16 : at::kFloat;
}

void apply_runtime(const TrainingConfig& training, int64_t local_size) {
  const auto cores = static_cast<int64_t>(std::thread::hardware_concurrency());
  at::set_num_threads(static_cast<int>(training.num_threads > 0 ? training.num_threads : std::max<int64_t>(cores / local_size, 1)));
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
