#include "train/evaluate.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <map>

#include "data/tasks/task.hpp"
#include "train/pipeline.hpp"
#include "train/step.hpp"

namespace tessera {

namespace {

// The groups of the rows' targets, end to end: int64 [N].
at::Tensor groups_of(std::span<const Row> rows) {
  std::vector<int64_t> groups;
  for (const Row& row : rows)
    for (const Target& target : row.targets) groups.push_back(target.group);
  return at::tensor(groups, at::kLong);
}

}  // namespace

Evaluation evaluate(Model& model, const std::vector<Row>& rows, int64_t batch_rows) {
  at::NoGradGuard no_grad;
  const MeshGroups* ranks = model.store().ranks();
  const Mesh mesh = ranks ? ranks->mesh() : Mesh{};
  constexpr size_t kBins = 64;  // [0, 1), [1, 2), [2, 4), [4, 8), ...
  std::vector<double> sums(kBins, 0), targets(kBins, 0);
  const bool scored = !rows.empty() && !rows[0].targets.empty();
  std::map<int64_t, GroupAccuracy> groups;  // the same on all ranks
  for (const Row& row : rows)
    for (const Target& target : row.targets)
      if (target.id >= 0) groups[target.group].group = target.group;
  // Every data rank takes as many batches, some of them empty: over several ranks a batch is a matter of all.
  const auto count = static_cast<int64_t>(rows.size()), each = batch_rows * mesh.dp_replicate * mesh.dp_shard;
  for (int64_t first = 0; first < count; first += each) {
    const int64_t begin = std::min(count, first + batch_rows * data_rank(ranks)), end = std::min(count, begin + batch_rows);
    const auto own = std::span(rows).subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
    const Batch batch = assemble(own).on(model.store().device());
    const MicroBatchPtr micro = model.micro_batch(batch, {}, /*training=*/false);
    const TokenScores scores = scores_by_stage(model, micro, scored);
    if (!scores.losses_n.defined() || (ranks && ranks->place().tp != 0)) continue;  // of an earlier stage, or counted by another rank
    const auto of_pieces = [&](const at::Tensor& whole_n) { return micro->tokens.pieces_of(whole_n).to(at::kCPU).contiguous(); };
    const at::Tensor losses_n = scores.losses_n.to(at::kCPU, at::kFloat), targets_n = of_pieces(pass_inputs(batch, 0, 1).targets_n);
    const at::Tensor hits_n = scored ? scores.hits_n.to(at::kCPU) : at::Tensor(), groups_n = scored ? of_pieces(groups_of(own)) : at::Tensor();
    int64_t n = 0;
    for (const Span& span : micro->tokens.pieces().list()) {
      for (int64_t p = span.start; p < span.start + span.length; ++p, ++n) {
        if (targets_n.const_data_ptr<int64_t>()[n] < 0) continue;
        size_t bin = 0;
        while ((int64_t{1} << bin) <= p) ++bin;
        sums[bin] += losses_n.const_data_ptr<float>()[n];
        ++targets[bin];
        if (!scored) continue;
        GroupAccuracy& group = groups[groups_n.const_data_ptr<int64_t>()[n]];
        ++group.targets;
        group.hits += hits_n.const_data_ptr<bool>()[n];
      }
    }
  }
  if (ranks && ranks->all()) {
    ranks->whereabouts().place = "validation";
    std::vector<double> both = sums;
    both.insert(both.end(), targets.begin(), targets.end());
    for (const auto& [number, group] : groups) both.push_back(static_cast<double>(group.targets)), both.push_back(static_cast<double>(group.hits));
    const at::Tensor all = at::tensor(both, at::kDouble).to(model.store().device());
    ranks->all()->all_reduce(all);
    const at::Tensor host = all.to(at::kCPU);
    // Replicas have rows of their own; nothing is counted twice.
    std::copy_n(host.const_data_ptr<double>(), kBins, sums.begin());
    std::copy_n(host.const_data_ptr<double>() + kBins, kBins, targets.begin());
    const double* from = host.const_data_ptr<double>() + 2 * kBins;
    for (auto& [number, group] : groups) group.targets = static_cast<int64_t>(*from++), group.hits = static_cast<int64_t>(*from++);
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
  int64_t hits = 0;
  for (auto& [number, group] : groups) {
    group.trained = true;
    hits += group.hits;
    result.by_group.push_back(group);
  }
  if (scored) result.accuracy = result.targets ? static_cast<double>(hits) / static_cast<double>(result.targets) : 0;
  return result;
}

Validation open_validation(std::shared_ptr<const Dataset> dataset, const DataConfig& config, int64_t seq_len, int64_t tokens) {
  const Task* task = find_task(config.source);
  return {.rows = validation_rows(std::move(dataset), seq_len, tokens), .beyond = beyond_rows(config, tokens), .axis = task ? task->axis : ""};
}

Evaluation evaluate(Model& model, const Validation& validation, int64_t batch_rows) {
  Evaluation result = evaluate(model, validation.rows, batch_rows);
  std::map<int64_t, GroupAccuracy> groups;
  for (const GroupAccuracy& group : result.by_group) groups.emplace(group.group, group);
  const auto batch_tokens = batch_rows * static_cast<int64_t>(validation.rows[0].ids.size());
  for (const std::vector<Row>& rows : validation.beyond) {
    const Evaluation further = evaluate(model, rows, std::max<int64_t>(1, batch_tokens / static_cast<int64_t>(rows[0].ids.size())));
    for (const GroupAccuracy& group : further.by_group) {
      GroupAccuracy& sum = groups[group.group];
      sum.group = group.group, sum.targets += group.targets, sum.hits += group.hits;
    }
  }
  result.by_group.clear();
  for (const auto& [number, group] : groups) result.by_group.push_back(group);
  return result;
}

}  // namespace tessera
