// Every operator beside its plain composition: op/<operator>/<sizes>/<dtype>/<pass>/<fast|reference>.
// TESSERA_BENCH_DEVICE=cuda runs them there, timed by events with a cold cache.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include "benchmarks/support.hpp"
#include "layers/activation.hpp"
#include "layers/attention.hpp"
#include "layers/conv.hpp"
#include "layers/cross_entropy.hpp"
#include "layers/expert_mlp.hpp"
#include "layers/linear.hpp"
#include "layers/matmul.hpp"
#include "layers/norm.hpp"
#include "layers/rope.hpp"
#include "layers/routing.hpp"
#include "layers/ssd_scan.hpp"
#include "train/setup.hpp"

namespace tessera::benchmarks {
namespace {

using at::ScalarType;

at::TensorOptions on(ScalarType type = at::kFloat) { return at::TensorOptions(bench_device()).dtype(type); }

double width(ScalarType type) { return type == at::kBFloat16 ? 2 : 4; }

// Makes the fast or the reference call; inputs are made anew for each benchmark, so that no more than one case is in memory.
using Make = std::function<Case(ScalarType dtype, bool reference)>;

void add(const std::string& name, bool differentiable, bool has_reference, const Make& make, std::vector<ScalarType> dtypes = {at::kFloat, at::kBFloat16}) {
  for (const ScalarType dtype : dtypes)
    for (const bool backward : {false, true}) {
      if (backward && !differentiable) continue;
      for (const bool reference : {false, true}) {
        if (reference && !has_reference) continue;
        const auto full = fmt::format("op/{}/{}/{}/{}", name, dtype_word(dtype), backward ? "fwd_bwd" : "fwd", reference ? "reference" : "fast");
        auto* registered = benchmark::RegisterBenchmark(full.c_str(), [=](benchmark::State& state) { time_case(state, make(dtype, reference), backward); });
        registered->Unit(benchmark::kMicrosecond);
        if (bench_device().is_cuda()) registered->UseManualTime();
        else registered->UseRealTime();
      }
    }
}

// Documents of one length: what a batch of training holds.
Spans rows(int64_t tokens, int64_t length) { return Spans::uniform(tokens / length, length); }

void norms() {
  std::vector<std::pair<int64_t, int64_t>> sizes{{2048, 256}, {2048, 1024}, {2048, 4096}, {1, 4096}};
  if (bench_device().is_cuda()) sizes.insert(sizes.end(), {{8192, 2688}, {8192, 4096}});
  for (const auto& [N, D] : sizes) {
    add(fmt::format("rms_norm/{}x{}", N, D), true, true, [=](ScalarType dtype, bool reference) {
      const at::Tensor x = at::randn({N, D}, on(dtype)), w = at::rand({D}, on());
      return Case{[=] { return reference ? rms_norm_ref(x, w, 1e-5, dtype) : rms_norm(x, w, 1e-5, dtype); }, {x, w}, double(N), 0, width(dtype) * 2.0 * N * D};
    });
    add(fmt::format("gated_rms_norm/{}x{}", N, D), true, true, [=](ScalarType dtype, bool reference) {
      const auto y_type = bench_device().is_cuda() ? dtype : at::kFloat;
      const at::Tensor y = at::randn({N, D}, on(y_type)), z = at::randn({N, D}, on(dtype)), w = at::rand({D}, on());
      const int64_t group = N == 8192 ? D / 8 : D / 4;
      return Case{[=] { return reference ? gated_rms_norm_ref(y, z, w, group, 1e-5, dtype) : gated_rms_norm(y, z, w, group, 1e-5, dtype); }, {y, z, w}, double(N), 0,
                  (width(y_type) + 2 * width(dtype)) * N * D};
    });
  }
}

void convolution() {
  std::vector<std::tuple<int64_t, int64_t, int64_t>> sizes{{2048, 768, 512}, {2048, 3072, 2048}, {2048, 768, 17}};
  if (bench_device().is_cuda()) sizes.insert(sizes.end(), {{8192, 6144, 8192}, {32768, 6144, 4096}});
  for (const auto& [N, C, T] : sizes) {
    add(fmt::format("causal_conv1d/{}x{}/documents_of_{}", N, C, T), true, true, [=](ScalarType dtype, bool reference) {
      const Spans spans = rows(N / T * T, T);
      const at::Tensor x = at::randn({spans.num_tokens(), C}, on(dtype)), w = at::randn({C, 1, 4}, on(dtype)), b = at::randn({C}, on(dtype));
      return Case{[=] { return reference ? causal_conv1d_ref(x, w, b, spans, true) : causal_conv1d(x, w, b, spans, true); }, {x, w, b}, double(x.size(0)), 0,
                  width(dtype) * 2 * x.numel()};
    });
  }
}

void scan() {
  struct Sizes {
    int64_t tokens, length, heads, head_dim, groups, state;
  };
  std::vector<Sizes> all{{2048, 512, 8, 64, 2, 64}, {2048, 2048, 16, 64, 8, 128}, {16384, 16384, 8, 64, 2, 64}, {2048, 97, 8, 64, 2, 64}};
  if (bench_device().is_cuda()) all.insert(all.end(), {{4096, 4096, 64, 64, 8, 128}, {8192, 8192, 64, 64, 8, 128}, {32768, 4096, 64, 64, 8, 128}});
  for (const Sizes z : all)
    add(fmt::format("ssd_scan/{}/documents_of_{}/H{}xP{}xG{}xS{}", z.tokens, z.length, z.heads, z.head_dim, z.groups, z.state), true, true, [=](ScalarType dtype, bool reference) {
      const SsdSizes sizes{.num_heads = z.heads, .head_dim = z.head_dim, .num_groups = z.groups, .state_size = z.state, .chunk = 64};
      const Spans spans = rows(z.tokens / z.length * z.length, z.length);
      const int64_t N = spans.num_tokens(), inner = z.heads * z.head_dim;
      const at::Tensor xbc = at::randn({N, inner + 2 * z.groups * z.state}, on(dtype)), dt = at::randn({N, z.heads}, on(dtype)), bias = at::randn({z.heads}, on()), A = at::rand({z.heads}, on()),
                       D = at::randn({z.heads}, on());
      const double chunks = static_cast<double>(spans.size() * ((z.length + 63) / 64));
      return Case{[=] { return reference ? ssd_scan_ref(xbc, dt, bias, A, D, sizes, spans) : ssd_scan(xbc, dt, bias, A, D, sizes, spans); }, {xbc, dt, bias, A, D}, double(N),
                  chunks * ssd_scan_ref_flops(sizes, 64), width(dtype) * xbc.numel() + 4.0 * N * inner};
    });
}

// One token of every sequence: the state is read and written.
void scan_steps() {
  for (const auto& [batch, H, P, G, S] : {std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>{1, 64, 64, 8, 128}, {64, 64, 64, 8, 128}})
    add(fmt::format("ssd_scan_step/batch_{}/H{}xP{}xG{}xS{}", batch, H, P, G, S), false, true, [=](ScalarType dtype, bool reference) {
      const SsdSizes sizes{.num_heads = H, .head_dim = P, .num_groups = G, .state_size = S};
      std::vector<Span> list;
      for (int64_t s = 0; s < batch; ++s) list.push_back({s, 100, 1, 101, s});
      const Spans spans(list);
      const at::Tensor xbc = at::randn({batch, H * P + 2 * G * S}, on(dtype)), dt = at::randn({batch, H}, on(dtype)), vector = at::rand({H}, on()),
                       state = at::zeros({batch, H, P, S}, on());
      return Case{[=] { return reference ? ssd_scan_ref(xbc, dt, vector, vector, vector, sizes, spans, state) : ssd_scan(xbc, dt, vector, vector, vector, sizes, spans, state); },
                  {}, double(batch), 6.0 * batch * H * P * S, 8.0 * state.numel()};
    });
}

void attentions() {
  struct Sizes {
    int64_t tokens, length, heads, kv_heads, dim, window;
  };
  for (const Sizes z : {Sizes{2048, 512, 8, 2, 32, 0}, {2048, 2048, 8, 2, 64, 0}, {2048, 2048, 8, 2, 64, 256}, {2048, 97, 8, 2, 64, 0}})
    add(fmt::format("attention/{}/documents_of_{}/H{}xK{}xP{}/window_{}", z.tokens, z.length, z.heads, z.kv_heads, z.dim, z.window), true, true, [=](ScalarType dtype, bool reference) {
      const Spans spans = rows(z.tokens / z.length * z.length, z.length);
      const int64_t N = spans.num_tokens();
      const at::Tensor q = at::randn({N, z.heads, z.dim}, on(dtype)), k = at::randn({N, z.kv_heads, z.dim}, on(dtype)), v = at::randn({N, z.kv_heads, z.dim}, on(dtype));
      const double w = z.window ? std::min(z.window, z.length) : z.length, pairs = spans.size() * (w * (w + 1) / 2 + (z.length - w) * w), scale = 0.125;
      return Case{[=] { return reference ? attention_ref(q, k, v, spans, scale, z.window) : attention(q, k, v, spans, scale, z.window); }, {q, k, v}, double(N),
                  4.0 * z.heads * z.dim * pairs, width(dtype) * 2.0 * N * z.dim * (z.heads + z.kv_heads)};
    });
  struct Steps {
    int64_t batch, context, heads, dim;
  };
  std::vector<Steps> steps{{1, 64, 8, 64}, {1, 1024, 8, 64}, {1, 16384, 8, 64}, {16, 1024, 8, 64}};
  if (bench_device().is_cuda()) steps.insert(steps.end(), {{1, 16384, 32, 128}, {64, 2048, 32, 128}});
  for (const auto& [batch, context, H, P] : steps)
    add(fmt::format("attention_cache/batch_{}/context_{}/H{}xK2xP{}", batch, context, H, P), false, true, [=](ScalarType dtype, bool reference) {
      std::vector<Span> list;
      for (int64_t s = 0; s < batch; ++s) list.push_back({s, context - 1, 1, context, s});
      const Spans spans(list);
      const at::Tensor q = at::randn({batch, H, P}, on(dtype)), k = at::randn({batch, 2, P}, on(dtype)), ck = at::randn({batch, context, 2, P}, on(dtype)), cv = ck.clone();
      return Case{[=] { return reference ? attention_ref(q, k, k, spans, 0.125, 0, ck, cv) : attention(q, k, k, spans, 0.125, 0, ck, cv); }, {}, double(batch),
                  4.0 * H * P * context * batch, width(dtype) * 2.0 * ck.numel()};
    });
}

void products() {
  for (const auto& [N, D, O] : {std::tuple<int64_t, int64_t, int64_t>{1, 256, 1288}, {16, 256, 1288}, {1, 2048, 2048}, {64, 1024, 1024}, {2048, 256, 1288}, {2048, 1024, 1024}})
    add(fmt::format("linear/{}x{}x{}", N, D, O), true, true, [=](ScalarType dtype, bool reference) {
      const at::Tensor x = at::randn({N, D}, on(dtype)), w = at::randn({O, D}, on(dtype));
      return Case{[=] { return reference ? at::linear(x, w) : tessera::linear(x, w); }, {x, w}, double(N), 2.0 * N * D * O, width(dtype) * (N * D + D * O + N * O)};
    });
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>> sizes{{2048, 16, 4, 256, 256}, {2048, 64, 6, 512, 512}, {1, 16, 4, 256, 256}, {16, 16, 4, 256, 256}};
  if (bench_device().is_cuda()) sizes.insert(sizes.end(), {{8192, 128, 6, 2688, 1856}, {32768, 128, 6, 2688, 1856}});
  for (const auto& [N, E, k, D, F] : sizes) {
    const auto name = fmt::format("{}/E{}xk{}/{}x{}", N, E, k, D, F);
    add("grouped_linear/" + name, true, true, [=](ScalarType dtype, bool reference) {
      const Dispatch d = dispatch(choose_experts(at::rand({N, E}, on()), {}, k), E);
      const at::Tensor x = at::randn({N * k, D}, on(dtype)), w = at::randn({E, F, D}, on(dtype));
      const auto plain = [=] {
        std::vector<at::Tensor> parts;
        for (int64_t e = 0, row = 0; e < E; ++e) {
          const int64_t count = d.counts_e[e].item<int64_t>();
          parts.push_back(at::linear(x.narrow(0, row, count), w[e]));
          row += count;
        }
        return at::cat(parts);
      };
      return Case{[=] { return reference ? plain() : grouped_linear(x, w, d.counts_e); }, {x, w}, double(N), 2.0 * N * k * D * F, width(dtype) * (N * k * (D + F) + E * D * F)};
    });
    // The whole mixture, dispatch and weights included; on a GPU its reference is libtorch's grouped product among the compositions of the rest.
    add("expert_mlp/" + name, true, true, [=](ScalarType dtype, bool reference) {
      const at::Tensor chosen = choose_experts(at::rand({N, E}, on()), {}, k), weights = at::rand({N, k}, on());
      const at::Tensor x = at::randn({N, D}, on(dtype)), up = at::randn({E, F, D}, on(dtype)), down = at::randn({E, D, F}, on(dtype));
      const auto plain = [=] {
        const Dispatch d = dispatch_ref(chosen, E);
        if (!x.is_cuda() || dtype != at::kBFloat16) return expert_mlp_ref(x, weights, up, down, d);
        const at::Tensor ends = d.counts_e.cumsum(0).to(at::kInt);
        const at::Tensor h = relu2_ref(at::_grouped_mm(permute_tokens_ref(x, d), up.transpose(1, 2), ends));
        return combine_tokens_ref(at::_grouped_mm(h, down.transpose(1, 2), ends), weights, d);
      };
      return Case{[=] { return reference ? plain() : expert_mlp(x, weights, up, down, dispatch(chosen, E)); }, {x, up, down}, double(N), 4.0 * N * k * D * F,
                  width(dtype) * (2 * N * D + 2 * E * D * F)};
    });
  }
}

void experts() {
  for (const auto& [N, E, k, D] : {std::tuple<int64_t, int64_t, int64_t, int64_t>{2048, 16, 4, 256}, {2048, 128, 6, 1024}}) {
    const auto size = fmt::format("{}/E{}xk{}", N, E, k);
    add("choose_experts/" + size, false, true, [=](ScalarType, bool reference) {
      const at::Tensor scores = at::rand({N, E}, on());
      return Case{[=] { return reference ? choose_experts_ref(scores, {}, k) : choose_experts(scores, {}, k); }, {}, double(N), 0, 4.0 * N * E};
    }, {at::kFloat});
    add("dispatch/" + size, false, true, [=](ScalarType, bool reference) {
      const at::Tensor chosen = choose_experts(at::rand({N, E}, on()), {}, k);
      return Case{[=] { return reference ? dispatch_ref(chosen, E).row_nk : dispatch(chosen, E).row_nk; }, {}, double(N), 0, 32.0 * N * k};
    }, {at::kFloat});
    add(fmt::format("permute_tokens/{}xD{}", size, D), true, true, [=](ScalarType dtype, bool reference) {
      const Dispatch d = dispatch(choose_experts(at::rand({N, E}, on()), {}, k), E);
      const at::Tensor x = at::randn({N, D}, on(dtype));
      return Case{[=] { return reference ? permute_tokens_ref(x, d) : permute_tokens(x, d); }, {x}, double(N), 0, width(dtype) * N * D * (1 + k)};
    });
    add(fmt::format("combine_tokens/{}xD{}", size, D), true, true, [=](ScalarType dtype, bool reference) {
      const Dispatch d = dispatch(choose_experts(at::rand({N, E}, on()), {}, k), E);
      const at::Tensor y = at::randn({N * k, D}, on(dtype)), w = at::rand({N, k}, on());
      return Case{[=] { return reference ? combine_tokens_ref(y, w, d) : combine_tokens(y, w, d); }, {y, w}, double(N), 0, width(dtype) * N * D * (1 + k)};
    });
    add("seq_aux_loss/" + size, true, true, [=](ScalarType, bool reference) {
      const at::Tensor logits = at::randn({N, E}, on());
      const Spans spans = rows(N, 512);
      return Case{[=] { return reference ? seq_aux_loss_ref(logits, spans, {}, k) : seq_aux_loss(logits, spans, {}, k); }, {logits}, double(N), 0, 4.0 * N * E};
    }, {at::kFloat});
    add("routing/" + size, true, true, [=](ScalarType, bool reference) {
      const at::Tensor logits = at::randn({N, E}, on());
      return Case{[=] {
        if (reference) {
          const at::Tensor scores = at::sigmoid(logits);
          return expert_weights(scores, choose_experts_ref(scores, {}, k), true, 2.5);
        }
        const RouterScores scores = router_scores(logits);
        return expert_weights(scores, choose_experts(scores, {}, k), true, 2.5);
      }, {logits}, double(N), 0, 4.0 * N * E};
    }, {at::kFloat});
    add("expert_weights/" + size, true, false, [=](ScalarType, bool) {
      const at::Tensor scores = at::rand({N, E}, on()), chosen = choose_experts(scores, {}, k);
      return Case{[=] { return expert_weights(scores, chosen, true, 2.5); }, {scores}, double(N), 0, 4.0 * N * E};
    }, {at::kFloat});
  }
}

void losses() {
  for (const auto& [N, D, V] : {std::tuple<int64_t, int64_t, int64_t>{2048, 256, 256}, {2048, 512, 32768}, {512, 512, 131072}}) {
    std::vector<ScalarType> dtypes{at::kFloat};
    if (V <= 32768 || bench_device().is_cuda()) dtypes.push_back(at::kBFloat16);
    add(fmt::format("linear_cross_entropy/{}x{}x{}", N, D, V), true, true, [=](ScalarType dtype, bool reference) {
      const at::Tensor h = at::randn({N, D}, on(dtype)), w = at::randn({V, D}, on(dtype)), targets = at::randint(V, {N}, on(at::kLong));
      return Case{[=] { return reference ? linear_cross_entropy_ref(h, w, targets) : linear_cross_entropy(h, w, targets); }, {h, w}, double(N), 2.0 * N * D * V,
                  width(dtype) * (N * D + D * V)};
    }, dtypes);
  }
  // What fwd_bwd of these costs at least: logits, gradient of h and gradient of the weight, into memory that is there.
  for (const auto& [N, D, V] : {std::tuple<int64_t, int64_t, int64_t>{2048, 256, 256}, {2048, 512, 32768}, {512, 512, 131072}})
    add(fmt::format("linear_cross_entropy_products/{}x{}x{}", N, D, V), false, false, [=](ScalarType dtype, bool) {
      const at::Tensor h = at::randn({N, D}, on(dtype)), w = at::randn({V, D}, on(dtype)), logits = at::randn({N, V}, on(dtype)), dh = at::zeros({N, D}, on(dtype)), dw = at::zeros({V, D}, on(dtype));
      return Case{[=] {
        at::Tensor to_logits = logits, to_h = dh, to_w = dw;
        product_into(to_logits, h, w.t()), product_into(to_h, logits, w), product_into(to_w, logits.t(), h);
        return dw;
      }, {}, double(N), 6.0 * N * D * V, width(dtype) * (N * D + D * V)};
    }, V <= 32768 ? std::vector<ScalarType>{at::kFloat, at::kBFloat16} : std::vector<ScalarType>{at::kFloat});
}

void elementwise() {
  for (const int64_t F : {512, 4096})
    add(fmt::format("relu2/2048x{}", F), true, true, [=](ScalarType dtype, bool reference) {
      const at::Tensor x = at::randn({2048, F}, on(dtype));
      return Case{[=] { return reference ? relu2_ref(x) : relu2(x); }, {x}, 2048, 0, width(dtype) * 2 * x.numel()};
    });
  add("rope/2048xH8xP64", true, false, [](ScalarType dtype, bool) {
    const at::Tensor x = at::randn({2048, 8, 64}, on(dtype));
    const Spans spans = rows(2048, 512);
    return Case{[=] { return rope(x, spans.positions_n(bench_device()), 10000); }, {x}, 2048, 0, width(dtype) * 2 * x.numel()};
  });
}

}  // namespace
}  // namespace tessera::benchmarks

int main(int argc, char** argv) {
  using namespace tessera::benchmarks;
  tessera::apply_runtime({});
  norms(), convolution(), scan(), scan_steps(), attentions(), products(), experts(), losses(), elementwise();
  return run(argc, argv);
}
