#include "layers/cuda/tensors.hpp"

#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <mutex>
#include <string>

#include "layers/cuda/partial_sums.hpp"
#include "tessera/error.hpp"
#ifndef TESSERA_SIMT
#include <c10/cuda/CUDAStream.h>
#endif

namespace tessera::gpu {

Launches::Launches(const char* op, const at::Tensor& like) : op_(op), guard_(like.device()) {
#ifdef TESSERA_SIMT
  stream_ = nullptr;
#else
  stream_ = c10::cuda::getCurrentCUDAStream(like.device().index()).stream();
#endif
}

void Launches::check(Status status) const {
  if (status) throw Error(ExitCode::kRuntime, fmt::format("[{}] the GPU refused a kernel: {}", op_, status));
}

Type type_of(const at::Tensor& t) { return t.scalar_type() == at::kBFloat16 ? Type::kBf16 : Type::kFloat; }
at::Tensor unit_stride(const at::Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous(); }

std::array<at::Tensor, 2> sum_partials(const Launches& launches, const at::Tensor& partials_rc, const at::Tensor& first, const at::Tensor& second) {
  const auto like = [](const at::Tensor& t) {
    return t.defined() ? at::empty(t.sizes(), t.options().dtype(t.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat)) : at::Tensor();
  };
  at::Tensor a = like(first), b = like(second);
  launches.check(sum_partials(partials_rc.const_data_ptr<float>(), partials_rc.size(0), partials_rc.size(1), a.mutable_data_ptr(), type_of(a), a.numel(),
                              b.defined() ? b.mutable_data_ptr() : nullptr, b.defined() ? type_of(b) : Type::kFloat, launches.stream()));
  return {a.to(first.scalar_type()), b.defined() ? b.to(second.scalar_type()) : b};
}

namespace {

struct Kept {
  std::string use;
  int64_t key;
  std::vector<int64_t> rows;
  at::Tensor list;
};

constexpr size_t kMostKept = 32;

}  // namespace

at::Tensor device_list(const char* use, int64_t key, const std::vector<int64_t>& rows, const at::Tensor& like, const std::function<std::vector<int64_t>()>& make) {
  static std::mutex mutex;
  static std::deque<Kept>& kept = *new std::deque<Kept>;  // outlives the device's libraries
  const std::lock_guard lock(mutex);
  for (auto it = kept.begin(); it != kept.end(); ++it)
    if (it->use == use && it->key == key && it->list.device() == like.device() && it->rows == rows) return it->list;
  kept.push_front({use, key, rows, to_device(make(), like.device())});
  if (kept.size() > kMostKept) kept.pop_back();
  return kept.front().list;
}

}  // namespace tessera::gpu
