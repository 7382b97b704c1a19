// causal_conv1d on the GPU: tensors to pointers.
#include "layers/cuda/conv.hpp"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "layers/cuda/tensors.hpp"
#include "layers/cuda/table.hpp"

namespace tessera::gpu {
namespace {

constexpr const char* kOp = "causal_conv1d";
constexpr int64_t kFields = sizeof(ConvPiece) / sizeof(int64_t);

void add_pieces(std::vector<int64_t>& list, int64_t first, int64_t last, int64_t slot, int64_t resumes, int64_t most) {
  for (int64_t begin = first; begin < last; begin += most) list.insert(list.end(), {begin, std::min(begin + most, last), first, last, slot, resumes});
}

at::Tensor pieces_of(const std::vector<int64_t>& rows, int64_t most, const at::Tensor& like) {
  return device_list("conv pieces", most, rows, like, [&] {
    std::vector<int64_t> list;
    for (size_t s = 0; s + 1 < rows.size(); ++s) add_pieces(list, rows[s], rows[s + 1], 0, 0, most);
    return list;
  });
}

// Tensors as kernels take them, kept for as long as their pointers are used.
struct Prepared {
  Prepared(const at::Tensor& x_nc, const at::Tensor& weight_c1w, const at::Tensor& bias_c, const at::Tensor& pieces, bool silu)
      : x(unit_stride(x_nc.detach())), pieces(pieces) {
    const bool own = x.scalar_type() == at::kBFloat16 && weight_c1w.scalar_type() == at::kBFloat16 && (!bias_c.defined() || bias_c.scalar_type() == at::kBFloat16);
    const auto parameter = [&](const at::Tensor& t) { return t.detach().to(own ? at::kBFloat16 : at::kFloat).contiguous(); };
    weight = parameter(weight_c1w);
    if (bias_c.defined()) bias = parameter(bias_c);
    in = {.x = x.const_data_ptr(), .weight = weight.const_data_ptr(), .bias = bias.defined() ? bias.const_data_ptr() : nullptr, .type = type_of(x),
          .weight_type = type_of(weight), .C = x.size(1), .W = weight.size(2), .x_stride = x.stride(0), .silu = silu,
          .pieces = reinterpret_cast<const ConvPiece*>(pieces.const_data_ptr<int64_t>()), .num_pieces = pieces.numel() / kFields};
  }
  at::Tensor x, weight, bias, pieces;
  ConvInputs in{};
};

at::Tensor forward(const at::Tensor& x_nc, const at::Tensor& weight_c1w, const at::Tensor& bias_c, const std::vector<int64_t>& rows, bool silu) {
  const Launches launches(kOp, x_nc);
  const Prepared p(x_nc, weight_c1w, bias_c, pieces_of(rows, conv_piece_rows(x_nc.size(0), x_nc.size(1)), x_nc), silu);
  at::Tensor out = at::empty(p.x.sizes(), p.x.options());
  launches.check(conv_forward(p.in, out.mutable_data_ptr(), nullptr, false, launches.stream()));
  return out;
}

at::Tensor with_state(const at::Tensor& x_nc, const at::Tensor& weight_c1w, const at::Tensor& bias_c, const Spans& spans, bool silu, const at::Tensor& state_scw) {
  const Launches launches(kOp, x_nc);
  const int64_t most = conv_piece_rows(x_nc.size(0), x_nc.size(1));
  std::vector<int64_t> list, whole;
  for (int64_t s = 0; s < spans.size(); ++s) {
    const Span& span = spans.list()[s];
    const int64_t first = spans.rows()[s], last = spans.rows()[s + 1];
    add_pieces(list, first, last, span.state_slot, span.start > 0, most);
    add_pieces(whole, first, last, span.state_slot, span.start > 0, last - first);
  }
  const bool whole_spans = list.size() == whole.size();
  Prepared p(x_nc, weight_c1w, bias_c, to_device(list, x_nc.device()), silu);
  at::Tensor out = at::empty(p.x.sizes(), p.x.options());
  void* const state = state_scw.numel() > 0 ? state_scw.mutable_data_ptr() : nullptr;
  launches.check(conv_forward(p.in, out.mutable_data_ptr(), state, whole_spans, launches.stream()));
  if (state && !whole_spans) {
    const at::Tensor there = to_device(whole, x_nc.device());
    p.in.pieces = reinterpret_cast<const ConvPiece*>(there.const_data_ptr<int64_t>()), p.in.num_pieces = spans.size();
    launches.check(conv_state(p.in, state, launches.stream()));
  }
  return out;
}

std::array<at::Tensor, 3> backward(const at::Tensor& x_nc, const at::Tensor& dout_nc, const at::Tensor& weight_c1w, const at::Tensor& bias_c,
                                   const std::vector<int64_t>& rows, bool silu) {
  const Launches launches(kOp, x_nc);
  const Prepared p(x_nc, weight_c1w, bias_c, pieces_of(rows, conv_backward_piece_rows(x_nc.size(0), x_nc.size(1)), x_nc), silu);
  const at::Tensor dout = unit_stride(dout_nc);
  const int64_t C = p.in.C, W = p.in.W, groups = conv_groups(p.in.num_pieces, C);
  const auto fp32 = p.x.options().dtype(at::kFloat);
  at::Tensor dx = at::empty(p.x.sizes(), p.x.options()), partials = at::empty({groups, C * (W + 1)}, fp32), scratch = at::empty({conv_scratch(p.x.size(0), C, W)}, fp32);
  launches.check(conv_backward(p.in, dout.const_data_ptr(), dout.stride(0), dx.mutable_data_ptr(), partials.mutable_data_ptr<float>(),
                               scratch.mutable_data_ptr<float>(), launches.stream()));
  const auto [dw, db] = sum_partials(launches, partials, weight_c1w, bias_c);
  return {dx, dw, db};
}

}  // namespace

void add_conv(GpuKernels& table) {
  table.conv_forward = forward;
  table.conv_with_state = with_state;
  table.conv_backward = backward;
}

}  // namespace tessera::gpu
