#include "plan/placement.hpp"

#include <ATen/ops/cat.h>
#include <fmt/format.h>

#include <algorithm>

#include "tessera/error.hpp"

namespace tessera {

namespace {

int64_t length(const std::vector<Range>& ranges) {
  int64_t total = 0;
  for (const Range& range : ranges) total += range.end - range.begin;
  return total;
}

}  // namespace

bool is_expert(const Param& param) {
  return std::any_of(param.shards.begin(), param.shards.end(), [](const Shard& shard) { return shard.axis != Axis::kTensor; });
}

LocalPart::LocalPart(const Param& param, const Mesh& mesh, const Place& place) : global_shape_(param.shape), shape_(param.shape) {
  for (const int64_t size : param.shape) ranges_.push_back({{0, size}});
  const std::vector<Axis> axes = is_expert(param) ? std::vector<Axis>{Axis::kExpert, Axis::kExpertTensor} : std::vector<Axis>{Axis::kTensor};
  for (const Shard& shard : param.shards) {
    const int64_t ranks = degree(mesh, shard.axis);
    if (ranks == 1) continue;
    std::string why;
    const auto cut = shard_ranges(param, shard, ranks, coordinate(place, shard.axis), &why);
    if (!cut) throw Error(ExitCode::kUsage, why);
    const auto dim = static_cast<size_t>(shard.dim);
    ranges_[dim] = *cut;
    shape_[dim] = length(*cut);
    whole_ = false;
  }
  for (const Axis axis : axes) {
    const int64_t ranks = degree(mesh, axis);
    if (ranks == 1) continue;
    const auto shard = std::find_if(param.shards.begin(), param.shards.end(), [axis](const Shard& s) { return s.axis == axis; });
    if (shard == param.shards.end()) {
      shared_.push_back({.elements = {0, size()}, .axis = axis, .size = ranks});
      continue;
    }
    // A segment with fewer units than there are ranks lies on several of them.
    const auto dim = static_cast<size_t>(shard->dim);
    const bool packed = !param.segments.empty() && shard == param.shards.begin();
    int64_t inner = 1, outer = 1, at = 0;
    for (size_t d = 0; d < shape_.size(); ++d) (d < dim ? outer : inner) *= d == dim ? 1 : shape_[d];
    for (size_t s = 0; s < ranges_[dim].size(); ++s) {
      const int64_t units = packed ? param.segments[s].size / param.segments[s].unit : param.shape[dim] / shard->unit;
      const int64_t here = ranges_[dim][s].end - ranges_[dim][s].begin;
      if (units < ranks)
        for (int64_t o = 0; o < outer; ++o) {
          const int64_t begin = (o * shape_[dim] + at) * inner;
          shared_.push_back({.elements = {begin, begin + here * inner}, .axis = axis, .size = ranks / units});
        }
      at += here;
    }
  }
}

at::Tensor LocalPart::take(const at::Tensor& global) const {
  at::Tensor part = global;
  for (size_t d = 0; d < ranges_.size(); ++d) {
    const auto dim = static_cast<int64_t>(d);
    if (ranges_[d].size() == 1) {
      part = part.narrow(dim, ranges_[d][0].begin, ranges_[d][0].end - ranges_[d][0].begin);
      continue;
    }
    std::vector<at::Tensor> pieces;
    for (const Range& range : ranges_[d]) pieces.push_back(part.narrow(dim, range.begin, range.end - range.begin));
    part = at::cat(pieces, dim);
  }
  return part;
}

void LocalPart::put(const at::Tensor& part, const at::Tensor& global) const {
  const at::Tensor from = part.reshape({-1}), to = global.view({-1});
  for_stretches({0, size()}, [&](int64_t there, int64_t own, int64_t count) { to.narrow(0, there, count).copy_(from.narrow(0, own, count)); });
}

void LocalPart::for_stretches(Range elements, const std::function<void(int64_t, int64_t, int64_t)>& visit) const {
  if (elements.begin >= elements.end) return;
  if (shape_.empty()) return visit(0, 0, 1);
  // Everything inside the last cut dimension lies together.
  size_t last = 0;
  for (size_t d = 0; d < shape_.size(); ++d)
    if (shape_[d] != global_shape_[d]) last = d;
  int64_t inner = 1;
  for (size_t d = last + 1; d < shape_.size(); ++d) inner *= shape_[d];
  const int64_t rows = size() / (shape_[last] * inner);  // of the dimensions outside
  int64_t own = 0;
  for (int64_t row = 0; row < rows; ++row) {
    // The global number of this outer row.
    int64_t rest = row, global_row = 0, stride = 1;
    for (size_t d = last; d-- > 0;) {
      int64_t index = rest % shape_[d];
      rest /= shape_[d];
      for (const Range& range : ranges_[d]) {
        if (index < range.end - range.begin) {
          index += range.begin;
          break;
        }
        index -= range.end - range.begin;
      }
      global_row += index * stride;
      stride *= global_shape_[d];
    }
    for (const Range& range : ranges_[last]) {
      const int64_t count = (range.end - range.begin) * inner, global = (global_row * global_shape_[last] + range.begin) * inner;
      const int64_t begin = std::max(elements.begin, own), end = std::min(elements.end, own + count);
      if (begin < end) visit(global + begin - own, begin, end - begin);
      own += count;
    }
  }
}

}  // namespace tessera
