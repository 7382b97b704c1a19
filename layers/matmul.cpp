#include "layers/matmul.hpp"

#include <ATen/Config.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "layers/few_rows.hpp"

// Exported by libtorch_cpu, declared in no installed header: out = beta * out + alpha * mat1 @ mat2.
namespace at::native {
void mkldnn_matmul(const Tensor& mat1, const Tensor& mat2, const Tensor& result, float beta, float alpha);
}

namespace tessera {

namespace {

// Below this many multiply-adds the call's overhead outweighs the kernel.
constexpr int64_t kSmall = int64_t{1} << 20;
// oneDNN compiles a kernel for every shape and keeps a thousand of them. Rows and inner sizes that follow the data (an expert's tokens, valid
// targets) go to it in multiples of this, the rest padded with zeros to one such step, so that they make few shapes.
constexpr int64_t kStep = 64;

// oneDNN takes bf16 where the CPU has these; elsewhere at::mm emulates it.
bool bf16_by_onednn() {
#if defined(__x86_64__)
  static const bool yes = AT_MKLDNN_ENABLED() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return yes;
#else
  return false;
#endif
}

// fp32 goes to MKL unless that is slow here.
bool fp32_by_onednn() {
#if defined(__x86_64__)
  static const bool yes = AT_MKL_ENABLED() && AT_MKLDNN_ENABLED() && !__builtin_cpu_is("intel") && __builtin_cpu_supports("avx2");
  return yes;
#else
  return false;
#endif
}

bool row_or_column_major(const at::Tensor& t) { return (t.stride(1) == 1 && t.stride(0) >= t.size(1)) || (t.stride(0) == 1 && t.stride(1) >= t.size(0)); }

void onednn(at::Tensor& out_mn, const at::Tensor& a_mk, const at::Tensor& b_kn, bool add) { at::native::mkldnn_matmul(a_mk, b_kn, out_mn, add ? 1.f : 0.f, 1.f); }

}  // namespace

void product_into(at::Tensor& out_mn, const at::Tensor& a_mk, const at::Tensor& b_kn, bool add) {
  const int64_t rows = a_mk.size(0), inner = a_mk.size(1), columns = b_kn.size(1);
  if (!add && rows <= kFewRows && b_kn.stride(0) == 1 && few_rows_fit(out_mn, a_mk, b_kn.t())) return few_rows(out_mn, a_mk, b_kn.t());
  const bool stepped = a_mk.is_cpu() && a_mk.scalar_type() == b_kn.scalar_type() && out_mn.scalar_type() == a_mk.scalar_type() &&
                       ((a_mk.scalar_type() == at::kBFloat16 && bf16_by_onednn()) || (a_mk.scalar_type() == at::kFloat && fp32_by_onednn())) && rows >= kStep && inner >= kStep &&
                       rows * inner * columns >= kSmall && out_mn.is_contiguous() && row_or_column_major(a_mk) && row_or_column_major(b_kn);
  if (!stepped) {
    if (add) at::addmm_out(out_mn, out_mn, a_mk, b_kn);
    else at::mm_out(out_mn, a_mk, b_kn);
    return;
  }
  // What follows the data are the rows of activations: of a itself, or, where a is transposed for a weight's gradient, the inner size. The other is the model's.
  const bool gradient = a_mk.stride(1) != 1;
  const int64_t whole_rows = gradient ? rows : rows / kStep * kStep, whole_inner = gradient ? inner / kStep * kStep : inner, more_rows = rows - whole_rows, more_inner = inner - whole_inner;
  at::Tensor top = out_mn.narrow(0, 0, whole_rows);
  const at::Tensor a_top = a_mk.narrow(0, 0, whole_rows);
  onednn(top, a_top.narrow(1, 0, whole_inner), b_kn.narrow(0, 0, whole_inner), add);
  if (more_inner) {
    const at::Tensor a_pad = at::zeros({kStep, whole_rows}, a_mk.options()), b_pad = at::zeros({kStep, columns}, b_kn.options());
    a_pad.narrow(0, 0, more_inner).copy_(a_top.narrow(1, whole_inner, more_inner).t());
    b_pad.narrow(0, 0, more_inner).copy_(b_kn.narrow(0, whole_inner, more_inner));
    onednn(top, a_pad.t(), b_pad, true);
  }
  if (more_rows) {
    const at::Tensor a_pad = at::zeros({kStep, inner}, a_mk.options());
    a_pad.narrow(0, 0, more_rows).copy_(a_mk.narrow(0, whole_rows, more_rows));
    at::Tensor bottom = at::empty({kStep, columns}, out_mn.options());
    onednn(bottom, a_pad, b_kn, false);
    const at::Tensor rest = out_mn.narrow(0, whole_rows, more_rows), made = bottom.narrow(0, 0, more_rows);
    if (add) rest.add_(made);
    else rest.copy_(made);
  }
}

at::Tensor product(const at::Tensor& a_mk, const at::Tensor& b_kn) {
  at::Tensor out_mn = at::empty({a_mk.size(0), b_kn.size(1)}, a_mk.options().requires_grad(false));
  product_into(out_mn, a_mk, b_kn);
  return out_mn;
}

}  // namespace tessera
