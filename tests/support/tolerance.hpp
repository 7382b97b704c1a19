// The one table of tolerances: limits on RMS(diff) / RMS(reference) by dtype, operator class and reduction length, each with its reason.
// u is the unit roundoff: 1.1e-16 in fp64, 6e-8 in fp32, 3.9e-3 in bf16. A length-n sum errs by about sqrt(n) u at random, n u at worst.
#pragma once
#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <cstdint>
#include <limits>
#include <stdexcept>

namespace tessera {

enum class Op {
  kElementwise,         // a few operations an element: activations, gates, casts
  kReduction,           // a sum and what follows from it: norms, softmax, losses
  kMatmul,              // products with parameters; reduction length = inner size
  kScan,                // the chunked scan: products, exponentials of sums and a recurrence; reduction length = tokens of a document
  kModel,               // whole blocks or stacks, forward or gradients; reduction length = the widest inner size
  kFiniteDifference,    // an analytic gradient against central differences (fp64 only)
};

struct ToleranceRow {
  at::ScalarType dtype;
  Op op;
  int64_t longest;  // reductions up to this length
  double limit;
  const char* reason;
};

inline constexpr int64_t kAnyLength = std::numeric_limits<int64_t>::max();

// The first row that admits the length counts.
inline constexpr ToleranceRow kTolerances[] = {
    {at::kDouble, Op::kElementwise, kAnyLength, 1e-15, "about 10 u: a handful of roundings"},
    {at::kDouble, Op::kReduction, kAnyLength, 1e-13, "sqrt(n) u for n up to 1e5, times the amplification of rsqrt and exp"},
    {at::kDouble, Op::kMatmul, kAnyLength, 1e-13, "sqrt(n) u for n up to 1e5, summation order unknown"},
    {at::kDouble, Op::kScan, kAnyLength, 1e-12, "exp(sum) carries the sum's absolute error, up to 100 u, over a few products"},
    {at::kDouble, Op::kModel, kAnyLength, 1e-11, "tens of operators in a row"},
    {at::kDouble, Op::kFiniteDifference, kAnyLength, 1e-6, "step 1e-5: truncation h^2 f''' ~ 1e-10 and rounding u f / h ~ 1e-11 f, f up to 1e4 times the gradient"},
    {at::kFloat, Op::kElementwise, kAnyLength, 5e-7, "8 u: a handful of roundings, own exp within 2 ulp"},
    {at::kFloat, Op::kReduction, 4096, 1e-6, "sqrt(n) u / 4 for blocked sums, and the elementwise part"},
    {at::kFloat, Op::kReduction, kAnyLength, 1e-5, "sqrt(n) u for n up to 1e5"},
    {at::kFloat, Op::kMatmul, 256, 1e-6, "sqrt(n) u = 1e-6"},
    {at::kFloat, Op::kMatmul, kAnyLength, 5e-6, "sqrt(n) u for n up to 1e4"},
    {at::kFloat, Op::kScan, kAnyLength, 5e-6, "exponents of a few tens lose their size times u; gradients pass through three products"},
    {at::kFloat, Op::kModel, kAnyLength, 5e-5, "tens of operators, residual sums keep their errors"},
    {at::kBFloat16, Op::kElementwise, kAnyLength, 3e-3, "one rounding of the result: u / sqrt(3) = 2.3e-3 at most"},
    {at::kBFloat16, Op::kReduction, kAnyLength, 3e-3, "fp32 inside, one rounding of the result"},
    {at::kBFloat16, Op::kMatmul, kAnyLength, 5e-3, "fp32 inside, one rounding; backward rounds the incoming gradient too"},
    {at::kBFloat16, Op::kScan, kAnyLength, 5e-3, "fp32 inside; inputs and packed gradient rounded once each"},
    {at::kBFloat16, Op::kModel, kAnyLength, 5e-2, "each of some ten operators rounds activations and weights: sqrt(10 * 2) u plus cancellation"},
};

inline double tolerance(at::ScalarType dtype, Op op, int64_t reduction_len = 1) {
  for (const ToleranceRow& row : kTolerances)
    if (row.dtype == dtype && row.op == op && reduction_len <= row.longest) return row.limit;
  throw std::logic_error(fmt::format("no tolerance for operator class {} at length {}", static_cast<int>(op), reduction_len));
}

// A fast operator is correct when its error against fp64 is at most this multiple of the plain composition's in the same dtype.
inline constexpr double kErrorFactor = 2.0;

}  // namespace tessera
