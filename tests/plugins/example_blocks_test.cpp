// The blocks of docs/examples/ against their formulas, token by token in fp64 and without a line of theirs or of layers/: values, gradients of the
// input and of every parameter, decoding. Each reference also runs without one of its parts, which must show: inputs are large enough for all to matter.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>

#include "plugin/registry.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/gradients.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

constexpr int64_t kHidden = 24;
const std::vector<int64_t> kLengths{1, 63, 130, 2, 17};

const Registry& examples() {
  static const Registry loaded = Registry::load({std::filesystem::path(TESSERA_BINARY_DIR) / "example_plugins"});
  return loaded;
}

at::Tensor random(at::IntArrayRef sizes, uint64_t seed) { return at::randn(sizes, at::detail::createCPUGenerator(seed), at::TensorOptions(at::kDouble)); }

int64_t sum(const std::vector<int64_t>& list) {
  int64_t total = 0;
  for (const int64_t n : list) total += n;
  return total;
}

// One block in one size, on its own, with parameters larger than those of a run.
class Subject {
 public:
  // The epsilon of norms is as large as what they see, so that a scale that a norm would hide shows.
  Subject(const std::string& type, const std::vector<std::pair<std::string, Value>>& keys)
      : type_(examples().block(type)), env_{.hidden_size = kHidden, .vocab_size = 40, .num_layers = 2, .norm_eps = 0.05} {
    if (!type_) throw std::logic_error("no plugin of " + type);
    config_ = type_->make_config();
    for (const auto& [key, value] : keys) type_->fields().find(key)->set(config_.get(), value);
    rows_ = type_->params(config_, env_);
    block_ = type_->make(config_, env_);
    for (size_t i = 0; i < rows_.size(); ++i) {
      const bool matrix = rows_[i].shape.size() == 2;
      parameters_.push_back(random(rows_[i].shape, 20 + i).mul(matrix ? 1.3 / std::sqrt(static_cast<double>(rows_[i].shape[1])) : 0.5));
    }
  }
  // The input, then the parameters in the order of their rows.
  std::vector<at::Tensor> inputs(int64_t n, at::ScalarType dtype = at::kDouble) const {
    std::vector<at::Tensor> list{random({n, kHidden}, 7).to(dtype)};
    for (size_t i = 0; i < rows_.size(); ++i) list.push_back(parameters_[i].to(rows_[i].fp32 && dtype == at::kBFloat16 ? at::kFloat : dtype));
    return list;
  }
  at::Tensor forward(const std::vector<at::Tensor>& in, const Spans& spans, const std::map<std::string, at::Tensor, std::less<>>* states = nullptr) const {
    Weights weights;
    for (size_t i = 0; i < rows_.size(); ++i) weights.add(in[i + 1], &rows_[i]);
    Context ctx(spans);
    ctx.set_states(states);
    return block_->forward(in[0], weights, ctx);
  }
  std::map<std::string, at::Tensor, std::less<>> states(int64_t slots, int64_t capacity) const {
    std::map<std::string, at::Tensor, std::less<>> map;
    for (const State& row : type_->state(config_, env_)) {
      std::vector<int64_t> shape{slots};
      if (row.per == State::Per::kToken) shape.push_back(capacity);
      shape.insert(shape.end(), row.shape.begin(), row.shape.end());
      map[row.name] = at::full(shape, 3.0, at::TensorOptions(at::kFloat));  // what an earlier sequence left
    }
    return map;
  }
  Cost cost(const Documents& documents) const { return type_->cost(config_, env_, documents); }
  const ParamTable& rows() const { return rows_; }

 private:
  const BlockType* type_;
  Env env_;
  ConfigPtr config_;
  ParamTable rows_;
  std::unique_ptr<Block> block_;
  std::vector<at::Tensor> parameters_;
};

// Inputs and document lengths -> output; `without` names a part that is left out or done wrong, "" for the formula itself.
using Formula = std::function<at::Tensor(const std::vector<at::Tensor>& in, const std::vector<int64_t>& lengths, const std::string& without)>;

