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

// `sums_itself`: the backend reduces in the tensors' dtype on its own (NCCL). Else a reduce-scatter is an exchange and a sum in rank order, bf16 in fp32.
std::unique_ptr<Group> make_backend_group(std::string name, std::vector<int64_t> ranks, int64_t rank, std::shared_ptr<Whereabouts> whereabouts,
                                          c10::intrusive_ptr<c10d::Backend> backend, bool sums_itself);

// The network interface that Gloo listens on: of `host` (a name or an address), or, where that is empty, of GLOO_SOCKET_IFNAME or this machine's name.
std::shared_ptr<gloo::transport::Device> gloo_device(const std::string& host);
// Meets the other ranks of the group through `store`. Throws what c10d throws where they do not come in time.
c10::intrusive_ptr<c10d::Backend> gloo_backend(const c10::intrusive_ptr<c10d::Store>& store, int64_t rank, int64_t size,
                                               const std::shared_ptr<gloo::transport::Device>& device, std::chrono::milliseconds timeout);

}  // namespace tessera
