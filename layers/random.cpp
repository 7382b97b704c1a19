#include "layers/random.hpp"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/PhiloxRNGEngine.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>

#include "layers/gpu.hpp"
#include "tessera/error.hpp"

namespace tessera {

namespace {

constexpr int64_t kAtOnce = 4;  // numbers of one turn of the generator

// One stream of numbers: [token, column].
struct Stream {
  uint64_t key;
  at::Tensor token_n;  // int64 [N]
  int64_t width, first;
};

uint64_t mixed(uint64_t x) {  // the finaliser of splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

Stream stream(const Context& ctx, std::string_view name, int64_t width, int64_t first) {
  const Draws* draws = ctx.draws();
  if (!draws) throw Error(ExitCode::kPlugin, fmt::format("draws '{}' outside of training", name), "ask ctx.training() first");
  if (width < 0 || first < 0) throw Error(ExitCode::kPlugin, fmt::format("draws {} columns of '{}' from column {}", width, name, first));
  uint64_t key = mixed(static_cast<uint64_t>(draws->seed) + 0x9e3779b97f4a7c15u);
  for (const std::string_view part : {std::string_view(draws->layer), std::string_view("\n"), name})
    for (const unsigned char c : part) key = mixed(key ^ c);
  return {key, draws->token_n, width, first};
}

at::Tensor draw_cpu(const Stream& s) {
  const int64_t n = s.token_n.numel();
  const at::Tensor out = at::empty({n, s.width}, at::kFloat);
  float* to = out.mutable_data_ptr<float>();
  const at::Tensor token_n = s.token_n.contiguous();
  const int64_t* token = token_n.const_data_ptr<int64_t>();
  at::parallel_for(0, n, std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(s.width, 1)), [&](int64_t from, int64_t end) {
    for (int64_t i = from; i < end; ++i)
      for (int64_t column = s.first; column < s.first + s.width;) {
        const int64_t turn = column / kAtOnce;
        at::Philox4_32 engine(s.key, static_cast<uint64_t>(token[i]), static_cast<uint64_t>(turn));
        for (int64_t c = turn * kAtOnce; c < (turn + 1) * kAtOnce; ++c) {
          const uint32_t bits = engine();
          if (c < column || c >= s.first + s.width) continue;
          to[i * s.width + c - s.first] = static_cast<float>(bits >> 8) * 0x1p-24f;
        }
        column = (turn + 1) * kAtOnce;
      }
  });
  return out;
}

// The words of the generator as int64 tensors below 2^32.
at::Tensor draw_composed(const Stream& s) {
  constexpr int64_t kWord = 0xffffffff;
  const auto high = [](const at::Tensor& x) { return x.bitwise_right_shift(32).bitwise_and(kWord); };  // of a product that may have wrapped
  const int64_t turn = s.first / kAtOnce, turns = s.width > 0 ? (s.first + s.width - 1) / kAtOnce - turn + 1 : 0;
  const at::Tensor turn_1t = at::arange(turn, turn + turns, s.token_n.options()).unsqueeze(0), zeros_nt = (s.token_n.unsqueeze(1) * 0) + turn_1t * 0;
  const at::Tensor token_nt = zeros_nt + s.token_n.unsqueeze(1), turn_nt = zeros_nt + turn_1t;
  std::array<at::Tensor, 4> c{turn_nt.bitwise_and(kWord), high(turn_nt), token_nt.bitwise_and(kWord), high(token_nt)};
  std::array<uint32_t, 2> key{static_cast<uint32_t>(s.key), static_cast<uint32_t>(s.key >> 32)};
  for (int round = 0; round < 10; ++round) {
    const at::Tensor a = c[0] * int64_t{0xD2511F53}, b = c[2] * int64_t{0xCD9E8D57};
    c = {high(b).bitwise_xor(c[1]).bitwise_xor(int64_t{key[0]}), b.bitwise_and(kWord), high(a).bitwise_xor(c[3]).bitwise_xor(int64_t{key[1]}), a.bitwise_and(kWord)};
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  const at::Tensor bits_nc = at::stack({c[0], c[1], c[2], c[3]}, 2).reshape({s.token_n.numel(), turns * kAtOnce});
  return bits_nc.narrow(1, s.first - turn * kAtOnce, s.width).bitwise_right_shift(8).to(at::kFloat) * 0x1p-24;
}

at::Tensor draw(const Stream& s) {
  if (lies_on_gpu(s.token_n)) return gpu_kernels()->uniform(s.key, s.token_n, s.width, s.first);
  return s.token_n.is_cpu() ? draw_cpu(s) : draw_composed(s);
}

struct DropoutFunction : public torch::autograd::Function<DropoutFunction> {
  static at::Tensor apply_mask(const at::Tensor& x, const Stream& s, double p) {
    if (on_gpu(x)) return gpu_kernels()->dropout(x, s.key, s.token_n, s.first, p);
    return at::where(draw(s) >= p, x.div(1 - p), at::scalar_tensor(0, x.options()));
  }
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x_nw, const at::Tensor& token_n, int64_t key, int64_t first, double p) {
    ctx->save_for_backward({token_n});
    ctx->saved_data["key"] = key, ctx->saved_data["first"] = first, ctx->saved_data["p"] = p;
    return apply_mask(x_nw, {static_cast<uint64_t>(key), token_n, x_nw.size(1), first}, p);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    const auto key = static_cast<uint64_t>(ctx->saved_data["key"].toInt());
    const at::Tensor grad = apply_mask(grads[0], {key, ctx->get_saved_variables()[0], grads[0].size(1), ctx->saved_data["first"].toInt()}, ctx->saved_data["p"].toDouble());
    return {grad, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor uniform(const Context& ctx, std::string_view name, int64_t width, int64_t first) { return draw(stream(ctx, name, width, first)); }

at::Tensor uniform_ref(const Context& ctx, std::string_view name, int64_t width, int64_t first) { return draw_composed(stream(ctx, name, width, first)); }

at::Tensor dropout(const Context& ctx, const at::Tensor& x_nw, double p, std::string_view name, int64_t first) {
  if (!(p >= 0 && p < 1)) throw Error(ExitCode::kPlugin, fmt::format("dropout of '{}' needs a probability in [0, 1), got {}", name, p));
  if (!ctx.training() || p == 0) return x_nw;
  if (x_nw.dim() != 2) throw Error(ExitCode::kPlugin, fmt::format("dropout of '{}' takes [tokens, columns], got {} dimensions", name, x_nw.dim()));
  const Stream s = stream(ctx, name, x_nw.size(1), first);
  if (s.token_n.numel() != x_nw.size(0)) throw Error(ExitCode::kPlugin, fmt::format("dropout of '{}' got {} rows of {} tokens", name, x_nw.size(0), s.token_n.numel()));
  return DropoutFunction::apply(x_nw, s.token_n, static_cast<int64_t>(s.key), first, p);
}

}  // namespace tessera
