#include "layers/ssd_scan.hpp"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <numeric>

#include "tessera/error.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/emulated.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

constexpr const char* kNames[] = {"xbc", "dt", "dt_bias", "A_log", "D"};

struct Problem {
  SsdSizes sizes;
  Spans spans;
  std::vector<at::Tensor> inputs;  // fp64
  at::Tensor dy;                   // fp64
};

Problem make(const std::vector<int64_t>& lengths, SsdSizes sizes, uint64_t seed = 1) {
  at::manual_seed(seed);
  Problem p{.sizes = sizes, .spans = Spans::documents(lengths), .inputs = {}, .dy = {}};
  const int64_t n = p.spans.num_tokens(), H = sizes.num_heads, inner = H * sizes.head_dim;
  const auto fp64 = at::TensorOptions().dtype(at::kDouble);
  p.inputs = {at::randn({n, inner + 2 * sizes.num_groups * sizes.state_size}, fp64), at::randn({n, H}, fp64), at::randn({H}, fp64) - 2,
              at::rand({H}, fp64) * 2.5, at::randn({H}, fp64)};
  p.dy = at::randn({n, inner}, fp64);
  return p;
}

struct Result {
  at::Tensor y;
  std::vector<at::Tensor> grads;
};

using Scan = decltype(&ssd_scan_ref);

Result run(const Problem& p, at::ScalarType dtype, Scan scan) {
  std::vector<at::Tensor> in;
  for (size_t k = 0; k < p.inputs.size(); ++k) {
    const at::ScalarType vectors = dtype == at::kBFloat16 && k >= 2 ? at::kFloat : dtype;
    in.push_back(p.inputs[k].to(vectors).detach().clone().requires_grad_());
  }
  Result r;
  r.y = scan(in[0], in[1], in[2], in[3], in[4], p.sizes, p.spans, {});
  r.grads = torch::autograd::grad({r.y}, in, {p.dy.to(r.y.scalar_type())});
  r.y = r.y.detach();
  return r;
}

// The recurrence itself, token by token, in fp64.
at::Tensor recurrence(const Problem& p) {
  const auto& z = p.sizes;
  const int64_t H = z.num_heads, P = z.head_dim, G = z.num_groups, S = z.state_size, R = H / G;
  const at::Tensor d = (p.inputs[1] + p.inputs[2]).exp().log1p().clamp(z.dt_min, z.dt_max), A = p.inputs[3].exp().neg();
  std::vector<at::Tensor> rows;
  at::Tensor state;
  for (int64_t s = 0; s < p.spans.size(); ++s)
    for (int64_t t = p.spans.rows()[s]; t < p.spans.rows()[s + 1]; ++t) {
      if (t == p.spans.rows()[s]) state = at::zeros({H, P, S}, p.dy.options());
      const at::Tensor row = p.inputs[0][t], x = row.narrow(0, 0, H * P).view({H, P, 1});
      auto group = [&](int64_t at) { return row.narrow(0, H * P + at * G * S, G * S).view({G, 1, S}).expand({G, R, S}).reshape({H, 1, S}); };
      state = (d[t] * A).exp().view({H, 1, 1}) * state + d[t].view({H, 1, 1}) * x * group(0);
      rows.push_back(((state * group(1)).sum(2) + p.inputs[4].view({H, 1}) * x.squeeze(2)).view({1, H * P}));
    }
  return at::cat(rows);
}

// The composition with its matrix products in bf16, operands and results, as mixed precision makes it.
at::Tensor mixed_precision(const at::Tensor& xbc_nc, const at::Tensor& dt_nh, const at::Tensor& dt_bias_h, const at::Tensor& A_log_h, const at::Tensor& D_h,
                           const SsdSizes& sizes, const Spans& spans, const at::Tensor& state_shps) {
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const at::Tensor y = ssd_scan_ref(xbc_nc, dt_nh, dt_bias_h, A_log_h, D_h, sizes, spans, state_shps);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  return y;
}

const SsdSizes kSmall{.num_heads = 6, .head_dim = 5, .num_groups = 2, .state_size = 7, .chunk = 16};

const SsdSizes kWhole{.num_heads = 4, .head_dim = 16, .num_groups = 2, .state_size = 72, .chunk = 16};  // in whole vectors of 16 bytes

struct NanFill {
  NanFill() { set(true); }
  ~NanFill() { set(false); }
  void set(bool on) {
    at::globalContext().setDeterministicAlgorithms(on, false);
    at::globalContext().setDeterministicFillUninitializedMemory(on);
  }
};

class ScanShapes : public testing::TestWithParam<std::tuple<std::vector<int64_t>, int64_t>> {};

TEST_P(ScanShapes, ReferenceIsTheRecurrence) {
  SsdSizes sizes = kSmall;
  sizes.chunk = std::get<1>(GetParam());
  const Problem p = make(std::get<0>(GetParam()), sizes);
  EXPECT_TRUE(close(run(p, at::kDouble, ssd_scan_ref).y, recurrence(p), tolerance(at::kDouble, Op::kScan)));
}

