#include "parallel/reports.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace tessera {

using nlohmann::json;

std::vector<json> gather_reports(const Group& group, at::Device device, const std::vector<uint8_t>& own, std::optional<int64_t> room) {
  if (!room) {
    const at::Tensor most = at::full({1}, static_cast<int64_t>(own.size()), at::TensorOptions(at::kLong).device(device));
    group.all_reduce(most, Reduce::kMax);
    room = most.item<int64_t>();
  }
  at::Tensor text = at::zeros({*room}, at::kByte), all = at::empty({*room * group.size()}, at::TensorOptions(at::kByte).device(device));
  std::copy(own.begin(), own.end(), text.mutable_data_ptr<uint8_t>());
  group.all_gather(all, text.to(device));
  const at::Tensor host = all.to(at::kCPU);
  std::vector<json> reports;
  for (int64_t r = 0; r < group.size(); ++r) {
    const uint8_t* from = host.const_data_ptr<uint8_t>() + r * *room;
    reports.push_back(json::from_cbor(from, from + *room, /*strict=*/false));
  }
  return reports;
}

}  // namespace tessera
