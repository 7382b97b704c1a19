// Products of rows sorted by expert with each expert's matrix, on plain pointers: bf16 operands and results, fp32 sums.
// Letters: M sorted rows, N tokens, k experts a token, E experts; W, F the two widths of an expert.
#pragma once
#include "layers/cuda/types.hpp"

namespace tessera::gpu {

constexpr int kTileRows = 128;  // of a product's tile, in both directions

// Where each expert's rows and tiles of rows begin: both int32 [E + 1], on the device. Tile t of expert e holds its rows [128 t, 128 (t + 1)).
struct ExpertRows {
  const int32_t *first_row, *first_tile;
  int64_t E, M;
  int64_t most_tiles() const { return M / kTileRows + (E < M ? E : M); }  // whatever the counts are
};
// Both from counts int64 [E] on the device; counts beyond M in all are cut.
Status expert_rows(const int64_t* counts, int64_t E, int64_t M, int32_t* first_row, int32_t* first_tile, Stream stream);

// An operand: rows `stride` elements apart, each a run of consecutive elements. `row`: null, or int64 [M], the row that stands for a sorted row.
struct Operand {
  const void* data;
  int64_t stride;
  const int64_t* row;
  bool relu2;  // relu(x)^2, rounded to bf16, stands for x
};

// What is done with a product before it is rounded and stored.
struct Epilogue {
  const float* scale;    // null, or fp32 [N k]: sorted row m is multiplied by scale[slot[m]]
  const int64_t* slot;   // int64 [M]
  const void* relu2_of;  // null, or bf16 [M, columns]: u, and the product is multiplied by the derivative of relu(u)^2
  float* row_sums;       // with relu2_of, null or fp32 [column tiles, M]: sums over a tile's columns of the product, unscaled, times relu(u)^2
};

// out [M, O] = a's rows [M, I] of expert e times w[e] [O, I] transposed; w [E, O, I] contiguous.
Status grouped_product(const ExpertRows& rows, const Operand& a, const void* w, int64_t O, int64_t I, void* out, const Epilogue& epilogue, Stream stream);
// out [M, I] = a's rows [M, O] of expert e times w[e] [O, I].
Status grouped_product_transposed(const ExpertRows& rows, const Operand& a, const void* w, int64_t O, int64_t I, void* out, const Epilogue& epilogue, Stream stream);
// out [E, O, I] = sum over the expert's rows m of scale[slot[m]] a[m] [O] times b[m] [I]; zeros for an expert without rows.
Status grouped_outer(const ExpertRows& rows, const Operand& a, const Operand& b, int64_t O, int64_t I, const float* scale, const int64_t* slot, void* out, Stream stream);

// Rows of row_sums.
inline int64_t column_tiles(int64_t columns) { return (columns + kTileRows - 1) / kTileRows; }
// dweights[slot[m]] = sum over the tiles of row_sums[tile, m], tiles in order.
Status sum_row_tiles(const float* row_sums, int64_t tiles, int64_t M, const int64_t* slot, float* dweights, Stream stream);

}  // namespace tessera::gpu
