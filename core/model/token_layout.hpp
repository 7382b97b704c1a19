// How the tokens of a micro-batch lie over the ranks that share it. The residual stream between layers is cut twice: over the context-parallel ranks
// into pieces of documents, and each rank's pieces over the tensor-parallel ranks into sequence shards.
// Letters: N tokens of the micro-batch, P of this rank's pieces, n of its sequence shard.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "parallel/mesh_groups.hpp"
#include "tessera/context_cut.hpp"
#include "tessera/spans.hpp"

namespace tessera {

class TokenLayout {
 public:
  // `groups` nullptr: a single process, where all three are the same and every function is the identity.
  TokenLayout(const Spans& whole, const MeshGroups* groups);

  const Spans& whole() const { return *whole_; }
  const Spans& pieces() const { return cut_ ? cut_->spans() : *whole_; }
  const Spans& shard() const { return cuts_sequence_ ? shard_ : pieces(); }
  const ContextCut* cut() const { return cut_.get(); }

  // Rows of a tensor of the whole micro-batch, [N, ...]; an undefined one stays undefined.
  at::Tensor pieces_of(const at::Tensor& whole) const;
  at::Tensor shard_of(const at::Tensor& whole) const;

  // Differentiable: [n, D] -> [P, D] and [N, D], in order.
  at::Tensor gather_pieces(const at::Tensor& x_nd) const;
  at::Tensor gather_whole(const at::Tensor& x_nd) const;
  // Of shards that cut the whole micro-batch over the tensor ranks: [n', D] -> [N, D].
  at::Tensor gather_whole_shards(const at::Tensor& y_nd) const;
  // [P, D] -> [n, D]: of what every tensor rank computed alike, and of summands.
  at::Tensor keep_shard(const at::Tensor& y_pd) const;
  at::Tensor sum_shard(const at::Tensor& y_pd) const;
  // [N, D] -> [P, D].
  at::Tensor keep_pieces(const at::Tensor& y_nd) const { return cut_ ? cut_->take(y_nd) : y_nd; }

 private:
  Range shard_range() const;

  const Spans* whole_;
  const MeshGroups* groups_;
  std::unique_ptr<ContextCut> cut_;
  bool cuts_sequence_ = false;
  Spans shard_;
};

}  // namespace tessera
