// Shifts along the tokens inside documents, for heads that look ahead.
// Letters: N tokens, n tokens ahead. Position p of a document sees its position p + n; nothing crosses into another document. Spans of
// one document number are one document, so the pieces of a document that lies in one batch see each other.
#pragma once
#include <ATen/core/Tensor.h>

#include "tessera/spans.hpp"

namespace tessera {

// ids_n int64 [N] -> int64 [N]: the id n tokens ahead in the same document, `fill` where the batch holds none.
// Throws Error(kRuntime) when ids_n is not [N] or n is negative.
at::Tensor shift_ids(const at::Tensor& ids_n, const Spans& spans, int64_t n, int64_t fill);

// The target of every token, `offset` tokens ahead in the same document -> int64 [N], -1 where there is none or where it is masked.
// masked_n bool [N], true where a token is no target; undefined: every token is one.
at::Tensor next_targets(const at::Tensor& ids_n, const at::Tensor& masked_n, const Spans& spans, int64_t offset);

// Which tokens are valid and have a valid token n ahead in their document -> bool [N] on `device`: false at the last n of each.
// valid_n bool [N], false where the token is padding; undefined: all are valid.
at::Tensor valid_after_shift(const at::Tensor& valid_n, const Spans& spans, int64_t n, at::Device device);

}  // namespace tessera
