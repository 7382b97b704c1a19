#include "layers/norm.hpp"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "layers/gpu.hpp"
#include "layers/tile_gemm.hpp"
#include "layers/vector_math.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {

// Loops marked ivdep touch more arrays than the compiler cares to tell apart at run time; none overlap.
// Rows are cut into at most kBlocks blocks, whatever the number of threads: the weight's gradient is a sum of one partial sum a block.
constexpr int64_t kBlocks = 32;

struct Blocks {
  explicit Blocks(int64_t rows) : rows(rows), count(std::clamp<int64_t>(rows / 16, 1, kBlocks)) {}
  int64_t rows, count;
  int64_t begin(int64_t block) const { return rows * block / count; }
  // task(block, first row, end row)
  template <class Task>
  void run(Task task) const {
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) task(b, begin(b), begin(b + 1));
    });
  }
};

at::Tensor sum_partials(const std::vector<float>& partial, int64_t blocks, int64_t n, const at::Tensor& like) {
  at::Tensor out = at::empty({n}, like.options().dtype(at::kFloat));
  float* to = out.mutable_data_ptr<float>();
  std::copy_n(partial.begin(), n, to);
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t k = 0; k < n; ++k) to[k] += partial[b * n + k];
  return out.to(like.scalar_type());
}

float mean_square(const float* v, int64_t n, float eps) { return 1.0f / std::sqrt(tile_dot_any(v, v, n) / static_cast<float>(n) + eps); }

template <class Task>
void by_type(at::ScalarType type, Task task) {
  if (type == at::kBFloat16) task(static_cast<c10::BFloat16*>(nullptr));
  else task(static_cast<float*>(nullptr));
}

template <class T>
const T* row_of(const at::Tensor& t, int64_t row) { return t.const_data_ptr<T>() + row * t.stride(0); }
template <class T>
T* row_of_mutable(at::Tensor& t, int64_t row) { return t.mutable_data_ptr<T>() + row * t.stride(0); }

at::Tensor unit_stride(const at::Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

class RmsNorm : public torch::autograd::Function<RmsNorm> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x_nd, const at::Tensor& weight_d, double eps,
                            at::ScalarType out_dtype) {
    if (on_gpu(x_nd)) {
      const auto [out, rstd_n1] = gpu_kernels()->norm_forward(x_nd, {}, weight_d, x_nd.size(1), eps, out_dtype);
      ctx->save_for_backward({x_nd, weight_d, rstd_n1});
      return out;
    }
    const at::Tensor x = unit_stride(x_nd.detach()), weight = weight_d.detach().to(at::kFloat).contiguous();
    const int64_t N = x.size(0), D = x.size(1);
    at::Tensor out = at::empty({N, D}, x.options().dtype(out_dtype)), rstd_n = at::empty({N}, x.options().dtype(at::kFloat));
    const float* w = weight.const_data_ptr<float>();
    float* rstd = rstd_n.mutable_data_ptr<float>();
    by_type(x.scalar_type(), [&](auto* in_type) {
      by_type(out_dtype, [&](auto* out_type) {
        using In = std::remove_pointer_t<decltype(in_type)>;
        using Out = std::remove_pointer_t<decltype(out_type)>;
        Blocks(N).run([&](int64_t, int64_t begin, int64_t end) {
          std::vector<float> v(D);
          for (int64_t r = begin; r < end; ++r) {
            const In* from = row_of<In>(x, r);
            Out* to = row_of_mutable<Out>(out, r);
            for (int64_t k = 0; k < D; ++k) v[k] = vec::load(from + k);
            const float scale = rstd[r] = mean_square(v.data(), D, static_cast<float>(eps));
#pragma GCC ivdep
            for (int64_t k = 0; k < D; ++k) vec::store(to + k, v[k] * scale * w[k]);
          }
        });
      });
    });
    ctx->save_for_backward({x_nd, weight_d, rstd_n});
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    if (on_gpu(saved[0])) {
      const auto grad = gpu_kernels()->norm_backward(saved[0], {}, saved[1], saved[0].size(1), saved[2], grads[0]);
      return {grad[0], grad[2], at::Tensor(), at::Tensor()};
    }
    const at::Tensor x = unit_stride(saved[0]), weight = saved[1].to(at::kFloat).contiguous(), dout = unit_stride(grads[0]);
    const int64_t N = x.size(0), D = x.size(1);
    at::Tensor dx = at::empty({N, D}, x.options());
    const Blocks blocks(N);
    std::vector<float> partial(blocks.count * D, 0.0f);
    const float *w = weight.const_data_ptr<float>(), *rstd = saved[2].const_data_ptr<float>();
    by_type(x.scalar_type(), [&](auto* in_type) {
      by_type(dout.scalar_type(), [&](auto* out_type) {
        using In = std::remove_pointer_t<decltype(in_type)>;
        using Out = std::remove_pointer_t<decltype(out_type)>;
        blocks.run([&](int64_t block, int64_t begin, int64_t end) {
          std::vector<float> normed(D), wg(D);
          float* dw = partial.data() + block * D;
          for (int64_t r = begin; r < end; ++r) {
            const In* from = row_of<In>(x, r);
            const Out* g = row_of<Out>(dout, r);
            In* to = row_of_mutable<In>(dx, r);
            const float scale = rstd[r];
#pragma GCC ivdep
            for (int64_t k = 0; k < D; ++k) {
              const float grad = vec::load(g + k);
              normed[k] = vec::load(from + k) * scale;
              wg[k] = grad * w[k];
              dw[k] += grad * normed[k];
            }
            const float mean = tile_dot_any(normed.data(), wg.data(), D) / static_cast<float>(D);
#pragma GCC ivdep
            for (int64_t k = 0; k < D; ++k) vec::store(to + k, scale * (wg[k] - normed[k] * mean));
          }
        });
      });
    });
    return {dx, sum_partials(partial, blocks.count, D, saved[1]), at::Tensor(), at::Tensor()};
  }
};

