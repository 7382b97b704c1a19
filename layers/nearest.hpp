// What the check of a block says of a value that breaks a rule.
#pragma once
#include <fmt/format.h>

#include <cstdint>
#include <string>

namespace tessera {

// "nearest: 4, 8": the closest positive values below and above `value` that are legal, of those at most 2^20 away; "" where there are none.
template <class Legal>
std::string nearest_legal(int64_t value, Legal legal) {
  constexpr int64_t kFarthest = int64_t{1} << 20, kLargest = int64_t{1} << 40;
  if (value < 1 || value > kLargest) return "";
  int64_t below = value - 1, above = value + 1;
  while (below > 0 && !legal(below)) below = value - below < kFarthest ? below - 1 : 0;
  while (above > 0 && !legal(above)) above = above - value < kFarthest ? above + 1 : 0;
  if (below > 0 && above > 0) return fmt::format("nearest: {}, {}", below, above);
  return below > 0 || above > 0 ? fmt::format("nearest: {}", below > 0 ? below : above) : "";
}

}  // namespace tessera
