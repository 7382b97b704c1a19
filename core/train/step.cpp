#include "train/step.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "parallel/reports.hpp"
#include "plan/traffic.hpp"
#include "train/pipeline.hpp"

namespace tessera {

namespace {

// Scalars on the device that are read back together, with one synchronisation.
class Readback {
 public:
  void add(double* to, const at::Tensor& value) {
    to_.push_back(to);
    values_.push_back(value.detach().to(at::kDouble).reshape({}));
  }
  void read() {
    if (values_.empty()) return;
    const at::Tensor host = at::stack(values_).to(at::kCPU);
    for (size_t i = 0; i < to_.size(); ++i) *to_[i] = host.const_data_ptr<double>()[i];
  }

 private:
  std::vector<double*> to_;
  std::vector<at::Tensor> values_;
};

struct Sums {
  at::Tensor loss, total;
  std::map<std::string, at::Tensor> parts;
};

void add_to(at::Tensor& sum, const at::Tensor& value) {
  if (value.defined()) sum = sum.defined() ? sum + value : value;
}

// Of the global batch: every data rank has its own micro-batches.
Denominators global_denominators(Model& model, const std::vector<Batch>& micro_batches) {
  Denominators over;
  for (const Batch& batch : micro_batches) over += denominators(model.plan(), batch);
  const MeshGroups* ranks = model.store().ranks();
  if (!ranks || !ranks->data()) return over;
  ranks->whereabouts().place = "the count of targets";
  std::vector<double> all;
  for (const auto* list : {&over.targets, &over.tokens, &over.documents}) all.insert(all.end(), list->begin(), list->end());
  const at::Tensor sums = at::tensor(all, at::kDouble).to(model.store().device());
  ranks->data()->all_reduce(sums);
  const at::Tensor host = sums.to(at::kCPU);
  const double* from = host.const_data_ptr<double>();
  for (auto* list : {&over.targets, &over.tokens, &over.documents})
    for (double& value : *list) value = *from++;
  return over;
}

Sums run_micro_batches(Model& model, const std::vector<Batch>& batches) {
  const Denominators over = global_denominators(model, batches);
  std::vector<Batch> micro_batches;
  for (const Batch& batch : batches) micro_batches.push_back(batch.on(model.store().device()));
  Sums sums;
  const auto report = [&](const LossResult& result) {
    add_to(sums.loss, result.main);
    add_to(sums.total, result.value);
    for (const auto& [name, part] : result.parts) add_to(sums.parts[name], part);
  };
  if (model.plan().env.mesh.pp > 1) {
    run_pipeline(model, micro_batches, over, report);
    return sums;
  }
  for (const Batch& batch : micro_batches) {
    at::AutoGradMode grad_mode(true);
    LossResult result = model.loss(batch, over, /*training=*/true);
    if (model.clock()) model.clock()->enter("lm_head", StepClock::kBackward);
    if (result.total.requires_grad()) torch::autograd::backward({result.total}, {});
    report(result);
  }
  return sums;
}

void read_sums(Readback& readback, const Sums& sums, StepResult& result) {
  if (sums.loss.defined()) readback.add(&result.loss, sums.loss);
  if (sums.total.defined()) readback.add(&result.total_loss, sums.total);
  for (const auto& [name, part] : sums.parts) readback.add(&result.parts[name], part);
}

// Each rank has its tokens' and stages' share. The ranks of a stage report the same names, the stages different ones.
void sum_over_ranks(const MeshGroups& ranks, at::Device device, StepResult& result) {
  ranks.whereabouts().place = "the sum of losses";
  if (ranks.stage()) {
    std::vector<double> values{result.loss, result.total_loss};
    for (const auto& [name, part] : result.parts) values.push_back(part);
    const at::Tensor sums = at::tensor(values, at::kDouble).to(device);
    ranks.stage()->all_reduce(sums);
    const at::Tensor host = sums.to(at::kCPU);
    const double* from = host.const_data_ptr<double>();
    result.loss = *from++, result.total_loss = *from++;
    for (auto& [name, part] : result.parts) part = *from++;
    for (auto& [layer, counts] : result.counts)
      for (auto& [name, count] : counts) ranks.stage()->all_reduce(count = count.contiguous());
  }
  if (!ranks.pipe()) return;
  const auto own = nlohmann::json::to_cbor({{"loss", result.loss}, {"total", result.total_loss}, {"parts", result.parts}});
  if (static_cast<int64_t>(own.size()) > kLossReportBytes)
    throw Error(ExitCode::kRuntime, fmt::format("{} losses with names do not fit into {} bytes", result.parts.size(), kLossReportBytes));
  const auto stages = gather_reports(*ranks.pipe(), device, own, kLossReportBytes);
  result.loss = result.total_loss = 0;
  result.parts.clear();
  for (const nlohmann::json& stage : stages) {
    result.loss += stage["loss"].get<double>();
    result.total_loss += stage["total"].get<double>();
    for (const auto& [name, part] : stage["parts"].items()) result.parts[name] += part.get<double>();
  }
}

}  // namespace

std::vector<Batch> micro_batches(std::span<const Row> rows, int64_t local_batch_size, int64_t first_token) {
  std::vector<Batch> out;
  const auto local = static_cast<size_t>(local_batch_size);
  for (size_t first = 0; first < rows.size(); first += local) {
    out.push_back(assemble(rows.subspan(first, std::min(local, rows.size() - first))));
    out.back().first_token = first_token;
    first_token += out.back().ids_n.numel();
  }
  return out;
}

Range rows_of(int64_t num_rows, int64_t data_rank, int64_t data_ranks) { return {num_rows * data_rank / data_ranks, num_rows * (data_rank + 1) / data_ranks}; }

int64_t data_rank(const MeshGroups* groups) { return groups ? groups->place().dp_replicate * groups->mesh().dp_shard + groups->place().dp_shard : 0; }

std::vector<Batch> next_batches(Loader& loader, const Config& config, const Mesh& mesh, int64_t data_rank, int64_t first_token) {
  const int64_t count = global_batch_rows(config, mesh);
  const Range mine = rows_of(count, data_rank, mesh.dp_replicate * mesh.dp_shard);
  const std::vector<Row> rows = loader.next_rows(count, mine.begin, mine.end);
  return micro_batches(std::span(rows).subspan(static_cast<size_t>(mine.begin), static_cast<size_t>(mine.end - mine.begin)), config.training.local_batch_size,
                       first_token + mine.begin * config.training.seq_len);
}

StepResult accumulate(Model& model, const std::vector<Batch>& micro_batches) {
  StepResult result;
  const Sums sums = run_micro_batches(model, micro_batches);
  model.store().finish_grad();
  Readback readback;
  read_sums(readback, sums, result);
  readback.read();
  result.counts = model.take_counts();
  if (const MeshGroups* ranks = model.store().ranks()) sum_over_ranks(*ranks, model.store().device(), result);
  return result;
}

StepResult train_step(Model& model, Optimizer& optimizer, const std::vector<Batch>& micro_batches, double lr, double max_norm) {
  StepResult result;
  model.take_counts();
  const Sums sums = run_micro_batches(model, micro_batches);
  if (model.clock()) model.clock()->enter("optimizer", StepClock::kForward);
  const at::Tensor norm = optimizer.grad_norm();
  Readback readback;
  read_sums(readback, sums, result);
  readback.add(&result.grad_norm, norm);
  readback.read();
  result.counts = model.take_counts();
  if (const MeshGroups* ranks = model.store().ranks()) sum_over_ranks(*ranks, model.store().device(), result);
  result.finite = std::isfinite(result.total_loss) && std::isfinite(result.grad_norm);
  if (!result.finite) return result;
  optimizer.step(lr, max_norm, norm);
  model.after_step(result.counts);
  return result;
}

}  // namespace tessera
