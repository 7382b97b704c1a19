// Conformance: how a block's parameters are cut over ranks, and that the ranks together compute what one does. Every rank runs here, one after the other.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randn.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/autograd.h>

#include <numeric>

#include "parallel/mesh_groups.hpp"
#include "store/init.hpp"
#include "tests/support/conformance.hpp"

namespace tessera::conformance {

namespace {

std::vector<Mesh> meshes() {
  return {{.tp = 2}, {.tp = 3}, {.tp = 4}, {.tp = 8}, {.dp_shard = 2, .ep = 2}, {.dp_shard = 3, .ep = 3}, {.tp = 2, .etp = 2}, {.dp_shard = 2, .tp = 2, .ep = 2, .etp = 2}};
}

at::Tensor initial_values(const Param& param, int64_t piece) {
  const int64_t n = num_elements(param.shape);
  at::Tensor out = at::empty({n}, at::TensorOptions(at::kFloat));
  for (int64_t end = n; end > 0; end -= std::min(piece, end)) {  // from the back: the order must not matter
    at::Tensor part = out.narrow(0, end - std::min(piece, end), std::min(piece, end));
    fill_initial(part, param.init, 3, param.name, end - part.numel());
  }
  return out;
}

// The parts of the dimension that `shard` cuts: its segments, else all of it.
std::vector<Segment> parts_of(const Param& param, const Shard& shard) {
  if (!param.segments.empty() && shard.dim == param.shards[0].dim && shard.axis == param.shards[0].axis) return param.segments;
  return {{.name = "", .size = param.shape.at(static_cast<size_t>(shard.dim)), .unit = shard.unit}};
}

// Every rank holds as much, and every element of a part lies on the same number of ranks, at least one.
void expect_covered(const Param& param, const Shard& shard, const Mesh& mesh) {
  const int64_t ranks = degree(mesh, shard.axis), length = param.shape.at(static_cast<size_t>(shard.dim));
  std::vector<int64_t> holders(static_cast<size_t>(length), 0);
  int64_t rows = -1;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    std::string why;
    const auto ranges = shard_ranges(param, shard, ranks, rank, &why);
    ASSERT_TRUE(ranges) << why;
    int64_t here = 0;
    for (const Range& range : *ranges) {
      ASSERT_TRUE(range.begin >= 0 && range.begin <= range.end && range.end <= length) << fmt::format("{}: rank {} holds [{}, {}) of {}", param.name, rank, range.begin, range.end, length);
      for (int64_t i = range.begin; i < range.end; ++i) ++holders[static_cast<size_t>(i)];
      here += range.end - range.begin;
    }
    EXPECT_TRUE(rows < 0 || here == rows) << param.name << ": ranks hold unequal shares over " << mesh_text(mesh);
    rows = here;
  }
  int64_t begin = 0;
  for (const Segment& part : parts_of(param, shard)) {
    const auto [low, high] = std::minmax_element(holders.begin() + begin, holders.begin() + begin + part.size);
    if (*low < 1 || *low != *high)
      ADD_FAILURE() << fmt::format("{}{}{}: over {}, its elements along dimension {} lie on {} to {} ranks", param.name, part.name.empty() ? "" : ".", part.name, mesh_text(mesh), shard.dim, *low, *high);
    begin += part.size;
  }
}

// The mesh cuts the tensor, and no two ranks share a unit of it.
bool apart(const Param& param, const Mesh& mesh) {
  for (const Shard& shard : param.shards)
    for (const Segment& part : parts_of(param, shard))
      if (part.size / part.unit < degree(mesh, shard.axis)) return false;
  return local_shape(param, mesh, nullptr).has_value();
}

// What one rank holds of a tensor.
at::Tensor local_part(const Param& param, const at::Tensor& whole, const Mesh& mesh, int64_t rank) {
  at::Tensor part = whole;
  for (const Shard& shard : param.shards) {
    const auto ranges = shard_ranges(param, shard, degree(mesh, shard.axis), rank, nullptr);
    std::vector<at::Tensor> list;
    for (const Range& range : *ranges) list.push_back(part.narrow(shard.dim, range.begin, range.end - range.begin));
    part = at::cat(list, shard.dim);
  }
  return part.contiguous();
}

void expect_shards(const ElementType& type, const ConfigPtr& config, const Env& one) {
  const ParamTable alone = type.params(config, one);
  for (const Param& param : alone) {
    for (const Shard& shard : param.shards) ASSERT_TRUE(shard.dim >= 0 && shard.dim < static_cast<int64_t>(param.shape.size())) << param.name << ": no dimension " << shard.dim;
    const int64_t total = std::accumulate(param.segments.begin(), param.segments.end(), int64_t{0}, [](int64_t sum, const Segment& s) { return sum + s.size; });
    if (param.segments.empty()) continue;
    ASSERT_FALSE(param.shards.empty()) << param.name << ": segments say how a cut dimension is packed, but nothing is cut";
    ASSERT_EQ(total, param.shape[static_cast<size_t>(param.shards[0].dim)]) << param.name << ": the sum of its segments";
  }
  for (const Mesh& mesh : meshes()) {
    Env env = one;
    env.mesh = mesh;
    Issues issues;
    type.check(config, env, issues);
    if (!issues.empty()) continue;  // a rule refuses this mesh
    const ParamTable cut = type.params(config, env);
    ASSERT_EQ(cut.size(), alone.size()) << "the table has other rows over " << mesh_text(mesh);
    for (size_t i = 0; i < cut.size(); ++i) {
      EXPECT_EQ(cut[i].name, alone[i].name);
      ASSERT_EQ(cut[i].shape, alone[i].shape) << cut[i].name << ": its shape over " << mesh_text(mesh) << ": shapes are global, the core cuts them";
      expect(bit_equal(initial_values(cut[i], 7), initial_values(alone[i], 1 << 20)), fmt::format("{}: its initial values over {}, in pieces, against one rank's", cut[i].name, mesh_text(mesh)));
      std::string why;
      if (!local_shape(cut[i], mesh, &why)) continue;  // the core refuses this mesh, and says why
      for (const Shard& shard : cut[i].shards) expect_covered(cut[i], shard, mesh);
    }
  }
}

}  // namespace

