// Kernels of causal_conv1d, on plain pointers. N tokens, C channels, W taps.
#pragma once
#include "layers/cuda/types.hpp"

namespace tessera::gpu {

// Rows [begin, end) of the span [first, last). With a state: the span's slot, and whether it goes on from there instead of from zeros.
struct ConvPiece {
  int64_t begin, end, first, last, slot, resumes;
};

struct ConvInputs {
  const void* x;       // [N, C] in `type`, rows x_stride elements apart
  const void* weight;  // [C, W] contiguous, in `type` or fp32
  const void* bias;    // [C] in the weight's type, or null
  Type type, weight_type;
  int64_t C, W, x_stride;
  bool silu;
  const ConvPiece* pieces;  // on the device, in the order of the rows
  int64_t num_pieces;
};

// Rows of a piece: enough pieces to fill the device, and few rows (the W-1 before each piece) that two of them read. At least 16.
int64_t conv_piece_rows(int64_t N, int64_t C);
int64_t conv_backward_piece_rows(int64_t N, int64_t C);

// out [N, C] contiguous in x's type. state: null, or [slots, C, W-1] in x's type, read where a span resumes. Where every piece is a whole span
// (whole_spans) it is written too, else conv_state does that afterwards.
Status conv_forward(const ConvInputs& in, void* out, void* state, bool whole_spans, Stream stream);
// Writes the state of spans: `in.pieces` are whole spans.
Status conv_state(const ConvInputs& in, void* state, Stream stream);

// Rows of `partials`, each [C*W of the weight | C of the bias].
int64_t conv_groups(int64_t num_pieces, int64_t C);
// Floats of `scratch`: 0 for the widths that keep everything in registers.
int64_t conv_scratch(int64_t N, int64_t C, int64_t W);
// dx [N, C] contiguous in x's type; dout as x, rows dout_stride elements apart; partials fp32 [conv_groups, C * (W + 1)].
Status conv_backward(const ConvInputs& in, const void* dout, int64_t dout_stride, void* dx, float* partials, float* scratch, Stream stream);

}  // namespace tessera::gpu
