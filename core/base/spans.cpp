#include "tessera/spans.hpp"

#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include "tessera/device.hpp"
#include "tessera/error.hpp"

namespace tessera {

Spans::Spans(std::vector<Span> list) : list_(std::move(list)) {
  rows_.reserve(list_.size() + 1);
  uniform_len_ = list_.empty() ? 0 : list_.front().length;
  for (size_t i = 0; i < list_.size(); ++i) {
    const Span& span = list_[i];
    if (span.length < 1 || span.start < 0 || span.start + span.length > span.document_len)
      throw Error(ExitCode::kRuntime, fmt::format("span {}: [{}, {}) must be non-empty and inside its document of {} tokens", i, span.start,
                                                  span.start + span.length, span.document_len));
    num_tokens_ += span.length;
    rows_.push_back(num_tokens_);
    if (span.length != uniform_len_ || span.start != 0) uniform_len_ = 0;
    whole_ = whole_ && span.start == 0 && span.length == span.document_len;
  }
}

Spans Spans::uniform(int64_t batch, int64_t length) { return documents(std::vector<int64_t>(static_cast<size_t>(batch), length)); }

Spans Spans::documents(const std::vector<int64_t>& lengths) {
  std::vector<Span> list;
  list.reserve(lengths.size());
  for (int64_t length : lengths) {
    auto i = static_cast<int64_t>(list.size());
    list.push_back({.document = i, .start = 0, .length = length, .document_len = length, .state_slot = i});
  }
  return Spans(std::move(list));
}

const at::Tensor& Spans::table(at::Device device) const {
  if (!table_.defined() || table_.device() != device) {
    at::Tensor host = at::empty({size(), 5}, at::kInt);
    int32_t* out = host.mutable_data_ptr<int32_t>();
    for (const Span& span : list_)
      for (int64_t value : {span.document, span.start, span.length, span.document_len, span.state_slot}) *out++ = static_cast<int32_t>(value);
    table_ = to_device(host, device);
  }
  return table_;
}

const at::Tensor& Spans::positions_n(at::Device device) const {
  if (!positions_.defined() || positions_.device() != device) {
    at::Tensor host = at::empty({num_tokens_}, at::kLong);
    int64_t* out = host.mutable_data_ptr<int64_t>();
    for (const Span& span : list_)
      for (int64_t i = 0; i < span.length; ++i) *out++ = span.start + i;
    positions_ = to_device(host, device);
  }
  return positions_;
}

const at::Tensor& Spans::span_index_n(at::Device device) const {
  if (!span_index_.defined() || span_index_.device() != device) {
    at::Tensor host = at::empty({num_tokens_}, at::kLong);
    int64_t* out = host.mutable_data_ptr<int64_t>();
    for (size_t s = 0; s < list_.size(); ++s) out = std::fill_n(out, list_[s].length, static_cast<int64_t>(s));
    span_index_ = to_device(host, device);
  }
  return span_index_;
}

}  // namespace tessera
