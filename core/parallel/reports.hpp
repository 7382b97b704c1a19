// What ranks tell each other in names and numbers.
#pragma once
#include <nlohmann/json.hpp>

#include <optional>
#include <vector>

#include "tessera/ranks.hpp"

namespace tessera {

// Every rank's report, by rank of the group; this rank's is given as CBOR. `room`: bytes of each, which all fit into, alike on all ranks; nothing: as many
// as the largest takes, which costs one more reduction.
std::vector<nlohmann::json> gather_reports(const Group& group, at::Device device, const std::vector<uint8_t>& own, std::optional<int64_t> room = std::nullopt);

}  // namespace tessera
