// What operators exchange where a rank's rows are pieces of documents: the ends of its chunks. Differentiable; see the rule in tessera/ranks.hpp.
// Every rank of the context group makes the same calls in the same order, with or without tokens.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "tessera/context.hpp"

namespace tessera {

// A chunk of a ContextCut and the documents that it cuts.
struct Piece {
  int64_t rank = 0, local = 0, length = 0;  // who holds it, its first row there, its rows
  int64_t before = 0;                       // tokens in earlier chunks of the document that its first row belongs to
  int64_t head = 0;                         // its rows of that document, where before > 0
  int64_t tail = 0;                         // its rows of the document that goes on in a later chunk
  bool through() const { return before > 0 && tail > 0 && tail == length; }  // that document neither begins nor ends here
};
// In the order of rows, as ContextCut::chunks().
std::vector<Piece> pieces_of(const ContextCut& cut);

// Throws Error(kRuntime) that names the operator when x_n has not the rows of ctx.cut(), or when there is a decode state.
void require_pieces(const char* op, const Context& ctx, const at::Tensor& x_n, bool with_state);

// The last `reach` rows of what every chunk holds of a document that goes on, gathered over the context-parallel ranks.
class RowsBefore {
 public:
  // x_n [n, ...]: the rows of this rank. reach >= 0, the same on every rank.
  RowsBefore(const Context& ctx, const at::Tensor& x_n, int64_t reach);
  // The last min(reach, before) rows of its document that lie before this rank's first (0) or second (1) chunk, [rows, ...].
  at::Tensor operator()(int64_t which) const;
  int64_t count(int64_t which) const { return std::min(reach_, own(which).before); }
  const Piece& own(int64_t which) const { return pieces_[static_cast<size_t>(number(which))]; }
  // [0, ...]: joined to a result, it keeps a rank that needs nothing in the exchange of gradients.
  at::Tensor none() const { return ends_.narrow(0, 0, 0); }

 private:
  int64_t number(int64_t which) const { return which == 0 ? rank_ : static_cast<int64_t>(pieces_.size()) - 1 - rank_; }
  int64_t rank_, reach_;
  std::vector<Piece> pieces_;
  std::vector<int64_t> end_rows_;  // where the gathered rows of every chunk end
  at::Tensor ends_;
};

}  // namespace tessera
