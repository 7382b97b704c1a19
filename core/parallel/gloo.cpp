// The only file that sees libtorch's Gloo backend. The wheel has no Gloo headers: gloo_declarations/ declares what ProcessGroupGloo.hpp names.
#define USE_DISTRIBUTED
#define USE_C10D_GLOO
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <cstdlib>

#include "parallel/backend_group.hpp"

namespace tessera {

std::shared_ptr<gloo::transport::Device> gloo_device(const std::string& host) {
  if (!host.empty()) return c10d::ProcessGroupGloo::createDeviceForHostname(host);
  if (const char* interface = std::getenv("GLOO_SOCKET_IFNAME"); interface && *interface) return c10d::ProcessGroupGloo::createDeviceForInterface(interface);
  return c10d::ProcessGroupGloo::createDefaultDevice();
}

c10::intrusive_ptr<c10d::Backend> gloo_backend(const c10::intrusive_ptr<c10d::Store>& store, int64_t rank, int64_t size,
                                               const std::shared_ptr<gloo::transport::Device>& device, std::chrono::milliseconds timeout) {
  auto options = c10d::ProcessGroupGloo::Options::create(timeout);
  options->devices = {device};
  return c10::make_intrusive<c10d::ProcessGroupGloo>(store, static_cast<int>(rank), static_cast<int>(size), options);
}

}  // namespace tessera
