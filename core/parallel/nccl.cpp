// The only file that sees libtorch's NCCL backend; in a build without CUDA nothing asks for it.
#include "parallel/backend_group.hpp"
#include "tessera/error.hpp"

#ifdef TESSERA_CUDA
#define USE_DISTRIBUTED
#define USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

namespace tessera {

#ifdef TESSERA_CUDA

c10::intrusive_ptr<c10d::Backend> nccl_backend(const c10::intrusive_ptr<c10d::Store>& store, int64_t rank, int64_t size, at::Device device, std::chrono::milliseconds timeout) {
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  auto backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(store, static_cast<int>(rank), static_cast<int>(size), options);
  backend->setBoundDeviceId(device);
  return backend;
}

#else

c10::intrusive_ptr<c10d::Backend> nccl_backend(const c10::intrusive_ptr<c10d::Store>&, int64_t, int64_t, at::Device, std::chrono::milliseconds) {
  throw Error(ExitCode::kUsage, "this build of tessera has no NCCL, by which ranks on GPUs exchange", "build the preset release-cuda, or set training.device = \"cpu\"");
}

#endif

}  // namespace tessera
