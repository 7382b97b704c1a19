// A group of ranks on a backend of c10d: Gloo between CPU processes, NCCL between GPUs.
#pragma once
#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "tessera/ranks.hpp"

namespace c10d {
class Backend;
class Store;
}  // namespace c10d
namespace gloo::transport {
class Device;
}

namespace tessera {

class Mailboxes;

// All collectives are the backend's own (NCCL).
std::unique_ptr<Group> make_backend_group(std::string name, std::vector<int64_t> ranks, int64_t rank, std::shared_ptr<Whereabouts> whereabouts,
                                          c10::intrusive_ptr<c10d::Backend> backend);
// Gathers, reduce-scatters (bf16 summed in fp32) and exchanges between each pair of ranks: through `boxes`, or, where that is nullptr, by the backend's sends (Gloo).
std::unique_ptr<Group> make_pairwise_group(std::string name, std::vector<int64_t> ranks, int64_t rank, std::shared_ptr<Whereabouts> whereabouts,
                                           c10::intrusive_ptr<c10d::Backend> backend, std::shared_ptr<Mailboxes> boxes);

// The network interface that Gloo listens on: of `host` (a name or an address), or, where that is empty, of GLOO_SOCKET_IFNAME or this machine's name.
std::shared_ptr<gloo::transport::Device> gloo_device(const std::string& host);
// Meets the other ranks of the group through `store`. Throws what c10d throws where they do not come in time.
c10::intrusive_ptr<c10d::Backend> gloo_backend(const c10::intrusive_ptr<c10d::Store>& store, int64_t rank, int64_t size,
                                               const std::shared_ptr<gloo::transport::Device>& device, std::chrono::milliseconds timeout);

// The same through NCCL: `device` is this rank's GPU, and only its tensors are exchanged. Throws Error(kUsage) in a build without CUDA.
c10::intrusive_ptr<c10d::Backend> nccl_backend(const c10::intrusive_ptr<c10d::Store>& store, int64_t rank, int64_t size, at::Device device, std::chrono::milliseconds timeout);

}  // namespace tessera
