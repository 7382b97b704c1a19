// Kernels that move tokens to experts and back, on plain pointers.
// Letters: N tokens, k experts a token, M = N k slots and sorted rows, E experts, D width.
#pragma once
#include "layers/cuda/types.hpp"

namespace tessera::gpu {

// int32 of scratch that dispatch needs.
int64_t dispatch_scratch(int64_t M, int64_t E);
// Sorts slots by expert, each expert's in order: indices int64 [N, k], k and all that follows as in layers/experts.hpp's Dispatch. Indices outside of [0, E) are
// taken for the nearest inside. first_row int32 [E + 1] on the device.
Status dispatch(const int64_t* indices, int64_t M, int64_t k, int64_t E, int32_t* scratch, int32_t* first_row, int64_t* counts, int64_t* slot, int64_t* token, int64_t* row, Stream stream);

// Rows contiguous, in `type`; weights fp32 [N, k].
// y[m] = x[token[m]]
Status take_rows(const void* x, const int64_t* token, void* y, Type type, int64_t M, int64_t D, Stream stream);
// out[n] = sum_j weights[n, j] y[row[n, j]], j ascending, in fp32; weights null: ones.
Status sum_rows(const void* y, const float* weights, const int64_t* row, void* out, Type type, int64_t N, int64_t k, int64_t D, Stream stream);
// dy[row[n, j]] = weights[n, j] dout[n]
Status spread_rows(const void* dout, const float* weights, const int64_t* row, void* dy, Type type, int64_t N, int64_t k, int64_t D, Stream stream);
// dweights[n, j] = <dout[n], y[row[n, j]]>
Status row_products(const void* dout, const void* y, const int64_t* row, float* dweights, Type type, int64_t N, int64_t k, int64_t D, Stream stream);

}  // namespace tessera::gpu
