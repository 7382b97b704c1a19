// Attention to a cache on the GPU: tensors to pointers.
#include "layers/cuda/attention_cache.hpp"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "layers/cuda/table.hpp"
#include "layers/cuda/tensors.hpp"

namespace tessera::gpu {
namespace {

void attend_cache(const at::Tensor& q_nhp, const Spans& spans, double scale, int64_t window, const at::Tensor& k_cache_slkp, const at::Tensor& v_cache_slkp, const at::Tensor& out_nhp) {
  if (q_nhp.numel() == 0) return;
  const Launches launches("attention", q_nhp);
  const at::Tensor q = q_nhp.contiguous(), table = spans.table(q.device()), rows = device_list("first rows", 0, spans.rows(), q, [&] { return spans.rows(); });
  CacheAttention in{.q = q.const_data_ptr(), .k = k_cache_slkp.const_data_ptr(), .v = v_cache_slkp.const_data_ptr(), .type = type_of(q), .H = q.size(1), .K = k_cache_slkp.size(2), .P = q.size(2),
                    .L = k_cache_slkp.size(1), .spans = {.table = table.const_data_ptr<int32_t>(), .rows = rows.const_data_ptr<int64_t>(), .num_spans = spans.size(), .longest = 0, .most_keys = 0},
                    .scale = static_cast<float>(scale), .window = window};
  for (const Span& span : spans.list()) in.spans.longest = std::max(in.spans.longest, span.length), in.spans.most_keys = std::max(in.spans.most_keys, span.start + span.length);
  at::Tensor partial = at::empty({cache_partial(in)}, q.options().dtype(at::kFloat));
  launches.check(attend_cache(in, partial.mutable_data_ptr<float>(), out_nhp.mutable_data_ptr(), launches.stream()));
}

void write_cache(const at::Tensor& k_nkp, const at::Tensor& v_nkp, const Spans& spans, const at::Tensor& k_cache_slkp, const at::Tensor& v_cache_slkp) {
  if (k_nkp.numel() == 0) return;
  const Launches launches("attention", k_cache_slkp);
  const at::Tensor k = k_nkp.detach().to(k_cache_slkp.scalar_type()).contiguous(), v = v_nkp.detach().to(v_cache_slkp.scalar_type()).contiguous();
  const at::Device device = k_cache_slkp.device();
  launches.check(write_cache(k.const_data_ptr(), v.const_data_ptr(), type_of(k), k.size(0), k.size(1) * k.size(2), k_cache_slkp.size(1), spans.table(device).const_data_ptr<int32_t>(),
                             spans.span_index_n(device).const_data_ptr<int64_t>(), spans.positions_n(device).const_data_ptr<int64_t>(), k_cache_slkp.mutable_data_ptr(),
                             v_cache_slkp.mutable_data_ptr(), launches.stream()));
}

}  // namespace

void add_attention_cache(GpuKernels& table) {
  table.attend_cache = attend_cache;
  table.write_cache = write_cache;
}

}  // namespace tessera::gpu