TEST_P(Conformance, ShardsCoverEveryParameter) {
  const Built built(text());
  expect_shards(type(), built.plan.layers[0].config, built.plan.env);
}

TEST_P(HeadConformance, ShardsCoverEveryParameter) {
  const Built built(text_);
  expect_shards(type(), built.plan.head->config, built.plan.env);
}

// Tensor-parallel ranks that each hold their part: their sum is the whole block, in values and gradients. Left out is what may need an
// exchange between ranks inside the block: experts, and ranks that share a unit.
TEST_P(Conformance, RanksTogetherComputeTheWhole) {
  Built built(text("X"), {.dtype = at::kDouble});
  const LayerPlan& layer = built.plan.layers[0];
  if (has_experts(built.plan) || type().info().input != Layout::kFull || type().info().output == Layout::kSequenceShard) GTEST_SKIP() << "its ranks exchange tokens inside";
  const Spans spans = Spans::documents({1, 33, 20});
  const auto generator = at::detail::createCPUGenerator(7);
  const at::Tensor x_nd = at::randn({54, kHidden}, generator, at::TensorOptions(at::kDouble)), dy_nd = at::randn({54, kHidden}, generator, at::TensorOptions(at::kDouble));
  const Weights stored = built.store.gather(layer.prefix);

  struct Result {
    at::Tensor y_nd;
    std::vector<at::Tensor> gradients;  // of x, then of every parameter, summed over the ranks
  };
  const auto run = [&](const Mesh& mesh) {
    Env env = built.plan.env;
    env.mesh = mesh;
    const auto block = type().make(layer.config, env);
    at::AutoGradMode grad_mode(true);
    std::vector<at::Tensor> leaves{x_nd.clone().requires_grad_()};
    for (const Weight& weight : stored.list()) leaves.push_back(weight.tensor().detach().clone().requires_grad_());
    Result result;
    for (int64_t rank = 0; rank < mesh.tp; ++rank) {
      Weights local;
      for (size_t i = 0; i < stored.list().size(); ++i) local.add(local_part(stored.list()[i].row(), leaves[i + 1], mesh, rank), &stored.list()[i].row());
      for (const Buffer& buffer : layer.buffers) local.add_buffer(buffer.name, built.store.buffer(layer.prefix + buffer.name));
      Context ctx(spans);
      ctx.set_mesh(mesh);
      const at::Tensor y_nd = block->forward(leaves[0], local, ctx);
      if (type().info().output == Layout::kPartialSum) result.y_nd = rank ? result.y_nd + y_nd : y_nd;
      else if (!rank) result.y_nd = y_nd;
    }
    result.gradients = torch::autograd::grad({result.y_nd}, leaves, {dy_nd}, std::nullopt, false, /*allow_unused=*/true);
    return result;
  };

  const Result whole = run({});
  int compared = 0;
  for (const Mesh& mesh : {Mesh{.tp = 2}, Mesh{.tp = 3}, Mesh{.tp = 4}}) {
    Env env = built.plan.env;
    env.mesh = mesh;
    Issues issues;
    type().check(layer.config, env, issues);
    const bool fits = std::all_of(stored.list().begin(), stored.list().end(), [&](const Weight& w) { return apart(w.row(), mesh); });
    if (!issues.empty() || !fits) continue;
    ++compared;
    const Result parts = run(mesh);
    const double limit = tolerance(at::kDouble, Op::kModel);
    expect(close(parts.y_nd.detach(), whole.y_nd.detach(), limit), fmt::format("the outputs of {} ranks added up, against one rank's", mesh.tp));
    for (size_t i = 0; i < whole.gradients.size(); ++i) {
      if (!whole.gradients[i].defined()) continue;
      const std::string name = i ? stored.list()[i - 1].row().name : "x";
      if (!parts.gradients[i].defined()) ADD_FAILURE() << name << " gets no gradient on " << mesh.tp << " ranks";
      else expect(close(parts.gradients[i], whole.gradients[i], limit), fmt::format("{}: its gradient over {} ranks, against one rank's", name, mesh.tp));
    }
  }
  if (!compared) GTEST_SKIP() << "2, 3 and 4 ranks cannot share these sizes";
}

}  // namespace tessera::conformance
