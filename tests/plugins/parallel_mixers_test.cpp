// The token mixers over tensor- and context-parallel ranks: the ranks' outputs and gradients added up are those of one rank, by the rule in tessera/ranks.hpp.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/randn.h>
#include <fmt/ranges.h>

#include "tests/support/model.hpp"
#include "tests/support/on_ranks.hpp"
#include "tests/support/tolerance.hpp"

namespace tessera {
namespace {

constexpr int64_t kHidden = 32;

std::string text(const std::string& type, const std::string& keys) {
  return fmt::format("[model]\nhybrid_override_pattern = \"X\"\nvocab_size = 40\nhidden_size = {}\ninit_std = 0.2\n[symbols]\nX = \"{}\"\n[blocks.{}]\n{}", kHidden, type, type, keys);
}

at::Tensor local_part(const Param& param, at::Tensor part, int64_t ranks, int64_t rank) {
  for (const Shard& shard : param.shards) {
    std::string why;
    const auto ranges = shard_ranges(param, shard, ranks, rank, &why);
    if (!ranges) throw std::logic_error(why);
    std::vector<at::Tensor> list;
    for (const Range& range : *ranges) list.push_back(part.narrow(shard.dim, range.begin, range.end - range.begin));
    part = at::cat(list, shard.dim);
  }
  return part;
}

struct Case {
  std::string type, keys;
  std::vector<Mesh> meshes;
};

void expect_parts_make_the_whole(const Case& c, at::ScalarType dtype, const std::vector<std::vector<int64_t>>& packed) {
  Built built(text(c.type, c.keys), {.dtype = at::kDouble});
  const LayerPlan& layer = built.plan.layers[0];
  const BlockType& type = *plugins().block(c.type);
  const Weights stored = built.store.gather(layer.prefix);
  const auto generator = at::detail::createCPUGenerator(7);
  for (const auto& lengths : packed) {
    const Spans spans = Spans::documents(lengths);
    const auto normal = [&] { return at::randn({spans.num_tokens(), kHidden}, generator, at::TensorOptions(at::kDouble)).to(dtype).to(at::kDouble); };
    std::vector<at::Tensor> values{normal()};
    const at::Tensor dy_nd = normal();
    for (const Weight& weight : stored.list()) values.push_back(weight.tensor().detach().to(dtype).to(at::kDouble));
    // Of one rank of `mesh`: its output, and the gradients of its leaves, which have the shape of the whole parameters.
    const auto run = [&](const Mesh& mesh, Context& ctx, const at::Tensor& x_nd, const at::Tensor& dout_nd, int64_t tp, at::ScalarType t) {
      const at::AutoGradMode grad_mode(true);
      Env env = built.plan.env;
      env.mesh = mesh;
      ctx.set_mesh(mesh);
      std::vector<at::Tensor> leaves{x_nd.to(t).clone().requires_grad_()};
      for (size_t i = 1; i < values.size(); ++i) leaves.push_back(values[i].to(t).clone().requires_grad_());
      Weights local;
      for (size_t i = 1; i < values.size(); ++i) local.add(local_part(stored.list()[i - 1].row(), leaves[i], mesh.tp, tp), &stored.list()[i - 1].row());
      std::vector<at::Tensor> results{type.make(layer.config, env)->forward(leaves[0], local, ctx)};
      for (at::Tensor& g : torch::autograd::grad({results[0]}, leaves, {dout_nd.to(t)}, std::nullopt, false, /*allow_unused=*/true)) results.push_back(std::move(g));
      return results;
    };
    Context whole(spans);
    const auto want = run({}, whole, values[0], dy_nd, 0, at::kDouble);
    for (const Mesh& mesh : c.meshes) {
      std::vector<at::Tensor> got;
      for (const at::Tensor& t : want) got.push_back(t.defined() ? at::zeros_like(t.detach()) : t);
      std::mutex mutex;
      run_ranks(mesh, [&](MeshGroups& groups) {
        const ContextCut cut(spans, mesh.cp, groups.place().cp);
        Context ctx(mesh.cp > 1 ? cut.spans() : spans);
        ctx.set_groups(&groups);
        if (mesh.cp > 1) ctx.set_cut(&cut);
        const auto parts = run(mesh, ctx, cut.num_ranks() > 1 ? cut.take(values[0]) : values[0], mesh.cp > 1 ? cut.take(dy_nd) : dy_nd, groups.place().tp, dtype);
        const at::Tensor rows = mesh.cp > 1 ? row_numbers(cut) : at::arange(spans.num_tokens(), at::kLong);
        const std::lock_guard lock(mutex);
        for (size_t i = 0; i < got.size(); ++i) {
          if (!got[i].defined()) continue;
          ASSERT_TRUE(parts[i].defined()) << "no gradient of " << (i < 2 ? "x" : stored.list()[i - 2].row().name);
          const at::Tensor part = parts[i].detach().to(at::kDouble);
          if (i < 2) got[i].index_add_(0, rows, part);
          else got[i].add_(part);
        }
      });
      for (size_t i = 0; i < got.size(); ++i)
        if (got[i].defined()) {
          EXPECT_TRUE(close(got[i], want[i].detach(), tolerance(dtype, Op::kModel, kHidden)))
              << fmt::format("{} [{}] tp {}, cp {}, documents [{}], {}: {}", c.type, c.keys, mesh.tp, mesh.cp, fmt::join(lengths, ", "), c10::toString(dtype),
                             i == 0 ? "y" : i == 1 ? "gradient of x" : "gradient of " + stored.list()[i - 2].row().name);
        }
    }
  }
}

void expect_parts_make_the_whole(const Case& c) {
  expect_parts_make_the_whole(c, at::kDouble, {{3}, {33, 1, 1, 20}, {1, 70, 2}});
  expect_parts_make_the_whole(c, at::kFloat, {{1, 70, 2}});
}

constexpr const char* kMamba2 = "num_heads = 8\nhead_dim = 6\nstate_size = 8\nchunk = 16\n";
constexpr const char* kGqa = "num_heads = 8\nnum_kv_heads = 2\nhead_dim = 8\n";

TEST(ParallelMixers, Mamba2WithWholeGroupsOnEveryRank) {
  expect_parts_make_the_whole({"mamba2", std::string(kMamba2) + "num_groups = 4\nbias = true\n", {{.tp = 2}, {.tp = 4}, {.cp = 2}, {.cp = 3}, {.cp = 2, .tp = 2}}});
}

TEST(ParallelMixers, Mamba2WithGroupsThatRanksShare) {
  expect_parts_make_the_whole({"mamba2", std::string(kMamba2) + "num_groups = 2\nconv_width = 6\n", {{.tp = 4}, {.tp = 8}, {.cp = 2, .tp = 4}}});
  expect_parts_make_the_whole({"mamba2", std::string(kMamba2) + "num_groups = 1\nconv_width = 1\n", {{.tp = 2}, {.cp = 3, .tp = 2}}});
}

TEST(ParallelMixers, AttentionWithKvHeadsApartAndShared) {
  expect_parts_make_the_whole({"gqa", std::string(kGqa), {{.tp = 2}, {.tp = 4}, {.tp = 8}, {.cp = 2}, {.cp = 4}, {.cp = 2, .tp = 4}}});
  expect_parts_make_the_whole({"gqa", std::string(kGqa) + "bias = true\nrope_theta = 1e4\nqk_norm = true\nsliding_window = 19\n", {{.tp = 4}, {.cp = 2, .tp = 2}, {.cp = 3}}});
}

// Every rule that the forward pass needs, with its numbers and values that keep all of them.
TEST(ParallelMixers, MeshesThatDoNotFitAreNamed) {
  const auto issues = [](const std::string& type, const std::string& keys, int64_t tp) {
    const Config config = parse_config(text(type, keys), "test.toml", {}, plugins());
    const ModelPlan plan = make_plan(config);
    Env env = plan.env;
    env.mesh.tp = tp;
    Issues found;
    plugins().block(type)->check(plan.layers[0].config, env, found);
    std::vector<std::string> lines;
    for (const Issue& issue : found.list()) lines.push_back(fmt::format("{}: {}; {}", issue.key, issue.rule, issue.help));
    return fmt::format("{}", fmt::join(lines, "\n"));
  };
  const std::string mamba2 = kMamba2, gqa = kGqa;
  EXPECT_EQ(issues("mamba2", mamba2 + "num_groups = 2", 8), "");
  EXPECT_EQ(issues("mamba2", mamba2 + "num_groups = 2", 3),
            "num_heads: must be a multiple of the tensor-parallel degree, got 8 % 3 = 2; nearest: 6, 12\n"
            "parallelism.tensor_parallel_degree: must be a multiple of num_groups where it exceeds it, got 3 % 2 = 1; nearest: 2, 4");
  EXPECT_EQ(issues("mamba2", "num_heads = 12\nhead_dim = 6\nstate_size = 8\nnum_groups = 6", 4),
            "num_groups: must be a multiple of the tensor-parallel degree, got 6 % 4 = 2; nearest: 4, 12");
  EXPECT_EQ(issues("gqa", gqa, 4), "");
  EXPECT_EQ(issues("gqa", gqa, 3),
            "num_heads: must be a multiple of the tensor-parallel degree, got 8 % 3 = 2; nearest: 6, 12\n"
            "num_kv_heads: must be a multiple of the tensor-parallel degree or divide it, got 3 % 2 = 1; nearest: 1");
  EXPECT_EQ(issues("gqa", "num_heads = 12\nnum_kv_heads = 6\nhead_dim = 8", 4),
            "num_kv_heads: must be a multiple of the tensor-parallel degree or divide it, got 6 % 4 = 2; nearest: 4, 12");
}

}  // namespace
}  // namespace tessera
