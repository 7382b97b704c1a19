// ssd_scan on the GPU: tensors to pointers, and the order of the passes.
#include "layers/cuda/ssd_scan.hpp"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "layers/cuda/table.hpp"
#include "layers/cuda/tensors.hpp"
#include "layers/ssd_scan.hpp"

namespace tessera::gpu {
namespace {

constexpr const char* kOp = "ssd_scan";
constexpr int64_t kChunkFields = sizeof(ScanChunk) / sizeof(int64_t), kSpanFields = sizeof(ScanSpan) / sizeof(int64_t);

at::Tensor chunk_list(const std::vector<int64_t>& rows, int64_t Q, const at::Tensor& like) {
  return device_list("scan chunks", Q, rows, like, [&] {
    std::vector<int64_t> list;
    for (size_t s = 0; s + 1 < rows.size(); ++s)
      for (int64_t row = rows[s]; row < rows[s + 1]; row += Q)
        list.insert(list.end(), {row, std::min(Q, rows[s + 1] - row), row == rows[s], row + Q >= rows[s + 1]});
    return list;
  });
}

std::vector<int64_t> span_fields(const std::vector<int64_t>& rows, int64_t Q, const Spans* spans) {
  std::vector<int64_t> list;
  for (size_t s = 0, first = 0; s + 1 < rows.size(); ++s) {
    const int64_t count = (rows[s + 1] - rows[s] + Q - 1) / Q;
    list.insert(list.end(), {static_cast<int64_t>(first), count, spans ? spans->list()[s].state_slot : 0, spans ? spans->list()[s].start > 0 : 0});
    first += static_cast<size_t>(count);
  }
  return list;
}

// Tensors as kernels take them, kept for as long as their pointers are used, and the decays.
struct Prepared {
  Prepared(const Launches& launches, const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h,
           const at::Tensor& D_h, const SsdSizes& z)
      : launches(launches), xbc(unit_stride(xbc_nc.detach())) {
    const bool own_dt = dt_nh.scalar_type() == at::kFloat || dt_nh.scalar_type() == at::kBFloat16;
    const auto vector = [](const at::Tensor& t) { return t.detach().to(at::kFloat).contiguous(); };
    dt = unit_stride(own_dt ? dt_nh.detach() : dt_nh.detach().to(at::kFloat));
    dt_bias = vector(dt_bias_h), A_log = vector(A_log_h), D = vector(D_h);
    in = {.xbc = xbc.const_data_ptr(), .dt = dt.const_data_ptr(), .dt_bias = dt_bias.const_data_ptr<float>(), .A_log = A_log.const_data_ptr<float>(),
          .D = D.const_data_ptr<float>(), .type = type_of(xbc), .dt_type = type_of(dt), .H = z.num_heads, .P = z.head_dim, .G = z.num_groups, .S = z.state_size,
          .xbc_stride = xbc.stride(0), .dt_stride = dt.stride(0), .dt_min = static_cast<float>(z.dt_min), .dt_max = static_cast<float>(z.dt_max),
          .chunks = nullptr, .spans = nullptr, .num_chunks = 0, .num_spans = 0, .wide = false, .step = nullptr, .decay = nullptr};
    Q = scan_chunk(in.type);
  }
  // other: one more pointer of the caller's; with_state: where there is a decode state.
  void cut(const std::vector<int64_t>& rows, const void* other, const Spans* with_state = nullptr) {
    in.wide = scan_wide(in, other);
    chunks = chunk_list(rows, Q, xbc);
    const auto fields = [&] { return span_fields(rows, Q, with_state); };
    spans = with_state ? to_device(fields(), xbc.device()) : device_list("scan spans", Q, rows, xbc, fields);
    in.chunks = reinterpret_cast<const ScanChunk*>(chunks.const_data_ptr<int64_t>()), in.num_chunks = chunks.numel() / kChunkFields;
    in.spans = reinterpret_cast<const ScanSpan*>(spans.const_data_ptr<int64_t>()), in.num_spans = spans.numel() / kSpanFields;
    decays = fp32({2, in.num_chunks, in.H, Q});
    in.step = decays.mutable_data_ptr<float>(), in.decay = in.step + decays.numel() / 2;
    launches.check(scan_steps(in, launches.stream()));
  }
  at::Tensor fp32(at::IntArrayRef sizes) const { return at::empty(sizes, xbc.options().dtype(at::kFloat)); }
  // The states that enter the chunks.
  at::Tensor entering(float* state) const {
    at::Tensor states = at::empty({in.num_chunks, in.H, in.P, in.S}, xbc.options());
    launches.check(scan_states(in, states.mutable_data_ptr(), launches.stream()));
    launches.check(scan_pass(in, states.mutable_data_ptr(), state, launches.stream()));
    return states;
  }