at::Tensor swish(const at::Tensor& x) { return x / (1 + x.neg().exp()); }

void expect_formula(const Subject& subject, const Formula& formula) {
  const Spans spans = Spans::documents(kLengths);
  const int64_t n = sum(kLengths);
  const at::Tensor cotangent = random({n, kHidden}, 8);
  const auto inputs = subject.inputs(n);
  const auto want = with_gradients([&](const auto& in) { return formula(in, kLengths, ""); }, inputs, cotangent);
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    const auto got = with_gradients([&](const auto& in) { return subject.forward(in, spans); }, subject.inputs(n, dtype), cotangent);
    const double limit = tolerance(dtype, Op::kModel, n);
    EXPECT_TRUE(close(got.output, want.output, limit)) << dtype;
    EXPECT_TRUE(close(got.gradients[0], want.gradients[0], limit)) << dtype << " gradient of the input";
    for (size_t i = 0; i < subject.rows().size(); ++i)
      EXPECT_TRUE(close(got.gradients[i + 1], want.gradients[i + 1], limit)) << dtype << " gradient of " << subject.rows()[i].name;
  }
  at::NoGradGuard no_grad;
  EXPECT_TRUE(close(subject.forward(subject.inputs(n, at::kBFloat16), spans), want.output, tolerance(at::kBFloat16, Op::kModel, n)));
}

// A formula without a part is another formula by far more than the errors that are allowed.
void expect_parts_matter(const Subject& subject, const Formula& formula, const std::vector<std::string>& parts) {
  at::NoGradGuard no_grad;
  const auto inputs = subject.inputs(sum(kLengths));
  const at::Tensor whole = formula(inputs, kLengths, "");
  for (const std::string& part : parts) EXPECT_GT(relative_rms(formula(inputs, kLengths, part), whole), 0.02) << part;
}

// A prompt in chunks and single tokens, beside another sequence, from slots that hold what others left; then back, and again.
void expect_decoding(const Subject& subject, const Formula& formula) {
  at::NoGradGuard no_grad;
  const std::vector<int64_t> lengths{90, 41};
  const auto exact = subject.inputs(131), plain = subject.inputs(131, at::kFloat);
  const at::Tensor want = formula(exact, lengths, "");
  const double limit = tolerance(at::kFloat, Op::kModel, 131);
  auto states = subject.states(3, 100);
  struct Piece {
    int64_t slot, start, length;
  };
  const auto feed = [&](const std::vector<Piece>& pieces, bool right = true) {
    std::vector<Span> spans;
    std::vector<at::Tensor> rows, expected;
    for (const auto& [slot, start, length] : pieces) {
      const int64_t begin = (slot == 2 ? 0 : 90) + start;
      spans.push_back({.document = slot, .start = start, .length = length, .document_len = start + length, .state_slot = slot});
      rows.push_back(plain[0].narrow(0, begin, length)), expected.push_back(want.narrow(0, begin, length));
    }
    auto in = plain;
    in[0] = right ? at::cat(rows) : at::cat(rows).neg();
    const at::Tensor got = subject.forward(in, Spans(spans), &states);
    if (!right) return;
    EXPECT_TRUE(close(got, at::cat(expected), limit)) << fmt::format("{} tokens from {}", pieces[0].length, pieces[0].start);
  };
  feed({{2, 0, 37}, {0, 0, 1}});
  feed({{0, 1, 20}, {2, 37, 18}});
  auto kept = states;
  for (auto& [name, tensor] : kept) tensor = tensor.clone();
  for (int64_t t = 55; t < 70; ++t) feed({{2, t, 1}, {0, t - 34, 1}});
  feed({{2, 70, 3}}, /*right=*/false);
  states = kept;
  for (int64_t t = 55; t < 73; ++t) feed({{0, t - 34, 1}, {2, t, 1}});
  feed({{2, 73, 17}, {0, 39, 2}});
}

// --- gated_deltanet: S [V, K] of every head, one token after another.

struct DeltaSizes {
  int64_t heads, key, value, width, chunk;
};