TEST_P(ScanShapes, FastEqualsReference) {
  const NanFill fill;
  for (const bool limited : {false, true}) {
    SsdSizes sizes = kSmall;
    sizes.chunk = std::get<1>(GetParam());
    if (limited) sizes.dt_min = 0.05, sizes.dt_max = 0.3, sizes.num_groups = 1;  // one group: its heads are cut over the threads
    const Problem p = make(std::get<0>(GetParam()), sizes);
    const Result want = run(p, at::kDouble, ssd_scan_ref), got = run(p, at::kFloat, ssd_scan);
    EXPECT_TRUE(close(got.y, want.y, tolerance(at::kFloat, Op::kScan))) << "y";
    for (size_t k = 0; k < want.grads.size(); ++k)
      EXPECT_TRUE(close(got.grads[k], want.grads[k], tolerance(at::kFloat, Op::kScan))) << kNames[k];
  }
}

INSTANTIATE_TEST_SUITE_P(All, ScanShapes,
                         testing::Combine(testing::Values(std::vector<int64_t>{1}, std::vector<int64_t>{63}, std::vector<int64_t>{130},
                                                          std::vector<int64_t>{40, 40, 40}, std::vector<int64_t>{3, 1, 70, 16, 129, 2}),
                                          testing::Values(1, 7, 16, 64, 128)));

TEST(SsdScan, ReferenceGradientsMatchFiniteDifferences) {
  SsdSizes sizes{.num_heads = 4, .head_dim = 3, .num_groups = 2, .state_size = 2, .chunk = 4};
  Problem p = make({6, 2}, sizes);
  const Result r = run(p, at::kDouble, ssd_scan_ref);
  const double h = 1e-5;
  for (size_t k = 0; k < p.inputs.size(); ++k) {
    at::Tensor flat = p.inputs[k].view(-1), difference = at::zeros_like(flat);
    for (int64_t e = 0; e < flat.numel(); ++e) {
      double value[2];
      for (const int sign : {1, -1}) {
        flat[e] += sign * h;
        const at::NoGradGuard no_grad;
        const auto& in = p.inputs;
        value[sign < 0] = (ssd_scan_ref(in[0], in[1], in[2], in[3], in[4], sizes, p.spans) * p.dy).sum().item<double>();
        flat[e] -= sign * h;
      }
      difference[e] = (value[0] - value[1]) / (2 * h);
    }
    EXPECT_TRUE(close(r.grads[k].view(-1), difference, tolerance(at::kDouble, Op::kFiniteDifference))) << kNames[k];
  }
}

// Realistic head sizes, whole and ragged tiles; errors against fp64 next to the plain composition's. The CPU computes in fp32 throughout, the GPU's kernels
// take bf16 operands for the products of bf16 inputs: there the composition does so too, and the gradient that comes in is bf16 as well.
TEST(SsdScan, ErrorIsAtMostTwiceThePlainComposition) {
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const auto& [head_dim, state_size] : {std::pair<int64_t, int64_t>{40, 64}, {40, 24}, {72, 136}}) {
      const bool half = dtype == at::kBFloat16 && emulated();
      const Problem p = make({200, 64, 5}, {.num_heads = 4, .head_dim = head_dim, .num_groups = 2, .state_size = state_size, .chunk = 64});
      Problem rounded = p;
      for (size_t k = 0; k < 2; ++k) rounded.inputs[k] = p.inputs[k].to(dtype).to(at::kDouble);
      for (size_t k = 2; k < 5; ++k) rounded.inputs[k] = p.inputs[k].to(at::kFloat).to(at::kDouble);
      rounded.dy = p.dy.to(half ? at::kBFloat16 : at::kFloat).to(at::kDouble);
      const Result want = run(rounded, at::kDouble, ssd_scan_ref), fast = run(rounded, dtype, ssd_scan),
                   plain = run(rounded, dtype, half ? mixed_precision : ssd_scan_ref);
      EXPECT_TRUE(close(fast.y, want.y, kErrorFactor * relative_rms(plain.y, want.y)));
      for (size_t k = 0; k < 5; ++k)
        EXPECT_TRUE(close(fast.grads[k], want.grads[k], kErrorFactor * relative_rms(plain.grads[k], want.grads[k]))) << kNames[k];
    }
}

TEST(SsdScan, TakesStridedRows) {
  const Problem p = make({50, 20}, kSmall);
  const at::Tensor packed = at::randn({70, 9 + p.inputs[0].size(1) + kSmall.num_heads});
  packed.narrow(1, 9, p.inputs[0].size(1)).copy_(p.inputs[0]);
  const at::Tensor xbc = packed.narrow(1, 9, p.inputs[0].size(1)), dt = packed.narrow(1, 9 + xbc.size(1), kSmall.num_heads);
  std::vector<at::Tensor> vectors;
  for (size_t k = 2; k < 5; ++k) vectors.push_back(p.inputs[k].to(at::kFloat));
  EXPECT_TRUE(bit_equal(ssd_scan(xbc, dt, vectors[0], vectors[1], vectors[2], kSmall, p.spans),
                        ssd_scan(xbc.contiguous(), dt.contiguous(), vectors[0], vectors[1], vectors[2], kSmall, p.spans)));
}

