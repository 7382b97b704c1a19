// linear_cross_entropy's chunks of logits on the GPU: tensors to pointers.
#include "layers/cuda/cross_entropy.hpp"

#include <ATen/ops/empty.h>

#include "layers/cuda/table.hpp"
#include "layers/cuda/tensors.hpp"

namespace tessera::gpu {
namespace {

LogitRows rows_of(const at::Tensor& logits_cv, const at::Tensor& targets_c, int64_t first) {
  return {.logits = logits_cv.data_ptr(), .type = type_of(logits_cv), .c = logits_cv.size(0), .V = logits_cv.size(1), .targets = targets_c.const_data_ptr<int64_t>(), .first = first};
}

void softmax(const at::Tensor& logits_cv, const at::Tensor& targets_c, const at::Tensor& loss_c, bool want_gradient) {
  const Launches launches("linear_cross_entropy", logits_cv);
  launches.check(softmax_rows(rows_of(logits_cv, targets_c, 0), loss_c.mutable_data_ptr<float>(), want_gradient, launches.stream()));
}

std::array<at::Tensor, 2> sums(const at::Tensor& logits_cv, const at::Tensor& targets_c, int64_t first) {
  const Launches launches("linear_cross_entropy", logits_cv);
  const auto fp32 = logits_cv.options().dtype(at::kFloat);
  at::Tensor greatest = at::empty({logits_cv.size(0)}, fp32), sums_2c = at::empty({2, logits_cv.size(0)}, fp32);
  launches.check(softmax_sums(rows_of(logits_cv, targets_c, first), greatest.mutable_data_ptr<float>(), sums_2c.mutable_data_ptr<float>(),
                              sums_2c.mutable_data_ptr<float>() + logits_cv.size(0), launches.stream()));
  return {greatest, sums_2c};
}

void gradient(const at::Tensor& logits_cv, const at::Tensor& targets_c, int64_t first, const at::Tensor& lse_c) {
  const Launches launches("linear_cross_entropy", logits_cv);
  const at::Tensor lse = lse_c.contiguous();
  launches.check(softmax_gradient(rows_of(logits_cv, targets_c, first), lse.const_data_ptr<float>(), launches.stream()));
}

at::Tensor as_great(const at::Tensor& logits_cv, const at::Tensor& picked_c) {
  const Launches launches("top_word_is", logits_cv);
  at::Tensor count = at::empty({logits_cv.size(0)}, logits_cv.options().dtype(at::kFloat));
  const LogitRows rows{.logits = logits_cv.data_ptr(), .type = type_of(logits_cv), .c = logits_cv.size(0), .V = logits_cv.size(1), .targets = nullptr, .first = 0};
  launches.check(count_as_great(rows, picked_c.const_data_ptr<float>(), count.mutable_data_ptr<float>(), launches.stream()));
  return count;
}

}  // namespace

void add_cross_entropy(GpuKernels& table) {
  table.softmax_rows = softmax;
  table.softmax_sums = sums;
  table.softmax_gradient = gradient;
  table.count_as_great = as_great;
}

}  // namespace tessera::gpu
