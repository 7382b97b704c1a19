// Operators on CPU tensors run the GPU's kernels on copies that are brought there and back, so that the tests of operators are tests of the kernels on the
// device itself. Strides, offsets and what kernels write into their arguments are kept.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty.h>

#include <cstdio>
#include <cstdlib>
#include <tuple>
#include <type_traits>

#include "layers/experts.hpp"
#include "layers/gpu.hpp"
#include "layers/ssd_scan.hpp"
#include "tests/support/emulated.hpp"

namespace tessera {
namespace {

at::Device device = at::kCPU;

// A tensor of the same strides over a copy of the whole storage.
at::Tensor there(const at::Tensor& t) {
  if (!t.defined()) return t;
  const at::Tensor here = t.detach();
  const int64_t all = static_cast<int64_t>(here.storage().nbytes() / here.element_size());
  const at::Tensor copy = at::empty({all}, here.options().device(device));
  copy.copy_(here.as_strided({all}, {1}, 0));
  return copy.as_strided(here.sizes(), here.strides(), here.storage_offset());
}
Dispatch there(const Dispatch& d) { return {there(d.counts_e), there(d.slot_m), there(d.token_m), there(d.row_nk)}; }
template <class T>
const T& there(const T& other) { return other; }

at::Tensor back(const at::Tensor& t) { return t.defined() ? t.to(at::kCPU) : t; }
template <size_t N>
std::array<at::Tensor, N> back(std::array<at::Tensor, N> all) {
  for (at::Tensor& t : all) t = back(t);
  return all;
}

// What a kernel wrote into its argument; the copy of one that autograd has saved is not a change of it.
void put_back(const at::Tensor& to, const at::Tensor& from) {
  if (to.defined()) to.variable_data().copy_(from);
}
template <class T>
void put_back(const T&, const T&) {}

template <auto member>
struct Bounced;
template <class R, class... A, R (*GpuKernels::*member)(A...)>
struct Bounced<member> {
  static inline R (*kernel)(A...) = nullptr;
  static R call(A... args) {
    const at::NoGradGuard no_grad;
    const std::tuple<std::decay_t<A>...> copies{there(args)...};
    const auto run = [](const auto&... copy) { return kernel(copy...); };
    const auto put_all_back = [&](const auto&... copy) { (put_back(args, copy), ...); };
    if constexpr (std::is_void_v<R>) {
      std::apply(run, copies);
      std::apply(put_all_back, copies);
    } else {
      R out = std::apply(run, copies);
      std::apply(put_all_back, copies);
      return back(out);
    }
  }
};

template <auto... members>
void bounce(GpuKernels& table) {
  static_assert((sizeof...(members) + 1) * sizeof(void*) == sizeof(GpuKernels), "every entry but `takes` is in the list below");
  ((Bounced<members>::kernel = table.*members, table.*members = Bounced<members>::call), ...);
}

}  // namespace

void run_kernels_on(const char* word) {
  if (!gpu_kernels()) {
    std::fprintf(stderr, "TESSERA_TEST_DEVICE: this build has no kernels for a GPU\n");
    std::exit(2);
  }
  device = at::Device(word);
  static GpuKernels table = *gpu_kernels();
  using K = GpuKernels;
  bounce<&K::conv_forward, &K::conv_with_state, &K::conv_backward, &K::norm_forward, &K::norm_backward, &K::relu2_forward, &K::relu2_backward, &K::uniform, &K::dropout, &K::scan_forward,
         &K::scan_with_state, &K::scan_backward, &K::dispatch, &K::take_rows, &K::sum_rows, &K::spread_rows, &K::row_products, &K::grouped_linear_forward, &K::grouped_linear_backward,
         &K::expert_mlp_forward, &K::expert_mlp_backward, &K::attend_cache, &K::write_cache, &K::choose_experts, &K::expert_counts, &K::routed_weights,
         &K::routed_weights_backward, &K::softmax_rows, &K::softmax_sums, &K::softmax_gradient, &K::count_as_great, &K::adamw>(table);
  table.takes = [](const at::Tensor& t) { return t.is_cpu(); };
  use_gpu_kernels(&table);
}

}  // namespace tessera