  const Launches& launches;
  at::Tensor xbc, dt, dt_bias, A_log, D, chunks, spans, decays;
  ScanInputs in{};
  int64_t Q = 0;
};

at::Tensor outputs(const Prepared& p, float* state) {
  const at::Tensor states = p.entering(state);
  at::Tensor y = at::empty({p.xbc.size(0), p.in.H * p.in.P}, p.xbc.options());
  p.launches.check(scan_outputs(p.in, states.const_data_ptr(), y.mutable_data_ptr(), p.launches.stream()));
  return y;
}

at::Tensor forward(const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h, const at::Tensor& D_h,
                   const SsdSizes& sizes, const std::vector<int64_t>& rows) {
  const Launches launches(kOp, xbc_nc);
  Prepared p(launches, xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h, sizes);
  p.cut(rows, nullptr);
  return outputs(p, nullptr);
}

at::Tensor with_state(const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h, const at::Tensor& D_h,
                      const SsdSizes& sizes, const Spans& spans, const at::Tensor& state_shps) {
  const Launches launches(kOp, xbc_nc);
  Prepared p(launches, xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h, sizes);
  float* const state = state_shps.mutable_data_ptr<float>();
  if (spans.num_tokens() > spans.size()) {
    p.cut(spans.rows(), state, &spans);
    return outputs(p, state);
  }
  std::vector<int64_t> slots;
  for (const Span& span : spans.list()) slots.insert(slots.end(), {span.state_slot, span.start > 0});
  const at::Tensor there = to_device(slots, xbc_nc.device());
  p.in.num_spans = spans.size();
  at::Tensor y = at::empty({p.xbc.size(0), p.in.H * p.in.P}, p.xbc.options());
  launches.check(scan_step(p.in, there.const_data_ptr<int64_t>(), state, y.mutable_data_ptr(), launches.stream()));
  return y;
}

std::array<at::Tensor, 5> backward(const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h,
                                   const at::Tensor& D_h, const SsdSizes& sizes, const std::vector<int64_t>& rows, const at::Tensor& dy_ni) {
  const Launches launches(kOp, xbc_nc);
  Prepared p(launches, xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h, sizes);
  const at::Tensor dy = dy_ni.detach().to(p.xbc.scalar_type()).contiguous();
  p.cut(rows, dy.const_data_ptr());
  const at::Tensor entering = p.entering(nullptr);
  at::Tensor leaving = at::empty(entering.sizes(), entering.options()), dxbc = at::empty(xbc_nc.sizes(), xbc_nc.options());
  at::Tensor ddt = at::empty({p.xbc.size(0), p.in.H}, p.dt.options());
  const int64_t M = p.in.num_chunks, H = p.in.H, slices = scan_slices(p.in.type, p.in.S);
  at::Tensor by_token = p.fp32({2 * (1 + slices) + 2, M, H, p.Q}), ends = p.fp32({M, H, scan_end_parts(p.in)}), gaps = p.fp32({M, H, scan_gap_parts(p.in.type)}),
             partials = p.fp32({M, 3 * H}), vectors = p.fp32({3 * H});
  const auto slice = [&](int64_t i) { return by_token.mutable_data_ptr<float>() + i * M * H * p.Q; };
  const ScanSums sums{.rows = slice(0), .columns = slice(1 + slices), .ends = ends.mutable_data_ptr<float>(), .gaps = gaps.mutable_data_ptr<float>(),
                      .diagonal = slice(2 * (1 + slices)), .own = slice(2 * (1 + slices) + 1)};
  const Stream stream = launches.stream();
  launches.check(scan_gradient_states(p.in, dy.const_data_ptr(), entering.const_data_ptr(), leaving.mutable_data_ptr(), sums, stream));
  launches.check(scan_gradient_x(p.in, dy.const_data_ptr(), leaving.const_data_ptr(), dxbc.mutable_data_ptr(), stream));
  launches.check(scan_gradient_bc(p.in, dy.const_data_ptr(), entering.const_data_ptr(), leaving.const_data_ptr(), dxbc.mutable_data_ptr(), sums, stream));
  launches.check(scan_gradient_steps(p.in, sums, ddt.mutable_data_ptr(), partials.mutable_data_ptr<float>(), stream));
  const at::Tensor all = sum_partials(launches, partials, vectors)[0];
  const auto part = [&](int64_t i, const at::Tensor& like) { return all.narrow(0, i * H, H).to(like.scalar_type()); };
  return {dxbc, ddt.to(dt_nh.scalar_type()), part(0, dt_bias_h), part(1, A_log_h), part(2, D_h)};
}

}  // namespace

void add_scan(GpuKernels& table) {
  table.scan_forward = forward;
  table.scan_with_state = with_state;
  table.scan_backward = backward;
}

}  // namespace tessera::gpu
