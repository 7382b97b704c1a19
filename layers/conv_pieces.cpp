#include <ATen/ops/cat.h>

#include "layers/conv.hpp"
#include "layers/pieces.hpp"

namespace tessera {

at::Tensor causal_conv1d(Context& ctx, const at::Tensor& x_nc, const at::Tensor& weight_c1w, const at::Tensor& bias_c, bool silu,
                         const at::Tensor& state_scw) {
  if (!ctx.cut()) return causal_conv1d(x_nc, weight_c1w, bias_c, ctx.spans(), silu, state_scw);
  require_pieces("causal_conv1d", ctx, x_nc, state_scw.defined());
  const RowsBefore halo(ctx, x_nc, weight_c1w.size(weight_c1w.dim() - 1) - 1);
  // A chunk behind the rows that it needs: its first piece becomes a document of its own, longer by the halo.
  std::vector<at::Tensor> inputs, outputs;
  std::vector<int64_t> lengths;
  for (const Span& span : ctx.spans().list()) lengths.push_back(span.length);
  for (const int64_t which : {0, 1}) {
    const Piece& chunk = halo.own(which);
    inputs.push_back(halo(which));
    inputs.push_back(x_nc.narrow(0, chunk.local, chunk.length));
    if (chunk.before == 0) continue;
    size_t first = 0;
    while (ctx.spans().rows()[first] < chunk.local) ++first;
    lengths[first] += halo.count(which);
  }
  const at::Tensor y_nc = causal_conv1d(at::cat(inputs, 0), weight_c1w, bias_c, Spans::documents(lengths), silu);
  for (int64_t which = 0, row = 0; which < 2; ++which) {
    row += halo.count(which);
    outputs.push_back(y_nc.narrow(0, row, halo.own(which).length));
    row += halo.own(which).length;
  }
  return at::cat(outputs, 0);
}

}  // namespace tessera
