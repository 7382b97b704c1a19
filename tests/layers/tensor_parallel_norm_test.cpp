#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <mutex>

#include "layers/norm.hpp"
#include "tessera/error.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/gradients.hpp"
#include "tests/support/ranks.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

// A norm group over 2 and over 4 of 4 ranks, whose parts together are the whole, in values and gradients.
TEST(TensorParallelNorm, AGroupOverSeveralRanksIsNormedAsOne) {
  const int64_t tp = 4, I = 48;
  const auto generator = at::detail::createCPUGenerator(2);
  const auto normal = [&](at::IntArrayRef shape) { return at::randn(shape, generator, at::TensorOptions(at::kDouble)); };
  for (const int64_t n : {0, 37})
    for (const int64_t size : {1, 2, 4})
      for (const auto dtype : {at::kDouble, at::kFloat}) {
        std::vector<at::Tensor> in{normal({n, I}), normal({n, I}), normal({I})};
        at::Tensor dy = normal({n, I});
        for (at::Tensor* t : {&in[0], &in[1], &in[2], &dy}) *t = t->to(dtype).to(at::kDouble);
        const int64_t group_size = I * size / tp;
        const auto want = with_gradients([&](const auto& t) { return gated_rms_norm(t[0], t[1], t[2], group_size, 1e-5, at::kDouble); }, in, dy);
        at::Tensor y = at::zeros_like(want.output);
        std::vector<at::Tensor> gradients;
        for (const at::Tensor& g : want.gradients) gradients.push_back(at::zeros_like(g));
        std::mutex mutex;
        run_ranks({.tp = tp}, [&](MeshGroups& groups) {
          const at::AutoGradMode grad_mode(true);
          const int64_t begin = groups.place().tp * I / tp;
          const auto part = [&](const at::Tensor& t) { return t.narrow(-1, begin, I / tp); };
          std::vector<at::Tensor> local;
          for (const at::Tensor& t : in) local.push_back(part(t).to(dtype).clone());
          const auto got = with_gradients(
              [&](const auto& t) { return gated_rms_norm(t[0], t[1], t[2], group_size, 1e-5, dtype, groups.tensor_part(size)); }, local, part(dy));
          const std::lock_guard lock(mutex);
          part(y).copy_(got.output);
          for (size_t k = 0; k < gradients.size(); ++k) part(gradients[k]).copy_(got.gradients[k]);
        });
        EXPECT_TRUE(close(y, want.output, tolerance(dtype, Op::kReduction, I))) << size;
        for (size_t k = 0; k < gradients.size(); ++k) EXPECT_TRUE(close(gradients[k], want.gradients[k], tolerance(dtype, Op::kReduction, I))) << size << " input " << k;
      }
}

TEST(TensorParallelNorm, ChannelsThatDoNotMakeAGroupAreAnError) {
  run_ranks({.tp = 2}, [](MeshGroups& groups) {
    try {
      gated_rms_norm(at::zeros({3, 8}), at::zeros({3, 8}), at::zeros({8}), 24, 1e-5, at::kFloat, groups.tensor());
      ADD_FAILURE() << "8 channels on each of 2 ranks are no group of 24";
    } catch (const Error& error) {
      EXPECT_NE(error.message().find("over the 2 ranks of tp, y and z must be [N, I] and weight [I] with 2 I = group_size 24"), std::string::npos) << error.message();
    }
  });
}

}  // namespace
}  // namespace tessera
