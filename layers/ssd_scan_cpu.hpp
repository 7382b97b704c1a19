// The CPU kernels of ssd_scan, on raw fp32 or bf16 rows. Internal to layers.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "layers/ssd_scan.hpp"

namespace tessera::ssd_cpu {

// xbc_nc: stride 1 along channels, fp32 or bf16; the rest contiguous fp32. `rows`: first row of every span, and N.
struct Inputs {
  at::Tensor xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h;
  SsdSizes sizes;
  std::vector<int64_t> rows;
};

struct Gradients {
  at::Tensor xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h;  // xbc_nc in its own dtype, the rest fp32
};

// spans, state_shps: for the decode state, or null and undefined.
at::Tensor forward(const Inputs& in, const Spans* spans, const at::Tensor& state_shps);
Gradients backward(const Inputs& in, const at::Tensor& dy_ni);
// All spans of length 1: one step of the recurrence.
at::Tensor step(const Inputs& in, const Spans& spans, const at::Tensor& state_shps);

}  // namespace tessera::ssd_cpu
