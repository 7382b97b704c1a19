#include "layers/shift.hpp"

#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>

#include "tessera/device.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {

// Row of the token n ahead in the same document, -1 where the batch holds none: int64 [N] on the host.
at::Tensor rows_ahead(const Spans& spans, int64_t n) {
  if (n < 0) throw Error(ExitCode::kRuntime, fmt::format("[shift] the distance must not be negative, got {}", n));
  std::map<int64_t, std::vector<int64_t>> pieces;  // spans of every document
  for (int64_t i = 0; i < spans.size(); ++i) pieces[spans.list()[i].document].push_back(i);
  const auto out_n = at::empty({spans.num_tokens()}, at::kLong);
  int64_t* out = out_n.mutable_data_ptr<int64_t>();
  std::fill_n(out, out_n.numel(), int64_t{-1});
  for (const auto& [document, indices] : pieces)
    for (const auto to : indices)
      for (const auto from : indices) {
        const Span &a = spans.list()[from], &b = spans.list()[to];
        const auto begin = std::max(a.start, b.start - n), end = std::min(a.start + a.length, b.start + b.length - n);
        for (int64_t p = begin; p < end; ++p) out[spans.rows()[from] + p - a.start] = spans.rows()[to] + p + n - b.start;
      }
  return out_n;
}

void check_length(const char* name, const at::Tensor& t, const Spans& spans) {
  if (t.dim() != 1 || t.size(0) != spans.num_tokens())
    throw Error(ExitCode::kRuntime, fmt::format("[shift] {} must be [{}], got [{}]", name, spans.num_tokens(), fmt::join(t.sizes(), ", ")));
}

}  // namespace

at::Tensor shift_ids(const at::Tensor& ids_n, const Spans& spans, int64_t n, int64_t fill) {
  check_length("ids", ids_n, spans);
  const auto rows_n = to_device(rows_ahead(spans, n), ids_n.device());
  return ids_n.index_select(0, rows_n.clamp_min(0)).masked_fill(rows_n.lt(0), fill);
}

at::Tensor next_targets(const at::Tensor& ids_n, const at::Tensor& masked_n, const Spans& spans, int64_t offset) {
  if (!masked_n.defined()) return shift_ids(ids_n, spans, offset, -1);
  check_length("the mask", masked_n, spans);
  return shift_ids(ids_n.masked_fill(masked_n, -1), spans, offset, -1);
}

at::Tensor valid_after_shift(const at::Tensor& valid_n, const Spans& spans, int64_t n, at::Device device) {
  const auto rows_n = to_device(rows_ahead(spans, n), device);
  const auto found_n = rows_n.ge(0);
  if (!valid_n.defined()) return found_n;
  check_length("the mask of valid tokens", valid_n, spans);
  const auto valid = valid_n.to(device);
  return found_n.logical_and_(valid).logical_and_(valid.index_select(0, rows_n.clamp_min(0)));
}

}  // namespace tessera
