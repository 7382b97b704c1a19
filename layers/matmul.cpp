#include "layers/matmul.hpp"

#include <ATen/Config.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

// Exported by libtorch_cpu, declared in no installed header: out = beta * out + alpha * mat1 @ mat2.
namespace at::native {
void mkldnn_matmul(const Tensor& mat1, const Tensor& mat2, const Tensor& result, float beta, float alpha);
}

namespace tessera {

namespace {

// Below this many multiply-adds the call's overhead outweighs the kernel.
constexpr int64_t kSmall = int64_t{1} << 20;
// oneDNN compiles a kernel for every shape and keeps a thousand of them. Rows and inner sizes that follow the data (an expert's tokens, valid
// targets) go to it in multiples of this, so that they make few shapes; MKL takes the rest.
constexpr int64_t kStep = 64;

bool mkl_is_slow() {
#if defined(__x86_64__)
  static const bool slow = AT_MKL_ENABLED() && AT_MKLDNN_ENABLED() && !__builtin_cpu_is("intel") && __builtin_cpu_supports("avx2");
  return slow;
#else
  return false;
#endif
}

bool row_or_column_major(const at::Tensor& t) { return (t.stride(1) == 1 && t.stride(0) >= t.size(1)) || (t.stride(0) == 1 && t.stride(1) >= t.size(0)); }

}  // namespace

void product_into(at::Tensor& out_mn, const at::Tensor& a_mk, const at::Tensor& b_kn) {
  const int64_t rows = a_mk.size(0), inner = a_mk.size(1);
  const bool onednn = a_mk.scalar_type() == at::kFloat && b_kn.scalar_type() == at::kFloat && a_mk.is_cpu() && rows >= kStep && inner >= kStep &&
                      rows * inner * b_kn.size(1) >= kSmall && out_mn.is_contiguous() && row_or_column_major(a_mk) && row_or_column_major(b_kn) && mkl_is_slow();
  if (!onednn) {
    at::mm_out(out_mn, a_mk, b_kn);
    return;
  }
  const int64_t whole_rows = rows / kStep * kStep, whole_inner = inner / kStep * kStep;
  at::Tensor top = out_mn.narrow(0, 0, whole_rows);
  at::native::mkldnn_matmul(a_mk.narrow(0, 0, whole_rows).narrow(1, 0, whole_inner), b_kn.narrow(0, 0, whole_inner), top, 0.f, 1.f);
  if (whole_inner < inner)
    at::addmm_out(top, top, a_mk.narrow(0, 0, whole_rows).narrow(1, whole_inner, inner - whole_inner), b_kn.narrow(0, whole_inner, inner - whole_inner));
  if (whole_rows < rows) {
    at::Tensor bottom = out_mn.narrow(0, whole_rows, rows - whole_rows);
    at::mm_out(bottom, a_mk.narrow(0, whole_rows, rows - whole_rows), b_kn);
  }
}

at::Tensor product(const at::Tensor& a_mk, const at::Tensor& b_kn) {
  at::Tensor out_mn = at::empty({a_mk.size(0), b_kn.size(1)}, a_mk.options().requires_grad(false));
  product_into(out_mn, a_mk, b_kn);
  return out_mn;
}

}  // namespace tessera
