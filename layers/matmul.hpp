// Matrix products by the fastest library that this machine has for them.
#pragma once
#include <ATen/core/Tensor.h>

namespace tessera {

// a [M, K] times b [K, N] -> [M, N], one dtype and device; each row major or a transposed view of that. No gradient.
// fp32 on CPUs other than Intel's goes to oneDNN: MKL takes its AVX2 path there, which is 2.2 to 2.5 times slower on AMD Zen 5
// (2048 x 512 x 256 on one core: 87 against 206 GFLOP/s). bf16 goes there where the CPU has AVX-512: at::mm is half as fast. The choice rests on the processor and the sizes alone, so that a run repeats bit for bit.
at::Tensor product(const at::Tensor& a_mk, const at::Tensor& b_kn);
// The same into `out_mn`, row major; with `add`, added to what is there.
void product_into(at::Tensor& out_mn, const at::Tensor& a_mk, const at::Tensor& b_kn, bool add = false);

}  // namespace tessera
