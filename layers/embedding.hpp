// The vectors of token ids.
// Letters: N tokens, D hidden, V words: the vocabulary, or a rank's part of it.
#pragma once
#include <ATen/core/Tensor.h>

#include "tessera/ranks.hpp"

namespace tessera {

// ids_n int64 [N], table_vd [V, D] -> [N, D] in the table's dtype, the rows of the ids. With a group, table_vd is words [rank V, (rank + 1) V) and
// the result a summand: rows of ids that other ranks hold are zero. The gradient is dense over the table, summed in token order.
// Throws Error(kRuntime) when an id on the CPU lies outside the vocabulary.
at::Tensor embedding(const at::Tensor& ids_n, const at::Tensor& table_vd, const Group* tensor);

}  // namespace tessera
