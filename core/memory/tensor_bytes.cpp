#include "memory/tensor_bytes.hpp"

#include <c10/core/CachingDeviceAllocator.h>

#include "memory/kept_blocks.hpp"

namespace tessera {

TensorBytes tensor_bytes(c10::Device device) {
  if (device.is_cpu()) return cpu_tensor_bytes();
  const auto stats = at::getDeviceAllocator(device.type())->getDeviceStats(device.index());
  const auto& all = stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
  return {all.current, all.peak};
}

void forget_most_tensor_bytes(c10::Device device) {
  if (device.is_cpu()) forget_most_cpu_tensor_bytes();
  else at::getDeviceAllocator(device.type())->resetPeakStats(device.index());
}

}  // namespace tessera
