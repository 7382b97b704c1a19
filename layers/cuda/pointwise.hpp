// Kernels that go from element to element, on plain pointers: activations, and numbers drawn by Philox4x32-10.
#pragma once
#include "layers/cuda/types.hpp"

namespace tessera::gpu {

// y = relu(x)^2, n elements; dx = 2 relu(x) dy.
Status relu2_forward(const void* x, void* y, int64_t n, Type type, Stream stream);
Status relu2_backward(const void* x, const void* dy, void* dx, int64_t n, Type type, Stream stream);

// Numbers [N, width] of the tokens token[n], columns from `first` on, in [0, 1): 24 bits each.
struct DrawShape {
  uint64_t key;
  const int64_t* token;
  int64_t N, width, first;
};
Status draw_uniform(const DrawShape& shape, float* out, Stream stream);
// x [N, width] contiguous: out = x / keep where the number is at least p, else 0.
Status draw_dropout(const DrawShape& shape, const void* x, void* out, Type type, float p, float keep, Stream stream);

}  // namespace tessera::gpu
