// Moving small things to where a model computes.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace tessera {

// `host` on the device; itself where it is there. To a GPU by pinned memory, in the order of its stream, so that the host waits for nothing.
at::Tensor to_device(const at::Tensor& host, at::Device device);
// int64 [values]
at::Tensor to_device(const std::vector<int64_t>& values, at::Device device);

}  // namespace tessera
