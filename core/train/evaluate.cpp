#include "train/evaluate.hpp"

#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace tessera {

Evaluation evaluate(Model& model, const std::vector<Row>& rows, int64_t batch_rows) {
  at::NoGradGuard no_grad;
  Evaluation result;
  double sum = 0;
  std::vector<double> sums;
  std::vector<int64_t> targets;
  for (size_t r = 0; r < rows.size(); r += static_cast<size_t>(batch_rows)) {
    Batch batch = assemble(std::span(rows).subspan(r, std::min(static_cast<size_t>(batch_rows), rows.size() - r)));
    batch.ids_n = batch.ids_n.to(model.store().device());
    const at::Tensor losses_n = model.token_losses(batch).to(at::kCPU, at::kFloat);
    const float* loss = losses_n.const_data_ptr<float>();
    for (const Span& span : batch.spans.list()) {
      for (int64_t p = 0; p + 1 < span.length; ++p) {
        size_t bin = 0;  // [0, 1), [1, 2), [2, 4), [4, 8), ...
        while ((int64_t{1} << bin) <= p) ++bin;
        sums.resize(std::max(sums.size(), bin + 1)), targets.resize(sums.size());
        sums[bin] += loss[p];
        ++targets[bin];
      }
      loss += span.length;
    }
  }
  for (size_t bin = 0; bin < sums.size(); ++bin) {
    sum += sums[bin];
    result.targets += targets[bin];
    result.by_position.push_back({.begin = bin ? int64_t{1} << (bin - 1) : 0, .end = int64_t{1} << bin, .loss = targets[bin] ? sums[bin] / static_cast<double>(targets[bin]) : 0, .targets = targets[bin]});
  }
  result.loss = result.targets ? sum / static_cast<double>(result.targets) : 0;
  return result;
}

double validation_loss(Model& model, const std::vector<Row>& rows, int64_t batch_rows) { return evaluate(model, rows, batch_rows).loss; }

}  // namespace tessera
