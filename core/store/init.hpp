// Initial values: a counter-based generator, so that an element's value depends on (seed, tensor name, element index) only.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

#include "tessera/tables.hpp"

namespace tessera {

// Fills `out` (fp32, contiguous, CPU) with elements [begin, begin + out.numel()) of the tensor called `name`.
void fill_initial(at::Tensor& out, const Init& init, int64_t seed, std::string_view name, int64_t begin = 0);

}  // namespace tessera
