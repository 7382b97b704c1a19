// Sums of rows of partial results in a fixed order: how a gradient that is summed over tokens stays the same from run to run.
#pragma once
#include "layers/cuda/types.hpp"

namespace tessera::gpu {

// Column c of partials, fp32 [rows, columns], summed: into first[c] for c < columns_first, else into second[c - columns_first] (null: not wanted).
// The order of a sum depends on `rows` alone. Zero rows give zeros.
Status sum_partials(const float* partials, int64_t rows, int64_t columns, void* first, Type first_type, int64_t columns_first, void* second, Type second_type,
                    Stream stream);

}  // namespace tessera::gpu