Formula delta_formula(const DeltaSizes& z) {
  return [z](const std::vector<at::Tensor>& in, const std::vector<int64_t>& lengths, const std::string& without) {
    const auto &x = in[0], &in_proj = in[1], &kernel = in[2], &dt_bias = in[3], &A_log = in[4], &norm = in[5], &out_proj = in[6];
    const int64_t H = z.heads, K = z.key, V = z.value, C = H * (2 * K + V);
    const auto unit = [](const at::Tensor& t) { return t / (t.square().sum(-1, true) + 1e-6).sqrt(); };
    std::vector<at::Tensor> y;
    int64_t row = 0;
    for (const int64_t length : lengths) {
      const auto packed = x.narrow(0, row, length).matmul(in_proj.t()).unbind(0);
      row += length;
      at::Tensor S = at::zeros({H, V, K}, x.options());
      for (int64_t t = 0; t < length; ++t) {
        const auto part = packed[t].split_with_sizes({C, H * V, H, H}, 0);
        at::Tensor qkv = at::zeros({C}, x.options());
        for (int64_t w = 0; w < z.width; ++w) {
          const int64_t seen = t - (z.width - 1) + w;
          if (seen >= 0) qkv = qkv + kernel.select(1, 0).select(1, w) * packed[seen].narrow(0, 0, C);
        }
        if (without == "convolution") qkv = part[0];
        if (without != "silu of q, k, v") qkv = swish(qkv);
        at::Tensor q = qkv.narrow(0, 0, H * K).view({H, K}), k = qkv.narrow(0, H * K, H * K).view({H, K}), v = qkv.narrow(0, 2 * H * K, H * V).view({H, V});
        if (without != "norm of q") q = unit(q);
        if (without != "norm of k") k = unit(k);
        at::Tensor beta = 1 / (1 + part[2].neg().exp()), dt = (1 + (part[3] + dt_bias).exp()).log(), alpha = (A_log.exp().neg() * dt).exp();
        if (without == "alpha") alpha = at::ones_like(alpha);
        if (without == "dt_bias") alpha = (A_log.exp().neg() * (1 + part[3].exp()).log()).exp();
        if (without == "A_log") alpha = dt.neg().exp();
        if (without == "beta") beta = at::ones_like(beta);
        at::Tensor erased = beta.view({H, 1, 1}) * at::matmul(at::matmul(S, k.view({H, K, 1})), k.view({H, 1, K}));
        if (without == "erasing") erased = at::zeros_like(erased);
        S = alpha.view({H, 1, 1}) * (S - erased) + beta.view({H, 1, 1}) * at::matmul(v.view({H, V, 1}), k.view({H, 1, K}));
        at::Tensor o = at::matmul(S, q.view({H, K, 1})).view({H, V});
        if (without != "norm of o") o = o / (o.square().mean(-1, true) + 0.05).sqrt() * norm;
        if (without != "gate") o = o * swish(part[1]).view({H, V});
        y.push_back(at::matmul(out_proj, o.flatten()));
      }
    }
    return at::stack(y);
  };
}

class GatedDeltaNetTest : public testing::TestWithParam<DeltaSizes> {
 protected:
  const DeltaSizes z = GetParam();
  const Subject subject{"gated_deltanet", {{"num_heads", z.heads}, {"key_dim", z.key}, {"value_dim", z.value}, {"conv_width", z.width}, {"chunk", z.chunk}}};
  const Formula formula = delta_formula(z);
};

TEST_P(GatedDeltaNetTest, IsItsFormula) { expect_formula(subject, formula); }
TEST_P(GatedDeltaNetTest, Decodes) { expect_decoding(subject, formula); }
TEST_P(GatedDeltaNetTest, EveryPartMatters) {
  expect_parts_matter(subject, formula, {"convolution", "silu of q, k, v", "norm of q", "norm of k", "alpha", "dt_bias", "A_log", "beta", "erasing", "norm of o",
                                         "gate"});
}

