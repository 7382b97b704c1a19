// Groups over NCCL: in a build without CUDA they are refused; on a GPU every collective of a group of one rank gives what it should, for every axis.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <gtest/gtest.h>

#include <optional>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/HashStore.hpp>

#include "parallel/backend_group.hpp"
#include "tessera/error.hpp"
#include "train/setup.hpp"

namespace tessera {
namespace {

std::optional<at::Device> gpu() {
  try {
    return choose_device("cuda", int64_t{0});
  } catch (const Error&) {
    return {};
  }
}

TEST(Nccl, GroupsOfOneRankOnEveryAxis) {
  const auto device = gpu();
  if (!device) GTEST_SKIP() << "there is no GPU, or this build has no CUDA";
  for (const char* axis : {"pp", "dp_replicate", "dp_shard", "cp", "tp", "ep"}) {
    SCOPED_TRACE(axis);
    const auto group = make_backend_group(axis, {0}, 0, std::make_shared<Whereabouts>(), nccl_backend(c10::make_intrusive<c10d::HashStore>(), 0, 1, *device, std::chrono::seconds(60)));
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kDouble, at::kLong}) {
      const at::Tensor x = at::arange(24, at::TensorOptions(dtype).device(*device)).reshape({6, 4});
      at::Tensor sum = x.clone(), most = x.clone(), out = at::empty_like(x);
      group->all_reduce(sum);
      EXPECT_TRUE(sum.equal(x));
      group->all_reduce(most, Reduce::kMax);
      EXPECT_TRUE(most.equal(x));
      group->all_gather(out, x);
      EXPECT_TRUE(out.equal(x));
      group->reduce_scatter(out.zero_(), x);
      EXPECT_TRUE(out.equal(x));
      group->all_to_all(out.zero_(), x, {6}, {6});
      EXPECT_TRUE(out.equal(x));
    }
    EXPECT_EQ(group->sent_bytes(), 0) << "there is nobody to send to";
  }
}

TEST(Nccl, ABuildWithoutCudaSaysSo) {
#ifdef TESSERA_CUDA
  GTEST_SKIP() << "this build has CUDA";
#else
  try {
    nccl_backend(c10::make_intrusive<c10d::HashStore>(), 0, 1, at::Device(at::kCUDA, 0), std::chrono::seconds(1));
    ADD_FAILURE() << "there is a backend";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    EXPECT_NE(error.message().find("has no NCCL"), std::string::npos) << error.message();
  }
#endif
}

}  // namespace
}  // namespace tessera