TEST(SsdScan, DocumentsAreIndependentBitForBit) {
  const Problem p = make({45, 3, 100}, kSmall);
  Problem q = p;
  q.inputs[0] = p.inputs[0].clone(), q.inputs[1] = p.inputs[1].clone();
  q.inputs[0].narrow(0, 45, 3).mul_(-3), q.inputs[1].narrow(0, 45, 3).add_(2);
  const Result a = run(p, at::kFloat, ssd_scan), b = run(q, at::kFloat, ssd_scan);
  for (const auto& [row, rows] : {std::pair<int64_t, int64_t>{0, 45}, {48, 100}}) {
    EXPECT_TRUE(bit_equal(a.y.narrow(0, row, rows), b.y.narrow(0, row, rows)));
    for (size_t k = 0; k < 2; ++k) EXPECT_TRUE(bit_equal(a.grads[k].narrow(0, row, rows), b.grads[k].narrow(0, row, rows)));
  }
  EXPECT_FALSE(at::equal(a.y.narrow(0, 45, 3), b.y.narrow(0, 45, 3)));
}

TEST(SsdScan, RunsAreBitEqual) {
  const Problem p = make({300, 20, 7}, kSmall);
  const Result a = run(p, at::kFloat, ssd_scan), b = run(p, at::kFloat, ssd_scan);
  EXPECT_TRUE(bit_equal(a.y, b.y));
  for (size_t k = 0; k < 5; ++k) EXPECT_TRUE(bit_equal(a.grads[k], b.grads[k])) << kNames[k];
}

// Two documents, prefilled in two pieces, then token by token, against the scan of the whole.
TEST(SsdScan, PrefillAndStepsEqualTheFullScan) {
  const at::NoGradGuard no_grad;
  const std::vector<int64_t> lengths{200, 33}, slots{2, 0};
  for (const Scan scan : {Scan(ssd_scan), Scan(ssd_scan_ref)})
    for (const auto& [dtype, sizes] : {std::pair{at::kFloat, kSmall}, {at::kBFloat16, kSmall}, {at::kBFloat16, kWhole}}) {
      const Problem p = make(lengths, sizes);
      std::vector<at::Tensor> in;
      for (size_t k = 0; k < 5; ++k) in.push_back(p.inputs[k].to(k < 2 ? dtype : at::kFloat));
      const at::Tensor full = ssd_scan(in[0], in[1], in[2], in[3], in[4], p.sizes, p.spans, {});
      at::Tensor state = at::randn({3, sizes.num_heads, sizes.head_dim, sizes.state_size}), parts = at::empty_like(full);
      const at::Tensor untouched = state[1].clone();
      auto advance = [&](const std::vector<int64_t>& from, const std::vector<int64_t>& to) {
        std::vector<Span> list;
        std::vector<at::Tensor> xbc, dt;
        for (int64_t s = 0; s < 2; ++s) {
          list.push_back({.document = s, .start = from[s], .length = to[s] - from[s], .document_len = lengths[s], .state_slot = slots[s]});
          xbc.push_back(in[0].narrow(0, s * 200 + from[s], to[s] - from[s]));
          dt.push_back(in[1].narrow(0, s * 200 + from[s], to[s] - from[s]));
        }
        const at::Tensor y = scan(at::cat(xbc), at::cat(dt), in[2], in[3], in[4], p.sizes, Spans(list), state);
        parts.narrow(0, from[0], to[0] - from[0]).copy_(y.narrow(0, 0, to[0] - from[0]));
        parts.narrow(0, 200 + from[1], to[1] - from[1]).copy_(y.narrow(0, to[0] - from[0], to[1] - from[1]));
      };
      advance({0, 0}, {150, 1});
      advance({150, 1}, {197, 30});
      for (int64_t t = 0; t < 3; ++t) advance({197 + t, 30 + t}, {198 + t, 31 + t});
      EXPECT_TRUE(close(parts, full, tolerance(emulated() ? dtype : at::kFloat, Op::kScan)));
      EXPECT_TRUE(bit_equal(state[1], untouched));
    }
}

TEST(SsdScan, NamesTheShapeThatDoesNotFit) {
  const at::Tensor v = at::zeros({6});
  try {
    ssd_scan(at::zeros({4, 57}), at::zeros({4, 6}), v, v, v, kSmall, Spans::uniform(1, 4));
    FAIL() << "no error";
  } catch (const Error& e) {
    EXPECT_EQ(e.message(), "[ssd_scan] xbc must be [4, 58] (tokens, num_heads * head_dim + 2 * num_groups * state_size), got Float [4, 57]");
  }
}

}  // namespace
}  // namespace tessera
