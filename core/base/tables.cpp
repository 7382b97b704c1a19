#include "tessera/tables.hpp"

#include <algorithm>

#include <fmt/format.h>

namespace tessera {

int64_t degree(const Mesh& mesh, Axis axis) {
  switch (axis) {
    case Axis::kTensor: return mesh.tp;
    case Axis::kExpert: return mesh.ep;
    case Axis::kExpertTensor: return mesh.etp;
  }
  return 1;
}

const char* axis_name(Axis axis) {
  switch (axis) {
    case Axis::kTensor: return "tp";
    case Axis::kExpert: return "ep";
    case Axis::kExpertTensor: return "etp";
  }
  return "?";
}

int64_t num_tokens(const Documents& documents) {
  int64_t total = 0;
  for (const DocumentRun& run : documents) total += run.length * run.count;
  return total;
}

int64_t num_elements(const std::vector<int64_t>& shape) {
  int64_t total = 1;
  for (int64_t size : shape) total *= size;
  return total;
}

Cost& Cost::operator+=(const Cost& other) {
  matmul += other.matmul, mixing += other.mixing, elementwise += other.elementwise;
  bytes += other.bytes, activations += other.activations;
  return *this;
}

std::optional<std::vector<Range>> shard_ranges(const Param& param, const Shard& shard, int64_t degree, int64_t rank, std::string* why) {
  auto segments = param.segments;
  const bool packed = !segments.empty() && !param.shards.empty() && shard.dim == param.shards[0].dim && shard.axis == param.shards[0].axis;
  if (!packed) segments = {{.name = "", .size = param.shape[static_cast<size_t>(shard.dim)], .unit = shard.unit}};
  std::vector<Range> ranges;
  int64_t base = 0;
  for (const Segment& segment : segments) {
    const int64_t units = segment.size / segment.unit;
    const std::string name = param.name + (segment.name.empty() ? "" : "." + segment.name);
    int64_t begin = 0, end = 0;
    if (units >= degree) {
      if (units % degree) {
        if (why) *why = fmt::format("{}: {} parts of {} must divide by {} = {}, got {} % {} = {}", name, units, segment.unit, axis_name(shard.axis), degree, units, degree, units % degree);
        return std::nullopt;
      }
      begin = units / degree * rank, end = begin + units / degree;
    } else {
      if (units == 0 || degree % units) {
        if (why) *why = fmt::format("{}: {} = {} must be a multiple of its {} parts of {}", name, axis_name(shard.axis), degree, units, segment.unit);
        return std::nullopt;
      }
      begin = rank / (degree / units), end = begin + 1;
    }
    ranges.push_back({base + begin * segment.unit, base + end * segment.unit});
    base += segment.size;
  }
  return ranges;
}

std::optional<std::vector<int64_t>> local_shape(const Param& param, const Mesh& mesh, std::string* why) {
  auto shape = param.shape;
  for (const Shard& shard : param.shards) {
    auto ranges = shard_ranges(param, shard, degree(mesh, shard.axis), 0, why);
    if (!ranges) return std::nullopt;
    int64_t length = 0;
    for (const Range& range : *ranges) length += range.end - range.begin;
    shape[static_cast<size_t>(shard.dim)] = length;
  }
  return shape;
}

}  // namespace tessera
