// Products of a few rows with a weight, as decoding takes them: the weight streams from memory once, and that is the time it takes.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace tessera {

// Up to so many rows these are faster than a library's product, which packs the weight first.
inline constexpr int64_t kFewRows = 32;

// True where `few_rows` can do out = x w^T: fp32 or bf16 throughout, on the CPU, the last dimension of each contiguous.
bool few_rows_fit(const at::Tensor& out_mo, const at::Tensor& x_mk, const at::Tensor& w_ok);

// out [M, O] = x [M, K] w [O, K]^T. Sums in fp32; a row is the same whatever M is and however many threads there are.
void few_rows(at::Tensor& out_mo, const at::Tensor& x_mk, const at::Tensor& w_ok);

// The same for each expert's rows, all in one parallel pass: out [M, O], x [M, K] sorted by expert, w [E, O, K], counts [E] rows.
void few_rows_grouped(at::Tensor& out_mo, const at::Tensor& x_mk, const at::Tensor& w_eok, const std::vector<int64_t>& counts);

}  // namespace tessera
