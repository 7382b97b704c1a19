#include "train/evaluate.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>

#include <algorithm>

#include "train/pipeline.hpp"
#include "train/step.hpp"

namespace tessera {

Evaluation evaluate(Model& model, const std::vector<Row>& rows, int64_t batch_rows) {
  at::NoGradGuard no_grad;
  const MeshGroups* ranks = model.store().ranks();
  const Mesh mesh = ranks ? ranks->mesh() : Mesh{};
  constexpr size_t kBins = 64;  // [0, 1), [1, 2), [2, 4), [4, 8), ...
  std::vector<double> sums(kBins, 0), targets(kBins, 0);
  // Every data rank takes as many batches, some of them empty: over several ranks a batch is a matter of all.
  const auto count = static_cast<int64_t>(rows.size()), each = batch_rows * mesh.dp_replicate * mesh.dp_shard;
  for (int64_t first = 0; first < count; first += each) {
    const int64_t begin = std::min(count, first + batch_rows * data_rank(ranks)), end = std::min(count, begin + batch_rows);
    Batch batch = assemble(std::span(rows).subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin)));
    batch.ids_n = batch.ids_n.to(model.store().device());
    const MicroBatchPtr micro = model.micro_batch(batch, {}, /*training=*/false);
    const at::Tensor device_losses_n = stage_by_stage(model, micro);
    if (!device_losses_n.defined() || (ranks && ranks->place().tp != 0)) continue;  // of an earlier stage, or counted by another rank
    const at::Tensor losses_n = device_losses_n.to(at::kCPU, at::kFloat);
    const float* loss = losses_n.const_data_ptr<float>();
    for (const Span& span : micro->tokens.pieces().list()) {
      for (int64_t p = span.start; p < span.start + span.length && p + 1 < span.document_len; ++p) {
        size_t bin = 0;
        while ((int64_t{1} << bin) <= p) ++bin;
        sums[bin] += loss[p - span.start];
        ++targets[bin];
      }
      loss += span.length;
    }
  }
  if (ranks && ranks->all()) {
    ranks->whereabouts().place = "validation";
    std::vector<double> both = sums;
    both.insert(both.end(), targets.begin(), targets.end());
    const at::Tensor all = at::tensor(both, at::kDouble).to(model.store().device());
    ranks->all()->all_reduce(all);
    const at::Tensor host = all.to(at::kCPU);
    // Replicas have rows of their own; nothing is counted twice.
    std::copy_n(host.const_data_ptr<double>(), kBins, sums.begin());
    std::copy_n(host.const_data_ptr<double>() + kBins, kBins, targets.begin());
  }
  Evaluation result;
  double sum = 0;
  for (size_t bin = 0; bin < kBins; ++bin) {
    const auto n = static_cast<int64_t>(targets[bin]);
    sum += sums[bin];
    result.targets += n;
    if (n > 0 || std::any_of(targets.begin() + static_cast<std::ptrdiff_t>(bin), targets.end(), [](double later) { return later > 0; }))
      result.by_position.push_back({.begin = bin ? int64_t{1} << (bin - 1) : 0, .end = int64_t{1} << bin, .loss = n ? sums[bin] / targets[bin] : 0, .targets = n});
  }
  result.loss = result.targets ? sum / static_cast<double>(result.targets) : 0;
  return result;
}

double validation_loss(Model& model, const std::vector<Row>& rows, int64_t batch_rows) { return evaluate(model, rows, batch_rows).loss; }

}  // namespace tessera
