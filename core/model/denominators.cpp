#include "model/denominators.hpp"

#include <ATen/ops/logical_and.h>
#include <ATen/ops/roll.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>

#include <algorithm>

#include "layers/shift.hpp"

namespace tessera {

Denominators& Denominators::operator+=(const Denominators& other) {
  auto add = [](std::vector<double>& into, const std::vector<double>& from) {
    into.resize(std::max(into.size(), from.size()));
    for (size_t i = 0; i < from.size(); ++i) into[i] += from[i];
  };
  add(targets, other.targets), add(tokens, other.tokens), add(documents, other.documents);
  return *this;
}

PassInputs pass_inputs(const Batch& batch, int64_t shift, int64_t offset) {
  PassInputs in;
  const bool given = batch.targets_n.defined();  // at the token that predicts, one before what follows it
  in.targets_n = given ? shift_ids(batch.targets_n, batch.spans, offset - 1, -1) : next_targets(batch.ids_n, {}, batch.spans, offset);
  if (batch.valid_n.defined()) {  // padding predicts nothing and is no target
    at::Tensor ahead = at::roll(batch.valid_n, {given ? 1 - offset : -offset}, {0});
    in.targets_n = at::where(at::logical_and(batch.valid_n, ahead), in.targets_n, at::scalar_tensor(-1, in.targets_n.options()));
  }
  in.valid_n = shift ? valid_after_shift(batch.valid_n, batch.spans, shift, batch.ids_n.device()) : batch.valid_n;
  return in;
}

Denominators denominators(const ModelPlan& plan, const Batch& batch) {
  Denominators sums;
  auto add = [&](int64_t shift, int64_t offset) {
    PassInputs in = pass_inputs(batch, shift, offset);
    sums.targets.push_back(in.targets_n.ge(0).sum().item<double>());
    if (!in.valid_n.defined()) {
      sums.tokens.push_back(static_cast<double>(batch.spans.num_tokens()));
      sums.documents.push_back(static_cast<double>(batch.spans.size()));
      return;
    }
    at::Tensor valid = in.valid_n.to(at::kCPU).contiguous();
    const bool* data = valid.const_data_ptr<bool>();
    double tokens = 0, documents = 0;
    for (int64_t s = 0; s < batch.spans.size(); ++s) {
      const int64_t begin = batch.spans.rows()[static_cast<size_t>(s)], end = batch.spans.rows()[static_cast<size_t>(s) + 1];
      const auto n = std::count(data + begin, data + end, true);
      tokens += static_cast<double>(n);
      documents += n > 0;
    }
    sums.tokens.push_back(tokens);
    sums.documents.push_back(documents);
  };
  add(0, 1);
  if (plan.head)
    for (const HeadPass& pass : plan.head->passes) add(pass.shift, pass.offset);
  return sums;
}

}  // namespace tessera
