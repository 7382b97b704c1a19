// The emulator itself: what it computes against plain loops, and that it catches what it is there to catch.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "tests/support/emulated.hpp"
#include "layers/cuda/fragments.hpp"
#include "layers/cuda/launch.hpp"  // last: `launch` is a macro

namespace tessera::gpu {
namespace {

TEST(Simt, OperatorsRunTheKernels) { EXPECT_TRUE(emulated()); }

// --- barriers --------------------------------------------------------------------------------------------------------------------
__global__ void reverse(int* out, bool barrier) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int n = static_cast<int>(blockDim.x), t = static_cast<int>(threadIdx.x);
  shared[t] = t;
  if (barrier) __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[n - 1 - t];
}

bool reversed(bool barrier) {
  std::vector<int> out(3 * 64, 0);
  EXPECT_EQ(launch(reverse, dim3(3), dim3(64), 64 * sizeof(int), nullptr, out.data(), barrier), nullptr);
  for (int i = 0; i < 3 * 64; ++i)
    if (out[static_cast<size_t>(i)] != 63 - i % 64) return false;
  return true;
}

TEST(Simt, AMissingBarrierShows) {
  EXPECT_TRUE(reversed(true));
  EXPECT_FALSE(reversed(false));
}

__global__ void half_of_it(int threads) {
  if (static_cast<int>(threadIdx.x) < threads) __syncthreads();
}
template <int A, int B>
__global__ void mixed() {
  if (threadIdx.x < 32) __syncthreads();
  else if (threadIdx.x % 2 == 0) __syncwarp();
}
__global__ void two_operations() {
  if (threadIdx.x < 16) shuffle(1.0f, 0);
  else ballot(true);
}

std::string text(Status status) { return status ? status : ""; }

TEST(Simt, ABarrierThatNotAllReachNamesTheKernel) {
  EXPECT_EQ(text(launch(half_of_it, dim3(2), dim3(64), 0, nullptr, 40)), "kernel half_of_it: 40 of 64 threads wait at __syncthreads, 24 have returned");
  EXPECT_EQ(text(launch((mixed<1, 2>), dim3(1), dim3(64), 0, nullptr)),
            "kernel mixed<1, 2>: 32 of 64 threads wait at __syncthreads, 16 have returned, 16 lanes of warp 1 wait at __syncwarp");
  const std::string two = text(launch(two_operations, dim3(1), dim3(32), 0, nullptr));
  EXPECT_NE(two.find("kernel two_operations: "), std::string::npos) << two;
  EXPECT_NE(two.find("while others of its warp wait at"), std::string::npos) << two;
  EXPECT_TRUE(reversed(true));  // the next launch starts afresh
}

TEST(Simt, RefusesWhatTheDeviceRefuses) {
  EXPECT_EQ(text(launch(half_of_it, dim3(1), dim3(40), 0, nullptr, 0)), "kernel half_of_it: a block must be 1 to 32 whole warps, got 40 threads");
  EXPECT_EQ(text(launch(half_of_it, dim3(1, 70000), dim3(32), 0, nullptr, 0)), "kernel half_of_it: a grid is at most 2147483647 x 65535 x 65535");
  EXPECT_EQ(text(launch(half_of_it, dim3(1), dim3(32), 300000, nullptr, 0)), "kernel half_of_it: a block has at most 232448 bytes of shared memory, got 300000");
  EXPECT_EQ(launch(half_of_it, dim3(0), dim3(32), 0, nullptr, 0), nullptr);
}

// --- memory ----------------------------------------------------------------------------------------------------------------------
__global__ void read_shared(float* out, int at) { out[threadIdx.x] = reinterpret_cast<const float*>(shared_memory())[at]; }

TEST(Simt, SharedMemoryIsNanAndEndsWhereItEnds) {
  std::vector<float> out(32, 0.0f);
  EXPECT_EQ(launch(read_shared, dim3(1), dim3(32), 128, nullptr, out.data(), 31), nullptr);
  for (const float v : out) EXPECT_TRUE(std::isnan(v));
#if !defined(__SANITIZE_ADDRESS__)
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(text(launch(read_shared, dim3(1), dim3(32), 128, nullptr, out.data(), 32)), "simt: kernel read_shared: block 0,0,0 thread .*: access outside its shared memory");
#endif
}

__global__ void misaligned(const float* from, int at) { load16(from + at); }

TEST(Simt, MisalignedAccessIsAnError) {
  alignas(16) const float from[8] = {};
  EXPECT_EQ(launch(misaligned, dim3(1), dim3(32), 0, nullptr, &from[0], 4), nullptr);
  const std::string error = text(launch(misaligned, dim3(1), dim3(32), 0, nullptr, &from[0], 1));
  EXPECT_NE(error.find("access of 16 bytes at an address that is not a multiple"), std::string::npos) << error;
}

__global__ void copy(const float* from, float* to, bool wait, int bytes) {
  float* shared = reinterpret_cast<float*>(shared_memory()) + 4 * threadIdx.x;
  cp_async16(shared, from + 4 * threadIdx.x, bytes);
  cp_async_commit();
  cp_async16(shared + 4 * 32, from, 0);
  cp_async_commit();
  if (wait) cp_async_wait<1>();
  for (int i = 0; i < 4; ++i) to[4 * threadIdx.x + i] = shared[i];
}

TEST(Simt, CopiesArriveWhenTheyAreWaitedFor) {
  alignas(16) float from[128], to[128];
  for (int i = 0; i < 128; ++i) from[i] = static_cast<float>(i);
  EXPECT_EQ(launch(copy, dim3(1), dim3(32), 1024, nullptr, &from[0], &to[0], true, 16), nullptr);
  for (int i = 0; i < 128; ++i) EXPECT_EQ(to[i], from[i]);
  EXPECT_EQ(launch(copy, dim3(1), dim3(32), 1024, nullptr, &from[0], &to[0], true, 8), nullptr);
  for (int i = 0; i < 128; ++i) EXPECT_EQ(to[i], i % 4 < 2 ? from[i] : 0.0f);
  EXPECT_EQ(launch(copy, dim3(1), dim3(32), 1024, nullptr, &from[0], &to[0], false, 16), nullptr);
  EXPECT_TRUE(std::isnan(to[0]));
}

__global__ void convert(float* out, uint16_t* bits) {
  const uint32_t pair = pack_bf16(1.00390625f + threadIdx.x, -3.0f);  // 1 + 2^-8 is a tie: to even
  out[2 * threadIdx.x] = low_half(pair), out[2 * threadIdx.x + 1] = high_half(pair);
  bits[threadIdx.x] = from_float<bf16>(1.0f + 0.0078125f * threadIdx.x).bits;
}

TEST(Simt, RoundsToNearestEven) {
  float out[64];
  uint16_t bits[32];
  EXPECT_EQ(launch(convert, dim3(1), dim3(32), 0, nullptr, &out[0], &bits[0]), nullptr);
  EXPECT_EQ(out[0], 1.0f);
  EXPECT_EQ(out[1], -3.0f);
  for (int i = 0; i < 32; ++i) EXPECT_EQ(bits[i], 0x3f80 + i);
}

// --- warps -----------------------------------------------------------------------------------------------------------------------
__global__ void shuffles(float* sums, float* scans, float* maxima, uint32_t* votes) {
  const int t = static_cast<int>(threadIdx.x);
  const float v = static_cast<float>(t * t % 37);
  sums[t] = warp_sum<8>(v);
  scans[t] = warp_scan(v);
  maxima[t] = warp_max(v);
  votes[t] = ballot(t % 3 == 0);
}

TEST(Simt, ShufflesAndVotesAreThoseOfAWarp) {
  float sums[64], scans[64], maxima[64];
  uint32_t votes[64];
  EXPECT_EQ(launch(shuffles, dim3(1), dim3(64), 0, nullptr, &sums[0], &scans[0], &maxima[0], &votes[0]), nullptr);
  for (int t = 0; t < 64; ++t) {
    float sum = 0, scan = 0, maximum = 0;
    uint32_t vote = 0;
    for (int o = t / 32 * 32; o < t / 32 * 32 + 32; ++o) {
      const float v = static_cast<float>(o * o % 37);
      if (o / 8 == t / 8) sum += v;
      if (o <= t) scan += v;
      maximum = std::max(maximum, v);
      vote |= (o % 3 == 0 ? 1u : 0u) << o % 32;
    }
    EXPECT_EQ(sums[t], sum);
    EXPECT_EQ(scans[t], scan);
    EXPECT_EQ(maxima[t], maximum);
    EXPECT_EQ(votes[t], vote);
  }
}

// --- tensor cores: d [16, 8] = a [16, 16] b [16, 8], operands by ldmatrix ----------------------------------------------------------
template <bool kTransposeB>
__global__ void product(const bf16* a, const bf16* b, float* d) {
  bf16* shared = reinterpret_cast<bf16*>(shared_memory());
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += 32) shared[i] = a[i];
  for (int i = static_cast<int>(threadIdx.x); i < 128; i += 32) shared[256 + i] = b[i];
  __syncwarp();
  const int lane = static_cast<int>(threadIdx.x), row = lane % 8, matrix = lane / 8;
  uint32_t fa[4], fb[2];
  ldmatrix<false>(fa, shared + (row + 8 * (matrix % 2)) * 16 + 8 * (matrix / 2));
  if constexpr (kTransposeB) ldmatrix<true>(fb, shared + 256 + (row + 8 * (matrix % 2)) * 8);  // b as [16, 8]
  else ldmatrix<false>(fb, shared + 256 + row * 16 + 8 * (matrix % 2));                        // b as [8, 16]
  float out[4] = {1, 1, 1, 1};
  mma_bf16(out, fa, fb);
  for (int r = 0; r < 4; ++r) d[(lane / 4 + 8 * (r / 2)) * 8 + 2 * (lane % 4) + r % 2] = out[r];
}

