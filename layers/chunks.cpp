#include "layers/chunks.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>

#include "tessera/device.hpp"

namespace tessera {

Chunks::Chunks(const Spans& spans, int64_t longest, at::Device device) : order_(spans.list().size()) {
  const auto& list = spans.list();
  for (const Span& span : list) length_ = std::max(length_, span.length);
  length_ = std::min(length_, longest);
  std::iota(order_.begin(), order_.end(), 0);
  const auto count = [&](int64_t s) { return (list[s].length + length_ - 1) / length_; };
  std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return count(a) > count(b); });
  std::vector<int64_t> source, target(spans.num_tokens());
  for (int64_t place = 0; place < count(order_[0]); ++place) {
    at_place_.push_back(0);
    for (const int64_t s : order_) {
      if (count(s) <= place) break;
      ++at_place_.back();
      for (int64_t at = place * length_; at < (place + 1) * length_; ++at) {
        const bool token = at < list[s].length;
        if (token) target[spans.rows()[s] + at] = static_cast<int64_t>(source.size());
        source.push_back(token ? spans.rows()[s] + at : spans.num_tokens());
      }
    }
  }
  source_ = to_device(source, device), target_ = to_device(target, device);
}

at::Tensor Chunks::split(const at::Tensor& x_n) const {
  auto sizes = x_n.sizes().vec();
  sizes[0] = 1;
  const at::Tensor rows = at::index_select(at::cat({x_n, at::zeros(sizes, x_n.options())}), 0, source_);
  sizes[0] = length_, sizes.insert(sizes.begin(), -1);
  return rows.view(sizes);
}

at::Tensor Chunks::join(const at::Tensor& y_mq) const { return at::index_select(y_mq.flatten(0, 1), 0, target_); }

}  // namespace tessera
