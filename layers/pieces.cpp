#include "layers/pieces.hpp"

#include <ATen/ops/cat.h>
#include <fmt/format.h>

#include <algorithm>

#include "layers/collectives.hpp"
#include "tessera/error.hpp"

namespace tessera {

std::vector<Piece> pieces_of(const ContextCut& cut) {
  const auto& rows = cut.whole().rows();
  std::vector<Piece> pieces;
  for (const ContextCut::Chunk& chunk : cut.chunks()) {
    Piece piece{.rank = chunk.rank, .local = chunk.local, .length = chunk.length()};
    if (piece.length > 0) {
      const auto first = std::upper_bound(rows.begin(), rows.end(), chunk.begin), last = std::lower_bound(rows.begin(), rows.end(), chunk.end);
      piece.before = chunk.begin - *(first - 1);
      if (piece.before > 0) piece.head = std::min(chunk.end, *first) - chunk.begin;
      if (*last > chunk.end) piece.tail = chunk.end - std::max(chunk.begin, *(last - 1));
    }
    pieces.push_back(piece);
  }
  return pieces;
}

void require_pieces(const char* op, const Context& ctx, const at::Tensor& x_n, bool with_state) {
  const int64_t n = ctx.cut()->num_tokens(ctx.cut()->rank());
  if (with_state) throw Error(ExitCode::kRuntime, fmt::format("[{}] a decode state belongs to whole documents, but context-parallel rank {} holds pieces", op, ctx.cut()->rank()));
  if (x_n.dim() < 1 || x_n.size(0) != n || ctx.spans().num_tokens() != n)
    throw Error(ExitCode::kRuntime, fmt::format("[{}] context-parallel rank {} holds {} rows of the micro-batch, got {} rows and spans of {}", op, ctx.cut()->rank(), n,
                                                x_n.dim() < 1 ? 0 : x_n.size(0), ctx.spans().num_tokens()));
}

RowsBefore::RowsBefore(const Context& ctx, const at::Tensor& x_n, int64_t reach)
    : rank_(ctx.cut()->rank()), reach_(reach), pieces_(pieces_of(*ctx.cut())), end_rows_(pieces_.size()) {
  const int64_t ranks = ctx.cut()->num_ranks();
  const auto sends = [&](const Piece& piece) { return std::min(reach_, piece.tail); };
  std::vector<int64_t> rows(static_cast<size_t>(ranks), 0);
  for (int64_t rank = 0, row = 0; rank < ranks; ++rank)
    for (const int64_t number : {rank, 2 * ranks - 1 - rank}) {
      const int64_t n = sends(pieces_[static_cast<size_t>(number)]);
      rows[static_cast<size_t>(rank)] += n;
      end_rows_[static_cast<size_t>(number)] = row += n;
    }
  std::vector<at::Tensor> ends;
  for (const int64_t which : {0, 1}) {
    const Piece& piece = own(which);
    ends.push_back(x_n.narrow(0, piece.local + piece.length - sends(piece), sends(piece)));
  }
  ends_ = gather_rows(at::cat(ends, 0), rows, ctx.context_group());
}

at::Tensor RowsBefore::operator()(int64_t which) const {
  std::vector<at::Tensor> parts{none()};
  int64_t missing = count(which);
  for (int64_t j = number(which) - 1; missing > 0; --j) {
    const int64_t n = std::min(missing, pieces_[static_cast<size_t>(j)].tail);
    if (n > 0) parts.push_back(ends_.narrow(0, end_rows_[static_cast<size_t>(j)] - n, n));
    missing -= n;
  }
  std::reverse(parts.begin(), parts.end());
  return at::cat(parts, 0);
}

}  // namespace tessera