TEST(Simt, ProductsOfFragmentsAreMatrixProducts) {
  bf16 a[256], b[128], bt[128];
  float d[128], fa[256], fb[128];
  for (int i = 0; i < 256; ++i) fa[i] = static_cast<float>(i * 7 % 23 - 11), a[i] = {simt::round_bf16(fa[i])};
  for (int i = 0; i < 128; ++i) fb[i] = static_cast<float>(i * 5 % 19 - 9), b[i] = {simt::round_bf16(fb[i])};
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < 8; ++n) bt[n * 16 + k] = b[k * 8 + n];
  for (const bool transposed : {false, true}) {
    const Status bad = transposed ? launch(product<true>, dim3(1), dim3(32), 768, nullptr, &a[0], &b[0], &d[0])
                                  : launch(product<false>, dim3(1), dim3(32), 768, nullptr, &a[0], &bt[0], &d[0]);
    ASSERT_EQ(bad, nullptr) << bad;
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n) {
        float sum = 1;
        for (int k = 0; k < 16; ++k) sum += fa[m * 16 + k] * fb[k * 8 + n];
        EXPECT_EQ(d[m * 8 + n], sum) << m << " " << n;
      }
  }
}

// Fragments of random numbers, multiplied by the emulator and by what the GPU does for fp32.
__global__ void fp32_products(const float* a, const float* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  FragmentA<float> fa;
  FragmentB<float> fb;
  load_a<false>(fa, a, 16, 0, 0);
  for (int i = 0; i < 4; ++i) fb.r[i] = b[lane * 4 + i];
  float one[4] = {}, other[4] = {};
  multiply(one, fa, fb);
  mma_by_shuffles(other, fa, fb);
  for (int i = 0; i < 4; ++i) d[lane * 8 + i] = one[i], d[lane * 8 + 4 + i] = other[i];
}