class GatedRmsNorm : public torch::autograd::Function<GatedRmsNorm> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& y_ni, const at::Tensor& z_ni, const at::Tensor& weight_i,
                            int64_t group_size, double eps, at::ScalarType out_dtype) {
    ctx->saved_data["group_size"] = group_size;
    if (on_gpu(y_ni)) {
      const auto [out, rstd_ng] = gpu_kernels()->norm_forward(y_ni, z_ni, weight_i, group_size, eps, out_dtype);
      ctx->save_for_backward({y_ni, z_ni, weight_i, rstd_ng});
      return out;
    }
    const at::Tensor y = unit_stride(y_ni.detach()), z = unit_stride(z_ni.detach()), weight = weight_i.detach().to(at::kFloat).contiguous();
    const int64_t N = y.size(0), I = y.size(1), groups = I / group_size;
    at::Tensor out = at::empty({N, I}, y.options().dtype(out_dtype)), rstd_ng = at::empty({N, groups}, y.options());
    const float* w = weight.const_data_ptr<float>();
    float* rstd = rstd_ng.mutable_data_ptr<float>();
    by_type(z.scalar_type(), [&](auto* z_type) {
      by_type(out_dtype, [&](auto* out_type) {
        using Z = std::remove_pointer_t<decltype(z_type)>;
        using Out = std::remove_pointer_t<decltype(out_type)>;
        Blocks(N).run([&](int64_t, int64_t begin, int64_t end) {
          std::vector<float> v(I);
          for (int64_t r = begin; r < end; ++r) {
            const float* from = row_of<float>(y, r);
            const Z* gate = row_of<Z>(z, r);
            Out* to = row_of_mutable<Out>(out, r);
#pragma GCC ivdep
            for (int64_t k = 0; k < I; ++k) {
              const float g = vec::load(gate + k);
              v[k] = from[k] * (g * vec::sigmoid(g));
            }
            for (int64_t q = 0; q < groups; ++q) {
              const float* part = v.data() + q * group_size;
              const float scale = rstd[r * groups + q] = mean_square(part, group_size, static_cast<float>(eps));
#pragma GCC ivdep
              for (int64_t k = 0; k < group_size; ++k) vec::store(to + q * group_size + k, part[k] * scale * w[q * group_size + k]);
            }
          }
        });
      });
    });
    ctx->save_for_backward({y_ni, z_ni, weight_i, rstd_ng});
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    if (on_gpu(saved[0])) {
      const auto [dy, dz, dw] = gpu_kernels()->norm_backward(saved[0], saved[1], saved[2], ctx->saved_data["group_size"].toInt(), saved[3], grads[0]);
      return {dy, dz, dw, at::Tensor(), at::Tensor(), at::Tensor()};
    }
    const at::Tensor y = unit_stride(saved[0]), z = unit_stride(saved[1]), weight = saved[2].to(at::kFloat).contiguous();
    const at::Tensor dout = unit_stride(grads[0]);
    const int64_t N = y.size(0), I = y.size(1), group_size = ctx->saved_data["group_size"].toInt(), groups = I / group_size;
    at::Tensor dy = at::empty({N, I}, y.options()), dz = at::empty({N, I}, z.options());
    const Blocks blocks(N);
    std::vector<float> partial(blocks.count * I, 0.0f);
    const float *w = weight.const_data_ptr<float>(), *rstd = saved[3].const_data_ptr<float>();
    by_type(z.scalar_type(), [&](auto* z_type) {
      by_type(dout.scalar_type(), [&](auto* out_type) {
        using Z = std::remove_pointer_t<decltype(z_type)>;
        using Out = std::remove_pointer_t<decltype(out_type)>;
        blocks.run([&](int64_t block, int64_t begin, int64_t end) {
          std::vector<float> normed(group_size), wg(group_size), gates(group_size), slopes(group_size);
          for (int64_t r = begin; r < end; ++r)
            for (int64_t q = 0; q < groups; ++q) {
              const int64_t at = q * group_size;
              const float* from = row_of<float>(y, r) + at;
              const Z* gate = row_of<Z>(z, r) + at;
              const Out* g = row_of<Out>(dout, r) + at;
              float *dw = partial.data() + block * I + at, *to_y = row_of_mutable<float>(dy, r) + at;
              Z* to_z = row_of_mutable<Z>(dz, r) + at;
              const float scale = rstd[r * groups + q];
#pragma GCC ivdep
              for (int64_t k = 0; k < group_size; ++k) {
                const float raw = vec::load(gate + k), s = vec::sigmoid(raw), grad = vec::load(g + k);
                gates[k] = raw * s;
                slopes[k] = from[k] * s * (1.0f + raw * (1.0f - s));
                normed[k] = from[k] * gates[k] * scale;
                wg[k] = grad * w[at + k];
                dw[k] += grad * normed[k];
              }
              const float mean = tile_dot_any(normed.data(), wg.data(), group_size) / static_cast<float>(group_size);
#pragma GCC ivdep
              for (int64_t k = 0; k < group_size; ++k) {
                const float dv = scale * (wg[k] - normed[k] * mean);
                to_y[k] = dv * gates[k];
                vec::store(to_z + k, dv * slopes[k]);
              }
            }
        });
      });
    });
    return {dy, dz, sum_partials(partial, blocks.count, I, saved[2]), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

bool plain(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16; }

std::string text(const at::Tensor& t) { return fmt::format("{} [{}]", c10::toString(t.scalar_type()), fmt::join(t.sizes(), ", ")); }

}  // namespace

at::Tensor rms_norm(const at::Tensor& x_nd, const at::Tensor& weight_d, double eps, at::ScalarType out_dtype) {
  if (x_nd.dim() != 2 || weight_d.dim() != 1 || weight_d.size(0) != x_nd.size(1))
    throw Error(ExitCode::kRuntime, fmt::format("[rms_norm] x must be [N, D] and weight [D], got {} and {}", text(x_nd), text(weight_d)));
  if ((!on_gpu(x_nd) && !x_nd.is_cpu()) || !plain(x_nd.scalar_type()) || !plain(out_dtype) || x_nd.numel() == 0) return rms_norm_ref(x_nd, weight_d, eps, out_dtype);
  return RmsNorm::apply(x_nd, weight_d, eps, out_dtype);
}

at::Tensor gated_rms_norm(const at::Tensor& y_ni, const at::Tensor& z_ni, const at::Tensor& weight_i, int64_t group_size, double eps,
                          at::ScalarType out_dtype) {
  if (y_ni.dim() != 2 || z_ni.sizes() != y_ni.sizes() || weight_i.dim() != 1 || weight_i.size(0) != y_ni.size(1) || group_size < 1 ||
      y_ni.size(1) % group_size != 0)
    throw Error(ExitCode::kRuntime, fmt::format("[gated_rms_norm] y and z must be [N, I], weight [I] and I a multiple of group_size, got {}, {}, {} and {}",
                                                text(y_ni), text(z_ni), text(weight_i), group_size));
  const bool fits = on_gpu(y_ni) ? y_ni.scalar_type() == at::kFloat || z_ni.scalar_type() == at::kBFloat16 : y_ni.is_cpu() && y_ni.scalar_type() == at::kFloat;
  if (!fits || !plain(z_ni.scalar_type()) || !plain(out_dtype) || y_ni.numel() == 0)
    return gated_rms_norm_ref(y_ni, z_ni, weight_i, group_size, eps, out_dtype);
  return GatedRmsNorm::apply(y_ni, z_ni, weight_i, group_size, eps, out_dtype);
}

}  // namespace tessera
