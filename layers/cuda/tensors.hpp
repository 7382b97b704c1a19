// What the tensor side of kernels shares: the stream to launch on, and lists that the host makes of the spans.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <array>
#include <functional>
#include <vector>

#include "layers/cuda/types.hpp"
#include "tessera/device.hpp"

namespace tessera::gpu {

// Launches of `op` on the device and the current stream of `like`. check() throws Error(kRuntime) that names the operator.
class Launches {
 public:
  Launches(const char* op, const at::Tensor& like);
  Stream stream() const { return stream_; }
  void check(Status status) const;

 private:
  const char* op_;
  c10::DeviceGuard guard_;
  Stream stream_;
};

// fp32 or bf16.
Type type_of(const at::Tensor& t);
// t itself where its rows are runs of consecutive elements, else a contiguous copy.
at::Tensor unit_stride(const at::Tensor& t);

// Sums the rows of fp32 partials [r, c] in a fixed order: the first columns are the gradient of `first`, those that follow of `second` (undefined: not wanted).
std::array<at::Tensor, 2> sum_partials(const Launches& launches, const at::Tensor& partials_rc, const at::Tensor& first, const at::Tensor& second = {});

// int64 values on the device of `like`, made by `make` the first time that `rows` and `key` come up: layers and passes that see the same spans share
// one copy, and only the first of them sends anything. `key` tells lists for different uses apart.
at::Tensor device_list(const char* use, int64_t key, const std::vector<int64_t>& rows, const at::Tensor& like, const std::function<std::vector<int64_t>()>& make);

}  // namespace tessera::gpu
