// Which tokens of a flat [N, D] activation belong together.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace tessera {

// A run of consecutive tokens of one document. Spans lie end to end in the token dimension, in the order of the list.
struct Span {
  int64_t document = 0;      // number of the document in the batch
  int64_t start = 0;         // position in its document of the span's first token: 0 in training, tokens already seen in decoding
  int64_t length = 0;        // tokens of the span, at least 1
  int64_t document_len = 0;  // tokens of the whole document as far as it is known
  int64_t state_slot = 0;    // row of the decode state tensors
};

// The spans of one batch, N tokens in all. There is no padding and no batch without boundaries: a plain batch is B spans of T tokens.
// Nothing (convolution, scan, attention, shift, target) crosses from one document to another.
class Spans {
 public:
  Spans() = default;
  // Throws Error(kRuntime) when a span is empty or lies outside its document.
  explicit Spans(std::vector<Span> list);
  // `batch` documents of `length` tokens, each whole.
  static Spans uniform(int64_t batch, int64_t length);
  // Whole documents of the given lengths, end to end.
  static Spans documents(const std::vector<int64_t>& lengths);

  const std::vector<Span>& list() const { return list_; }
  int64_t size() const { return static_cast<int64_t>(list_.size()); }
  int64_t num_tokens() const { return num_tokens_; }
  // Row of x_nd where span i begins; rows()[size()] == num_tokens().
  const std::vector<int64_t>& rows() const { return rows_; }
  // The common length when all spans have the same and all begin their document (start 0), else 0. Batched fast paths ask for it.
  int64_t uniform_len() const { return uniform_len_; }
  // True when every span is its whole document: no state comes in and none goes out.
  bool whole() const { return whole_; }

  // int32 [size, 5]: document, start, length, document_len, state_slot; on `device`, copied once.
  const at::Tensor& table(at::Device device) const;
  // int64 [N] each: position in the document, span index of every token; on `device`, made once.
  const at::Tensor& positions_n(at::Device device) const;
  const at::Tensor& span_index_n(at::Device device) const;

 private:
  std::vector<Span> list_;
  std::vector<int64_t> rows_{0};
  int64_t num_tokens_ = 0, uniform_len_ = 0;
  bool whole_ = true;
  mutable at::Tensor table_, positions_, span_index_;
};

}  // namespace tessera
