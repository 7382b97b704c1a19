// A block sums 32 columns: 8 slices of the rows, each in order, then the slices in order.
#include "layers/cuda/partial_sums.hpp"

#include "layers/cuda/launch.hpp"

namespace tessera::gpu {
namespace {

constexpr int kColumns = 32, kSlices = 8;

__global__ void __launch_bounds__(kColumns * kSlices) partial_sums(const float* partials, int64_t rows, int64_t columns, void* first, Type first_type,
                                                                   int64_t columns_first, void* second, Type second_type) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % kColumns, slice = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kColumns + lane;
  float sum = 0;
  if (c < columns) {
    const int64_t end = rows * (slice + 1) / kSlices;
#pragma unroll 4
    for (int64_t r = rows * slice / kSlices; r < end; ++r) sum += partials[r * columns + c];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice > 0 || c >= columns) return;
  for (int s = 1; s < kSlices; ++s) sum += sums[s * kColumns + lane];
  const bool to_first = c < columns_first;
  void* to = to_first ? first : second;
  if (!to) return;
  const int64_t at = to_first ? c : c - columns_first;
  if ((to_first ? first_type : second_type) == Type::kFloat) static_cast<float*>(to)[at] = sum;
  else static_cast<bf16*>(to)[at] = from_float<bf16>(sum);
}

}  // namespace

Status sum_partials(const float* partials, int64_t rows, int64_t columns, void* first, Type first_type, int64_t columns_first, void* second, Type second_type,
                    Stream stream) {
  return launch(partial_sums, dim3(static_cast<unsigned>(ceil_div(columns, kColumns))), dim3(kColumns * kSlices), kColumns * kSlices * sizeof(float), stream,
                partials, rows, columns, first, first_type, columns_first, second, second_type);
}

}  // namespace tessera::gpu
