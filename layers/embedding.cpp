#include "layers/embedding.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/embedding.h>
#include <fmt/format.h>

#include "tessera/error.hpp"

namespace tessera {

at::Tensor embedding(const at::Tensor& ids_n, const at::Tensor& table_vd, const Group* tensor) {
  const auto num_words = table_vd.size(0), vocabulary = num_words * (tensor ? tensor->size() : 1);
  if (ids_n.is_cpu() && ids_n.numel() > 0) {
    const auto low = ids_n.min().item<int64_t>(), high = ids_n.max().item<int64_t>();
    if (low < 0 || high >= vocabulary)
      throw Error(ExitCode::kRuntime, fmt::format("[embedding] ids must be in [0, {}), got {}", vocabulary, low < 0 ? low : high));
  }
  if (!tensor) return at::embedding(table_vd, ids_n);
  const auto local_n = ids_n - tensor->rank() * num_words;
  const auto elsewhere_n = local_n.lt(0).logical_or(local_n.ge(num_words));
  return at::embedding(table_vd, local_n.masked_fill(elsewhere_n, 0)).masked_fill(elsewhere_n.unsqueeze(1), 0);
}

}  // namespace tessera
