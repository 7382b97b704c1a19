#include "infer/generate.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/PhiloxRNGEngine.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>

#include <algorithm>

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

std::vector<std::vector<int64_t>> generate(Model& model, const std::vector<std::vector<int64_t>>& prompts, const GenerateOptions& options,
                                           const std::function<void(size_t, int64_t)>& on_token) {
  const c10::InferenceMode inference;
  const int64_t vocab_size = model.plan().model.vocab_size;
  for (size_t i = 0; i < prompts.size(); ++i) {
    if (prompts[i].empty()) throw Error(ExitCode::kUsage, fmt::format("prompt {}: must have at least one token", i));
    for (int64_t id : prompts[i])
      if (id < 0 || id >= vocab_size) throw Error(ExitCode::kUsage, fmt::format("prompt {}: token id {} is outside the vocabulary of {}", i, id, vocab_size));
  }
  const at::Device device = model.store().device();
  DecodeState state(model.plan(), static_cast<int64_t>(prompts.size()), device, model.store().compute_dtype());
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
    const at::Tensor hidden_nd = model.hidden(batch, &state);
    if (complete.empty()) continue;
    const at::Tensor logits = model.logits(at::index_select(hidden_nd, 0, at::tensor(last_rows, at::kLong).to(device)));
    const at::Tensor greedy = options.temperature > 0 ? at::Tensor() : at::argmax(logits, 1).to(at::kCPU);
    for (size_t i = 0; i < complete.size(); ++i) {
      const size_t sequence = complete[i];
      const int64_t id = greedy.defined() ? greedy.const_data_ptr<int64_t>()[i]
                                          : sample(logits.select(0, static_cast<int64_t>(i)), options, sequence, static_cast<int64_t>(made[sequence].size()));
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