TEST(Simt, Fp32ProductsByShufflesAreProducts) {
  float a[256], b[128], d[256];
  for (int i = 0; i < 256; ++i) a[i] = static_cast<float>(i * 37 % 101 - 50);
  for (int i = 0; i < 128; ++i) b[i] = static_cast<float>(i * 29 % 83 - 40);
  EXPECT_EQ(launch(fp32_products, dim3(1), dim3(32), 0, nullptr, &a[0], &b[0], &d[0]), nullptr);
  for (int i = 0; i < 256; ++i) EXPECT_EQ(d[i / 8 * 8 + i % 4], d[i / 8 * 8 + 4 + i % 4]) << i;
}

__global__ void from_global(const bf16* from) {
  uint32_t r[4];
  ldmatrix<false>(r, from + 8 * threadIdx.x);
}
__global__ void past_the_end() {
  uint32_t r[1];
  ldmatrix<false>(r, shared_memory() + 16 * threadIdx.x);
}

TEST(Simt, MatricesAreLoadedFromSharedMemoryAlone) {
  alignas(16) bf16 from[256];
  EXPECT_NE(text(launch(from_global, dim3(1), dim3(32), 1024, nullptr, &from[0])).find("ldmatrix outside the 1024 bytes of dynamic shared memory"), std::string::npos);
  EXPECT_EQ(launch(past_the_end, dim3(1), dim3(32), 128, nullptr), nullptr);  // lanes 8 to 31 name nothing
  EXPECT_NE(text(launch(past_the_end, dim3(1), dim3(32), 112, nullptr)).find("ldmatrix outside"), std::string::npos);
}

}  // namespace
}  // namespace tessera::gpu
