// What tensors hold of a device's memory.
#pragma once
#include <c10/core/Device.h>

#include <cstdint>

namespace tessera {

// Bytes now, and the most at once since it was last forgotten. Of this process; on the CPU small tensors are counted by the block that malloc gives them.
struct TensorBytes {
  int64_t now = 0, most = 0;
};
TensorBytes tensor_bytes(c10::Device device);
void forget_most_tensor_bytes(c10::Device device);

}  // namespace tessera
