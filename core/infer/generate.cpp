#include "infer/generate.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/PhiloxRNGEngine.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>

#include <algorithm>

#include "train/pipeline.hpp"

namespace tessera {

namespace {

// Nucleus sampling; the draw depends on (seed, sequence, position) only. Source of top-p: arXiv:1904.09751.
int64_t sample(const at::Tensor& logits_v, const GenerateOptions& options, size_t sequence, int64_t position) {
  auto [sorted, order] = at::sort(at::softmax(logits_v.to(at::kCPU, at::kDouble) / options.temperature, 0), 0, /*descending=*/true);
  const double* p = sorted.const_data_ptr<double>();
  const int64_t v = sorted.size(0);
  int64_t kept = 0;
  double mass = 0;
  while (kept < v && (kept == 0 || mass < options.top_p)) mass += p[kept++];
  at::Philox4_32 engine(options.seed, sequence, static_cast<uint64_t>(position));
  double left = (static_cast<double>(engine()) + 0.5) / 4294967296.0 * mass;
  int64_t pick = 0;
  while (pick + 1 < kept && left >= p[pick]) left -= p[pick++];
  return order.const_data_ptr<int64_t>()[pick];
}

}  // namespace

at::Tensor from_last_stage(const MeshGroups& ranks, const at::Tensor& ids) {
  if (!ranks.all()) return ids;
  ranks.whereabouts().place = "the next tokens";
  const bool picks = ranks.place().rank == rank_at(ranks.mesh(), {.pp = ranks.mesh().pp - 1});
  const at::Tensor all = picks ? ids : at::zeros_like(ids);
  ranks.all()->all_reduce(all);
  return all;
}

std::vector<std::vector<int64_t>> generate(Model& model, const std::vector<std::vector<int64_t>>& prompts, const GenerateOptions& options,
                                           const std::function<void(size_t, int64_t)>& on_token) {
  const MeshGroups* ranks = model.store().ranks();
  // What one call gathers from other ranks may serve the next one, which may want gradients.
  const c10::InferenceMode inference(!ranks);
  const at::NoGradGuard no_grad;
  const int64_t vocab_size = model.plan().model.vocab_size;
  for (size_t i = 0; i < prompts.size(); ++i) {
    if (prompts[i].empty()) throw Error(ExitCode::kUsage, fmt::format("prompt {}: must have at least one token", i));
    for (int64_t id : prompts[i])
      if (id < 0 || id >= vocab_size) throw Error(ExitCode::kUsage, fmt::format("prompt {}: token id {} is outside the vocabulary of {}", i, id, vocab_size));
  }
  const at::Device device = model.store().device();
  DecodeState state(model.plan(), static_cast<int64_t>(prompts.size()), device, model.store().compute_dtype(), ranks);
  std::vector<std::vector<int64_t>> text = prompts, made(prompts.size());
  std::vector<int64_t> seen(prompts.size(), 0);
  std::vector<size_t> running(prompts.size());
  for (size_t i = 0; i < running.size(); ++i) running[i] = i;
  if (options.max_new_tokens <= 0) return made;
  while (!running.empty()) {
    std::vector<Span> spans;
    std::vector<int64_t> ids, last_rows;
    std::vector<size_t> complete;  // sequences whose last span ends at their last known token
    for (size_t sequence : running) {
      const int64_t known = static_cast<int64_t>(text[sequence].size());
      int64_t length = known - seen[sequence];
      if (options.prefill_chunk > 0) length = std::min(length, options.prefill_chunk);
      const auto begin = text[sequence].begin() + seen[sequence];
      ids.insert(ids.end(), begin, begin + length);
      spans.push_back({.document = static_cast<int64_t>(sequence), .start = seen[sequence], .length = length, .document_len = known, .state_slot = static_cast<int64_t>(sequence)});
      seen[sequence] += length;
      if (seen[sequence] == known) complete.push_back(sequence), last_rows.push_back(static_cast<int64_t>(ids.size()) - 1);
    }
    Batch batch{.ids_n = at::tensor(ids, at::kLong).to(device), .spans = Spans(std::move(spans))};
    const at::Tensor hidden_nd = hidden_by_stage(model, batch, &state);
    if (complete.empty()) continue;
    at::Tensor picked = at::zeros({static_cast<int64_t>(complete.size())}, at::kLong);
    if (hidden_nd.defined()) {
      const at::Tensor logits = model.logits(at::index_select(hidden_nd, 0, at::tensor(last_rows, at::kLong).to(device)));
      if (options.temperature <= 0) picked = at::argmax(logits, 1).to(at::kCPU);
      else
        for (size_t i = 0; i < complete.size(); ++i)
          picked.mutable_data_ptr<int64_t>()[i] = sample(logits.select(0, static_cast<int64_t>(i)), options, complete[i], static_cast<int64_t>(made[complete[i]].size()));
    }
    if (ranks) picked = from_last_stage(*ranks, picked.to(device)).to(at::kCPU);
    for (size_t i = 0; i < complete.size(); ++i) {
      const size_t sequence = complete[i];
      const int64_t id = picked.const_data_ptr<int64_t>()[i];
      made[sequence].push_back(id);
      text[sequence].push_back(id);
      if (on_token) on_token(sequence, id);
      if (id == options.stop_id || static_cast<int64_t>(made[sequence].size()) >= options.max_new_tokens)
        running.erase(std::find(running.begin(), running.end(), sequence));
    }
  }
  return made;
}

}  // namespace tessera
