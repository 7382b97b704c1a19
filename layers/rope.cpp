#include "layers/rope.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sin.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "tessera/error.hpp"

namespace tessera {

at::Tensor rope(const at::Tensor& x_nhp, const at::Tensor& positions_n, double theta) {
  if (x_nhp.dim() != 3 || x_nhp.size(2) % 2 != 0 || positions_n.dim() != 1 || positions_n.size(0) != x_nhp.size(0))
    throw Error(ExitCode::kRuntime, fmt::format("[rope] x must be [N, H, P] with an even P and positions [N], got x [{}] and positions [{}]",
                                                fmt::join(x_nhp.sizes(), ", "), fmt::join(positions_n.sizes(), ", ")));
  const auto half = x_nhp.size(2) / 2;
  const auto acc = x_nhp.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  // Angles in fp64: a position of a million turns by a million radians.
  const auto frequency_p = at::pow(theta, at::arange(half, x_nhp.options().dtype(at::kDouble)) * (-1.0 / static_cast<double>(half)));
  const auto angle_n1p = (positions_n.to(at::kDouble).unsqueeze(1) * frequency_p).unsqueeze(1);
  const auto cos_n1p = angle_n1p.cos().to(acc), sin_n1p = angle_n1p.sin().to(acc);
  const auto low_nhp = x_nhp.narrow(2, 0, half).to(acc), high_nhp = x_nhp.narrow(2, half, half).to(acc);
  return at::cat({low_nhp * cos_n1p - high_nhp * sin_n1p, high_nhp * cos_n1p + low_nhp * sin_n1p}, 2).to(x_nhp.scalar_type());
}

}  // namespace tessera