// Chunks of one token, of more than a document has, and between.
INSTANTIATE_TEST_SUITE_P(Sizes, GatedDeltaNetTest,
                         testing::Values(DeltaSizes{3, 6, 10, 4, 16}, DeltaSizes{2, 9, 5, 3, 64}, DeltaSizes{2, 8, 8, 4, 1}, DeltaSizes{1, 16, 32, 2, 4096}));

// One key again and again at the largest rate: what it holds is replaced each time, in fp32 too, though powers of the chunk's matrix reach 1e17.
TEST(GatedDeltaNet, AlikeKeysAreReplacedNotSummed) {
  const DeltaSizes z{1, 8, 8, 2, 64};
  const Subject subject("gated_deltanet", {{"num_heads", z.heads}, {"key_dim", z.key}, {"value_dim", z.value}, {"conv_width", z.width}, {"chunk", z.chunk}});
  auto in = subject.inputs(200);
  in[0] = at::cat({random({200, kHidden - 1}, 9).mul(0.3), at::full({200, 1}, 4.0, in[0].options())}, 1);  // the last column makes k and beta
  in[1].narrow(0, 8, 8).zero_().select(1, kHidden - 1).copy_(at::linspace(0.2, 1, 8));                     // k
  in[1].narrow(0, 32, 1).zero_().select(1, kHidden - 1).fill_(5);                                          // beta = sigmoid(20)
  in[2].narrow(0, 8, 8).fill_(1);
  in[3].fill_(-9);  // alpha near 1
  auto plain = in;
  for (at::Tensor& t : plain) t = t.to(at::kFloat);
  at::NoGradGuard no_grad;
  EXPECT_TRUE(close(subject.forward(plain, Spans::documents({200})), delta_formula(z)(in, {200}, ""), tolerance(at::kFloat, Op::kModel, 200)));
}

// --- sliding_window_attention: the full square of scores of every head of every document.

struct WindowSizes {
  int64_t heads, kv_heads, dim, window;
  double theta;
};

Formula window_formula(const WindowSizes& z) {
  return [z](const std::vector<at::Tensor>& in, const std::vector<int64_t>& lengths, const std::string& without) {
    const auto &x = in[0], &q_proj = in[1], &kv_proj = in[2], &out_proj = in[3];
    const int64_t P = z.dim, half = P / 2, off = (without == "window, one more") - (without == "window, one less");
    const int64_t window = without == "window" ? 1 << 20 : z.window + off;
    std::vector<at::Tensor> y;
    int64_t row = 0;
    for (const int64_t T : lengths) {
      const at::Tensor x_td = x.narrow(0, row, T), q = x_td.matmul(q_proj.t()), kv = x_td.matmul(kv_proj.t());
      row += T;
      const auto turned = [&](const at::Tensor& t) {  // pairs (p, p + P/2) as complex numbers times e^{i position theta^(-2p/P)}
        std::vector<at::Tensor> low, high;
        for (int64_t p = 0; p < half; ++p) {
          const at::Tensor a = t.select(1, p), b = t.select(1, p + half), angle = at::arange(T, t.options()) * std::pow(z.theta, -2.0 * p / P);
          low.push_back(a * angle.cos() - b * angle.sin()), high.push_back(a * angle.sin() + b * angle.cos());
        }
        low.insert(low.end(), high.begin(), high.end());
        return without == "rope" ? t : at::stack(low, 1);
      };
      std::vector<at::Tensor> heads;
      for (int64_t h = 0; h < z.heads; ++h) {
        const int64_t g = without == "grouping" ? h % z.kv_heads : h / (z.heads / z.kv_heads);
        const at::Tensor k = turned(kv.narrow(1, g * P, P)), v = kv.narrow(1, (z.kv_heads + g) * P, P);
        at::Tensor weight = at::matmul(turned(q.narrow(1, h * P, P)), k.t());
        if (without != "scale") weight = weight / std::sqrt(static_cast<double>(P));
        const at::Tensor ago = at::arange(T).unsqueeze(1) - at::arange(T).unsqueeze(0);
        weight = weight.exp() * ago.ge(0).logical_and(ago.lt(window)).to(x.scalar_type());
        heads.push_back(at::matmul(weight / weight.sum(1, true), v));
      }
      y.push_back(at::matmul(at::cat(heads, 1), out_proj.t()));
    }
    return at::cat(y);
  };
}

