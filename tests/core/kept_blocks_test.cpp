#include "memory/kept_blocks.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <thread>
#include <vector>

#include "tessera/error.hpp"

namespace tessera {
namespace {

constexpr int64_t kMiB = 1 << 20;

at::Tensor bytes(int64_t n) { return at::empty({n}, at::kByte); }

class KeptBlocksTest : public testing::Test {
 protected:
  void SetUp() override {
#ifdef __SANITIZE_ADDRESS__
    GTEST_SKIP() << "blocks are malloc's under the address sanitizer";
#endif
    keep_large_blocks();
    keep_large_blocks();  // harmless
  }
};

TEST_F(KeptBlocksTest, AFreedBlockServesTheNextTensorOfItsSize) {
  void* first;
  {
    const at::Tensor t = bytes(40 * kMiB);
    first = t.data_ptr();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(first) % 64, 0u);
  }
  EXPECT_GE(large_blocks().kept, 40u * kMiB);
  const at::Tensor again = bytes(40 * kMiB - 1000);
  EXPECT_EQ(again.data_ptr(), first);
}

TEST_F(KeptBlocksTest, WhatIsKeptIsBounded) {
  std::vector<at::Tensor> held;
  for (int i = 0; i < 8; ++i) held.push_back(bytes(16 * kMiB));
  held.clear();
  const size_t most = large_blocks().most;
  for (int64_t n = 2; n < 120; ++n) {  // each size a block of its own
    const at::Tensor t = bytes(n * kMiB);
    const LargeBlocks now = large_blocks();
    EXPECT_LE(static_cast<double>(now.held + now.kept), (1 + kKeptShare) * static_cast<double>(now.most) + 1) << n;
    EXPECT_EQ(now.most, most) << n;
  }
}

TEST_F(KeptBlocksTest, SmallTensorsAreNotCounted) {
  const LargeBlocks before = large_blocks();
  const at::Tensor t = bytes(1000);
  EXPECT_EQ(large_blocks().held, before.held);
}

// Of every size, and on whatever thread it is freed.
TEST_F(KeptBlocksTest, BytesOfAllTensorsAreCounted) {
  const int64_t before = tensor_bytes(at::kCPU).now;
  forget_most_tensor_bytes(at::kCPU);
  at::Tensor small = bytes(1000), large = bytes(3 * kMiB);
  const int64_t held = tensor_bytes(at::kCPU).now - before;
  EXPECT_GE(held, 3 * kMiB + 1000);
  EXPECT_LE(held, 3 * kMiB + 1000 + (1 << 17));
  std::thread([&] { large = at::Tensor(); }).join();
  EXPECT_LT(tensor_bytes(at::kCPU).now - before, kMiB);
  EXPECT_EQ(tensor_bytes(at::kCPU).most - before, held);
  small = at::Tensor();
  EXPECT_EQ(tensor_bytes(at::kCPU).now, before);
  forget_most_tensor_bytes(at::kCPU);
  EXPECT_EQ(tensor_bytes(at::kCPU).most, before);
}

TEST_F(KeptBlocksTest, ProductsAndThreadsWorkInThem) {
  const size_t held = large_blocks().held;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([t] {
      for (int i = 0; i < 20; ++i) {
        const at::Tensor x = at::full({700, 700}, t + 1.0), y = at::mm(x, x);
        EXPECT_EQ(y.min().item<float>(), 700.0f * (t + 1) * (t + 1));
        EXPECT_EQ(y.max().item<float>(), 700.0f * (t + 1) * (t + 1));
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(large_blocks().held, held);
}

TEST_F(KeptBlocksTest, NoMemoryIsAnErrorWithNumbers) {
  const size_t held = large_blocks().held, most = large_blocks().most;
  try {
    bytes(int64_t{1} << 56);
    FAIL() << "allocated";
  } catch (const Error& error) {
    EXPECT_EQ(error.message(), "out of memory: a tensor of 72057594037927936 bytes, beside " + std::to_string(held) + " bytes of others");
    EXPECT_EQ(error.code(), ExitCode::kRuntime);
  }
  EXPECT_EQ(large_blocks().held, held);
  EXPECT_EQ(large_blocks().most, most);
  EXPECT_EQ(bytes(2 * kMiB).numel(), 2 * kMiB);
}

}  // namespace
}  // namespace tessera
