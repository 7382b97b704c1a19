// Kernels of ssd_scan, on plain pointers. N tokens, H heads of P channels, G groups with state size S, M chunks of at most Q tokens of one span.
// Arrays a chunk, head and token are [M, H, Q] in fp32; states are [M, H, P, S] in the type of xbc.
#pragma once
#include "layers/cuda/types.hpp"

namespace tessera::gpu {

// Rows [row, row + length) and their place in the span. Chunks of a span lie end to end.
struct ScanChunk {
  int64_t row, length, first, last;
};
// Chunks [first, first + count); with a decode state its slot, and whether the span goes on from there instead of from zeros.
struct ScanSpan {
  int64_t first, count, slot, resumes;
};

struct ScanInputs {
  const void* xbc;  // [N, H*P + 2*G*S] in `type`, rows xbc_stride elements apart
  const void* dt;   // [N, H] in dt_type, rows dt_stride elements apart
  const float *dt_bias, *A_log, *D;  // [H]
  Type type, dt_type;
  int64_t H, P, G, S, xbc_stride, dt_stride;
  float dt_min, dt_max;
  const ScanChunk* chunks;  // on the device
  const ScanSpan* spans;    // on the device
  int64_t num_chunks, num_spans;
  bool wide;                // scan_wide
  float *step, *decay;  // [M, H, Q]: d, and the sum over the chunk's tokens up to this one of d A log2(e); written by scan_steps
};

int64_t scan_chunk(Type type);  // Q
// Whether all accesses may be of 16 bytes; `other`: one more pointer that is read or written, or null.
bool scan_wide(const ScanInputs& in, const void* other);

// d and the decays of every token; past a chunk's end d = 0 and the decay stays.
Status scan_steps(const ScanInputs& in, Stream stream);
// What every chunk adds to the state: sum over its tokens of exp(decay to its end) d x B^T.
Status scan_states(const ScanInputs& in, void* states, Stream stream);
// In place: what chunks add -> the states that enter them. state: null, or fp32 [slots, H, P, S], read and written.
Status scan_pass(const ScanInputs& in, void* states, float* state, Stream stream);
// y [N, H*P] in `type` from the states that enter.
Status scan_outputs(const ScanInputs& in, const void* entering, void* y, Stream stream);

// The gradients. dy [N, H*P] contiguous in `type`. What the gradient of dt takes: rows, columns [1 + scan_slices, M, H, Q]: a token's sum over the pairs
// with others that it reads (is read by), then its products with the entering state (the gradient of the leaving one), one for each part of S;
// ends [M, H, scan_end_parts]: parts of the product of those two states; gaps [M, H, scan_gap_parts]: parts of the sum of the pairs, each times its decay
// in log2; diagonal and own [M, H, Q]: dy x and dy x B C of a token with itself.
struct ScanSums {
  float *rows, *columns, *ends, *gaps, *diagonal, *own;
};
int64_t scan_slices(Type type, int64_t S);
int64_t scan_end_parts(const ScanInputs& in);
int64_t scan_gap_parts(Type type);
// The gradients of the states that leave the chunks; writes `ends`.
Status scan_gradient_states(const ScanInputs& in, const void* dy, const void* entering, void* leaving, const ScanSums& sums, Stream stream);
// dx into the first H*P columns of dxbc [N, H*P + 2*G*S], contiguous in `type`.
Status scan_gradient_x(const ScanInputs& in, const void* dy, const void* leaving, void* dxbc, Stream stream);
// dB and dC into the columns that follow; writes the sums but `ends`.
Status scan_gradient_bc(const ScanInputs& in, const void* dy, const void* entering, const void* leaving, void* dxbc, const ScanSums& sums, Stream stream);
// ddt [N, H] contiguous in dt_type, partials fp32 [M, 3 H]: of dt_bias, A_log and D.
Status scan_gradient_steps(const ScanInputs& in, const ScanSums& sums, void* ddt, float* partials, Stream stream);

// One token a span: the state moves on in its slot. y [spans, H*P] in `type`. `slots`: int64 [spans, 2] slot and whether the span resumes.
Status scan_step(const ScanInputs& in, const int64_t* slots, float* state, void* y, Stream stream);

}  // namespace tessera::gpu
