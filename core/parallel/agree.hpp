// Before the first collective: all ranks run the same program on the same configuration and data, or none does.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "parallel/mesh_groups.hpp"

namespace tessera {

// `facts`: names and values that must be equal on all ranks: build key, plugin files, data hash. A value of several lines is compared by lines, and a line
// of TOML is named by its table: "rank 2 (on host b) has training.lr = 2e-3, rank 0 (on host a) has 1e-3". Returns where all are equal, or in a world
// of one. Throws Error(kUsage) on every rank otherwise: rank 0's says what differs, the others' have no message.
void agree(const World& world, const std::vector<std::pair<std::string, std::string>>& facts);

}  // namespace tessera
