// Large CPU tensors take their memory from blocks that were freed before. malloc gives blocks of more than 32 MiB back to the system at once and
// fetches them anew, page by page: at 16,384 tokens a step that is half of its time.
#pragma once

#include <cstddef>

#include "memory/tensor_bytes.hpp"

namespace tessera {

// What may lie unused, as a part of the most that large tensors have held at once.
inline constexpr double kKeptShare = 0.25;

// From now on every CPU tensor of at least 1 MiB lives in a block that is kept when it is freed. Held and kept together stay below
// 1 + kKeptShare times the most that was held at once: before they would not, the blocks freed longest ago go back to the system. Safe to call again.
// Where the system has no memory left, an allocation throws Error(kRuntime) with the numbers.
void keep_large_blocks();

// What large tensors hold now, the most they held at once, and what is kept beside them, in bytes.
struct LargeBlocks {
  std::size_t held = 0, most = 0, kept = 0;
};
LargeBlocks large_blocks();

// What CPU tensors of any size hold now, and the most they held at once since it was last forgotten, in bytes. Nothing before keep_large_blocks().
TensorBytes cpu_tensor_bytes();
void forget_most_cpu_tensor_bytes();

// Gives back what is kept, small blocks included, and forgets the most that was held: what comes next takes memory as in a new process.
void release_kept_blocks();

}  // namespace tessera