class SlidingWindowTest : public testing::TestWithParam<WindowSizes> {
 protected:
  const WindowSizes z = GetParam();
  const Subject subject{"sliding_window_attention",
                        {{"num_heads", z.heads}, {"num_kv_heads", z.kv_heads}, {"head_dim", z.dim}, {"window", z.window}, {"rope_theta", z.theta}}};
  const Formula formula = window_formula(z);
};

TEST_P(SlidingWindowTest, IsItsFormula) { expect_formula(subject, formula); }
TEST_P(SlidingWindowTest, Decodes) { expect_decoding(subject, formula); }
TEST_P(SlidingWindowTest, EveryPartMatters) {
  std::vector<std::string> parts{"window", "window, one more", "window, one less", "rope", "scale"};
  if (z.kv_heads > 1) parts.push_back("grouping");
  expect_parts_matter(subject, formula, parts);
}
TEST_P(SlidingWindowTest, CostCountsThePairsThatAreSeen) {
  double pairs = 0;
  for (const int64_t T : kLengths)
    for (int64_t t = 0; t < T; ++t)
      for (int64_t s = 0; s <= t; ++s) pairs += t - s < z.window;
  Documents documents;
  for (const int64_t T : kLengths) documents.push_back({T, 1});
  EXPECT_EQ(subject.cost(documents).mixing, 4.0 * static_cast<double>(z.heads * z.dim) * pairs);
}

INSTANTIATE_TEST_SUITE_P(Sizes, SlidingWindowTest, testing::Values(WindowSizes{4, 2, 6, 19, 1e4}, WindowSizes{6, 3, 4, 2, 1e2}, WindowSizes{3, 1, 8, 64, 10}));

// --- swiglu_mlp

at::Tensor swiglu_formula(const std::vector<at::Tensor>& in, const std::vector<int64_t>&, const std::string& without) {
  const int64_t F = in[1].size(0) / 2;
  at::Tensor gate = in[0].matmul(in[1].narrow(0, 0, F).t()), up = in[0].matmul(in[1].narrow(0, F, F).t());
  if (without == "the order of gate and up") std::swap(gate, up);
  return ((without == "silu" ? gate : swish(gate)) * (without == "up" ? at::ones_like(up) : up)).matmul(in[2].t());
}

TEST(SwigluMlp, IsItsFormula) {
  const Subject subject("swiglu_mlp", {{"intermediate_size", int64_t{37}}});
  expect_formula(subject, swiglu_formula);
  expect_decoding(subject, swiglu_formula);
  expect_parts_matter(subject, swiglu_formula, {"the order of gate and up", "silu", "up"});
}

// The tests of every block, in the sizes of tests/plugins/conformance/. Plugins are loaded once in a process, so they run in another.
TEST(ExampleBlocks, Conform) {
  const std::string filter = "*/Conformance.*/gated_deltanet*:*/Conformance.*/sliding_window_attention*:*/Conformance.*/swiglu_mlp*";
  const std::string command =
      fmt::format("TESSERA_PLUGIN_PATH='{}/example_plugins' TESSERA_CONFORMANCE_PATH='{}/tests/plugins/conformance' '{}' '--gtest_filter={}' 2>&1",
                  TESSERA_BINARY_DIR, TESSERA_SOURCE_DIR, std::filesystem::read_symlink("/proc/self/exe").string(), filter);
  std::string out;
  FILE* pipe = popen(command.c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  for (int c; (c = fgetc(pipe)) != EOF;) out += static_cast<char>(c);
  EXPECT_EQ(pclose(pipe), 0) << out;
  for (const char* name : {"/gated_deltanet ", "/gated_deltanet_wide ", "/sliding_window_attention ", "/swiglu_mlp "})
    EXPECT_NE(out.find(fmt::format("OK ] Blocks/Conformance.DecodeStateRollsBack{}", name)), std::string::npos) << out;
}

}  // namespace
}  // namespace tessera
