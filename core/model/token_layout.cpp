#include "model/token_layout.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>

#include "layers/collectives.hpp"
#include "tessera/device.hpp"

namespace tessera {

namespace {

std::vector<int64_t> shard_rows(int64_t n, int64_t degree) {
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < degree; ++r) {
    const Range range = sequence_range(n, degree, r);
    rows.push_back(range.end - range.begin);
  }
  return rows;
}

}  // namespace

TokenLayout::TokenLayout(const Spans& whole, const MeshGroups* groups) : whole_(&whole), groups_(groups) {
  if (!groups) return;
  if (groups->mesh().cp > 1) cut_ = std::make_unique<ContextCut>(whole, groups->mesh().cp, groups->place().cp);
  cuts_sequence_ = groups->mesh().tp > 1;
  const Range range = shard_range();
  if (cuts_sequence_) shard_ = spans_between(pieces(), range.begin, range.end);
}

Range TokenLayout::shard_range() const { return sequence_range(pieces().num_tokens(), groups_->mesh().tp, groups_->place().tp); }

at::Tensor TokenLayout::pieces_of(const at::Tensor& whole) const { return whole.defined() ? keep_pieces(whole) : whole; }

at::Tensor TokenLayout::shard_of(const at::Tensor& whole) const { return whole.defined() ? keep_shard(keep_pieces(whole)) : whole; }

at::Tensor TokenLayout::gather_pieces(const at::Tensor& x_nd) const {
  return cuts_sequence_ ? gather_rows(x_nd, shard_rows(pieces().num_tokens(), groups_->mesh().tp), groups_->tensor()) : x_nd;
}

at::Tensor TokenLayout::gather_whole(const at::Tensor& x_nd) const {
  if (!cut_) return gather_pieces(x_nd);
  std::vector<int64_t> rows;  // of every rank that shares the micro-batch, tensor ranks innermost
  for (int64_t c = 0; c < cut_->num_ranks(); ++c)
    for (const int64_t n : shard_rows(cut_->num_tokens(c), groups_->mesh().tp)) rows.push_back(n);
  const at::Tensor by_rank_nd = gather_rows(x_nd, rows, groups_->sequence());
  at::Tensor order_n = at::empty({whole_->num_tokens()}, at::kLong);
  int64_t* order = order_n.mutable_data_ptr<int64_t>();
  int64_t row = 0;
  for (int64_t c = 0; c < cut_->num_ranks(); ++c)
    for (const Range& range : cut_->ranges(c))
      for (int64_t i = range.begin; i < range.end; ++i) order[i] = row++;
  return at::index_select(by_rank_nd, 0, to_device(order_n, x_nd.device()));
}

at::Tensor TokenLayout::gather_whole_shards(const at::Tensor& y_nd) const {
  return cuts_sequence_ ? gather_rows(y_nd, shard_rows(whole_->num_tokens(), groups_->mesh().tp), groups_->tensor()) : y_nd;
}

at::Tensor TokenLayout::keep_shard(const at::Tensor& y_pd) const {
  if (!cuts_sequence_) return y_pd;
  const Range range = shard_range();
  return y_pd.narrow(0, range.begin, range.end - range.begin);
}

at::Tensor TokenLayout::sum_shard(const at::Tensor& y_pd) const {
  return cuts_sequence_ ? reduce_scatter_rows(y_pd, shard_rows(y_pd.size(0), groups_->mesh().tp), groups_->tensor()) : y_pd;
}

}  // namespace tessera
