// Every layout computes what one process computes: losses, every gradient, the gradient's norm, and the weights after five steps.
#include <ATen/TensorOperators.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>

#include "data/loader.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/model.hpp"
#include "tests/support/ranks.hpp"
#include "train/step.hpp"

namespace tessera {
namespace {

constexpr const char* kSizes = R"(
hidden_size = 32
vocab_size = 64
[blocks.mamba2]
num_heads = 8
head_dim = 4
state_size = 8
num_groups = 2
chunk = 8
[blocks.gqa]
num_heads = 8
num_kv_heads = 2
head_dim = 4
[blocks.mlp]
intermediate_size = 48
bias = true
[blocks.masked]
width = 16
[blocks.moe]
num_experts = 8
top_k = 2
intermediate_size = 16
shared_intermediate_size = 16
bias = true
aux_loss_coeff = 1e-2
z_loss_coeff = 1e-3
[blocks.latent_moe]
latent_size = 16
num_experts = 8
top_k = 3
intermediate_size = 16
shared_intermediate_size = 8
aux_loss_coeff = 1e-2
[symbols]
D = "masked"
[training]
seq_len = 24
)";

// The tree's blocks, and with the letter D one that drops out and takes whole documents only.
const Registry& blocks() {
  static const Registry loaded = Registry::load(Registry::search_paths({TESSERA_BINARY_DIR "/broken_blocks"}));
  return loaded;
}

struct Layout {
  std::string pattern = "M*EOL/*O";
  Mesh mesh;
  int64_t local = 1;
  std::vector<std::string> sets = {};
  std::vector<std::string> recompute = {};
  StoreOptions options = {};
};

std::string name_of(const Layout& layout) {
  std::string name;
  const Mesh& m = layout.mesh;
  for (const auto& [axis, degree] : {std::pair{"pp", m.pp}, {"rep", m.dp_replicate}, {"shard", m.dp_shard}, {"cp", m.cp}, {"tp", m.tp}, {"ep", m.ep}, {"etp", m.etp}})
    if (degree > 1) name += fmt::format("{}{}{}", name.empty() ? "" : "_", axis, degree);
  if (layout.local > 1) name += fmt::format("_local{}", layout.local);
  if (!layout.recompute.empty()) name += "_recompute";
  if (!layout.options.reshard_after_forward) name += "_keep";
  std::string letters;
  for (const char c : layout.pattern) letters += c == '*' ? "A" : c == '|' ? "_" : c == '/' ? "_with_" : std::string(1, c);
  return name + "_of_" + letters;
}
void PrintTo(const Layout& layout, std::ostream* out) { *out << name_of(layout); }

// Eight rows of 24 tokens: whole documents, many short ones, single tokens.
std::vector<Row> rows(int64_t step) {
  const std::vector<std::vector<int64_t>> packed{{24}, {1, 22, 1}, {9, 15}, {1, 1, 1, 1, 2, 3, 5, 10}, {12, 12}, {23, 1}, {3, 21}, {8, 8, 8}};
  const at::Tensor ids = random_ids(8 * 24, 64, 100 + static_cast<uint64_t>(step));
  std::vector<Row> out;
  for (size_t r = 0; r < packed.size(); ++r) {
    const int64_t* from = ids.const_data_ptr<int64_t>() + r * 24;
    out.push_back({.ids = std::vector<int64_t>(from, from + 24), .lengths = packed[r]});
  }
  return out;
}

struct Recorded {
  std::vector<StepResult> steps;
  std::map<std::string, at::Tensor> gradients, weights, buffers;
};

constexpr int64_t kSteps = 5;

Recorded record(const Layout& layout, const MeshGroups* groups) {
  const Mesh mesh = groups ? groups->mesh() : Mesh{};
  const std::string toml = fmt::format("[model]\nhybrid_override_pattern = \"{}\"{}", layout.pattern, kSizes);
  const Config config = parse_config(toml, "test.toml", layout.sets, blocks());
  Issues issues;
  check_config(config, mesh, issues);
  issues.raise();
  const ModelPlan plan = make_plan(config, mesh);
  Store store(plan, at::kCPU, at::kFloat, {}, groups, layout.options);
  store.initialise(3);
  Model model(plan, store, layout.recompute);
  Optimizer optimizer(store, {.lr = 3e-3});
  Recorded recorded;
  for (int64_t step = 0; step <= kSteps; ++step) {
    const std::vector<Row> all = rows(step);
    const Range mine = rows_of(8, data_rank(groups), mesh.dp_replicate * mesh.dp_shard);
    const std::vector<Batch> batches = micro_batches(std::span(all).subspan(mine.begin, mine.end - mine.begin), layout.local, (8 * step + mine.begin) * 24);
    if (step == 0) {
      recorded.steps.push_back(accumulate(model, batches));
      for (const TensorRow& row : tensor_rows(plan))
        if (row.param) recorded.gradients[row.name] = store.whole(row.name, gradients);
      store.zero_grad();
    } else {
      recorded.steps.push_back(train_step(model, optimizer, batches, 3e-3, 1.0));
    }
  }
  for (const TensorRow& row : tensor_rows(plan)) {
    if (row.param) recorded.weights[row.name] = store.whole(row.name);
    else if (store.has(row.name)) recorded.buffers[row.name] = store.buffer(row.name).clone();
  }
  return recorded;
}

// Sharding without its measured differences would be a claim: they are collected, and written where TESSERA_LAYOUT_TABLE names a file.
struct Measured {
  Layout layout;
  double loss = 0, gradient = 0, norm = 0, weights = 0;
  std::string worst;  // gradient
};
std::vector<Measured>& measured() {
  static std::vector<Measured> list;
  return list;
}

std::string pattern_text(const std::string& pattern) {
  std::string out;
  for (const char c : pattern) out += c == '|' ? "\\|" : std::string(1, c);
  return out;
}

class Table : public testing::Environment {
 public:
  void TearDown() override {
    const char* path = std::getenv("TESSERA_LAYOUT_TABLE");
    if (!path || measured().empty()) return;
    std::ofstream out(path);
    out << "# Every layout against one process\n"
           "Made by `TESSERA_LAYOUT_TABLE=docs/layouts.md ./tessera test Layouts --all`: five steps of AdamW over the same eight rows of 24 tokens a step, packed from documents of 1 to 24 tokens, in\n"
           "fp32, ranks that share memory and talk over Gloo. Largest differences to one process, relative to the largest value: of the loss in any step, of any parameter's gradient in the first, of the gradient norm in any, of any weight after five.\n"
           "Adam divides by the gradient's size, so weights whose gradient is near zero differ by more than gradients do.\n\n"
           "| layout | pattern | rows a micro-batch | with | ranks | loss | gradients | gradient norm | weights |\n|---|---|---|---|---|---|---|---|---|\n";
    for (const Measured& m : measured()) {
      std::vector<std::string> with = m.layout.sets;
      if (!m.layout.recompute.empty()) with.push_back("recomputation");
      if (!m.layout.options.reshard_after_forward) with.push_back("reshard_after_forward = false");
      out << fmt::format("| {} | `{}` | {} | {} | {} | {:.1e} | {:.1e} | {:.1e} | {:.1e} |\n", mesh_text(m.layout.mesh), pattern_text(m.layout.pattern), m.layout.local, fmt::join(with, ", "),
                         m.layout.mesh.size(), m.loss, m.gradient, m.norm, m.weights);
    }
  }
};
const testing::Environment* const kTable = testing::AddGlobalTestEnvironment(new Table);

double difference(const at::Tensor& got, const at::Tensor& want) {
  const double scale = want.abs().max().item<double>();
  return (got - want).abs().max().item<double>() / std::max(scale, 1e-6);
}

class Layouts : public testing::TestWithParam<Layout> {};

double difference(double got, double want) { return std::abs(got - want) / std::max(std::abs(want), 1e-6); }

void compare(const Layout& layout) {
  static std::map<std::string, Recorded> known;
  const std::string key = fmt::format("{} {}", layout.pattern, fmt::join(layout.sets, " "));
  at::set_num_threads(1);
  if (!known.contains(key)) known[key] = record({.pattern = layout.pattern, .local = 2, .sets = layout.sets}, nullptr);
  const Recorded& one = known[key];
  std::mutex mutex;
  Measured m{.layout = layout};
  const auto note = [](double& most, double value) { most = std::max(most, value); };
  run_ranks(layout.mesh, [&](MeshGroups& groups) {
    const Recorded many = record(layout, &groups);
    const std::lock_guard lock(mutex);
    for (size_t s = 0; s < one.steps.size(); ++s) {
      const StepResult &got = many.steps[s], &want = one.steps[s];
      note(m.loss, difference(got.loss, want.loss)), note(m.loss, difference(got.total_loss, want.total_loss));
      note(m.norm, difference(got.grad_norm, want.grad_norm));
      ASSERT_EQ(got.parts.size(), want.parts.size());
      for (const auto& [name, part] : want.parts) note(m.loss, difference(got.parts.at(name), part));
    }
    for (const auto& [name, gradient] : one.gradients) {
      const double d = difference(many.gradients.at(name), gradient);
      if (d > m.gradient) m.worst = name;
      note(m.gradient, d);
    }
    for (const auto& [name, weight] : one.weights) note(m.weights, difference(many.weights.at(name), weight));
    for (const auto& [name, buffer] : many.buffers) EXPECT_TRUE(bit_equal(buffer, one.buffers.at(name))) << name;
  });
  EXPECT_LT(m.loss, 1e-5);
  EXPECT_LT(m.norm, 2e-5);
  EXPECT_LT(m.gradient, 2e-5) << m.worst;
  EXPECT_LT(m.weights, 1e-3);
  EXPECT_GT(m.gradient, 0) << "not a bit differs: did the layout do anything?";
  measured().push_back(m);
}

TEST_P(Layouts, ComputeWhatOneProcessComputes) { compare(GetParam()); }

class AllLayouts : public testing::TestWithParam<Layout> {};
TEST_P(AllLayouts, ComputeWhatOneProcessComputes) {
  if (!std::getenv("TESSERA_TEST_ALL")) GTEST_SKIP() << "long: runs with --all";
  compare(GetParam());
}

const auto kName = [](const auto& info) { return name_of(info.param); };

INSTANTIATE_TEST_SUITE_P(Few, Layouts, testing::Values(Layout{.mesh = {.dp_shard = 2}}, Layout{.mesh = {.dp_replicate = 2}}, Layout{.mesh = {.tp = 2}}, Layout{.mesh = {.cp = 2}},
                                                       Layout{.mesh = {.pp = 2}}, Layout{.mesh = {.dp_shard = 2, .ep = 2}}, Layout{.mesh = {.tp = 4}},
                                                       Layout{.pattern = "M|*E|O|L/*O", .mesh = {.pp = 2}}, Layout{.pattern = "MDE/D", .mesh = {.dp_shard = 2, .cp = 2, .tp = 2}},
                                                       Layout{.mesh = {.dp_shard = 2}, .recompute = {"*"}},
                                                       Layout{.mesh = {.dp_shard = 2}, .local = 4, .options = {.reshard_after_forward = false}},
                                                       Layout{.mesh = {.pp = 2, .dp_shard = 2, .cp = 2, .tp = 2, .ep = 2, .etp = 2}}),
                         kName);

// Each axis alone at 2 and 4, every pair, and what is special.
std::vector<Layout> every() {
  std::vector<Layout> list;
  const std::vector<std::pair<Mesh, Mesh>> axes{{{.pp = 2}, {.pp = 4}}, {{.dp_replicate = 2}, {.dp_replicate = 4}}, {{.dp_shard = 2}, {.dp_shard = 4}}, {{.cp = 2}, {.cp = 4}},
                                                {{.tp = 2}, {.tp = 4}}, {{.dp_shard = 2, .ep = 2}, {.dp_shard = 4, .ep = 4}}, {{.dp_shard = 2, .etp = 2}, {.tp = 4, .etp = 4}}};
  const auto product = [](const Mesh& a, const Mesh& b) {
    return Mesh{.pp = a.pp * b.pp, .dp_replicate = a.dp_replicate * b.dp_replicate, .dp_shard = a.dp_shard * b.dp_shard, .cp = a.cp * b.cp, .tp = a.tp * b.tp, .ep = a.ep * b.ep, .etp = a.etp * b.etp};
  };
  for (const auto& [two, four] : axes) list.push_back({.mesh = two}), list.push_back({.mesh = four});
  for (size_t i = 0; i < axes.size(); ++i)
    for (size_t j = i + 1; j < axes.size(); ++j) list.push_back({.mesh = product(axes[i].first, axes[j].first)});
  list.push_back({.mesh = {.cp = 3}});
  list.push_back({.mesh = {.cp = 2, .tp = 2, .ep = 4}});                      // experts over what shares a row
  list.push_back({.mesh = {.tp = 4, .ep = 2, .etp = 2}});
  list.push_back({.mesh = {.pp = 2, .cp = 2, .tp = 2, .ep = 2}});
  list.push_back({.mesh = {.pp = 2, .dp_shard = 2, .cp = 2, .tp = 2, .ep = 2, .etp = 2}});
  list.push_back({.mesh = {.pp = 2, .dp_replicate = 2, .dp_shard = 2, .tp = 2, .ep = 2}});
  for (const Mesh& mesh : {Mesh{.pp = 2}, Mesh{.pp = 4}, Mesh{.pp = 2, .tp = 2}}) list.push_back({.pattern = "M|*E|O|L/*O", .mesh = mesh});  // interleaved at pp 2
  list.push_back({.pattern = "MM|*E|O|L|M|*|E|O/*O", .mesh = {.pp = 2}});     // four stages a rank
  list.push_back({.mesh = {.pp = 4, .dp_shard = 2}, .local = 2});             // fewer micro-batches than stages
  for (const Mesh& mesh : {Mesh{.pp = 2}, Mesh{.dp_shard = 2}, Mesh{.tp = 2}, Mesh{.cp = 2}, Mesh{.pp = 2, .dp_shard = 2, .tp = 2}}) {
    list.push_back({.mesh = mesh, .sets = {"model.tie_embeddings=true"}});
    list.push_back({.mesh = mesh, .local = 4 / mesh.dp_shard, .recompute = {"*"}});
    list.push_back({.mesh = mesh, .local = 2, .sets = {"model.residual_in_fp32=true"}, .recompute = {"moe", "mamba2"}});
  }
  list.push_back({.mesh = {.dp_shard = 2, .tp = 2}, .options = {.reshard_after_forward = false}});
  // Dropout, in a block that takes whole documents.
  for (const Mesh& mesh : {Mesh{.dp_shard = 2}, Mesh{.tp = 4}, Mesh{.cp = 2}, Mesh{.pp = 2, .cp = 2}, Mesh{.dp_shard = 2, .ep = 2}}) list.push_back({.pattern = "DMDL/*D", .mesh = mesh});
  list.push_back({.pattern = "DMDL/*D", .mesh = {.tp = 2}, .local = 4, .recompute = {"*"}});
  // Experts that starve: two of eight get nothing, whatever the tokens are.
  for (const Mesh& mesh : {Mesh{.dp_shard = 2, .ep = 2}, Mesh{.dp_shard = 4, .ep = 4}, Mesh{.cp = 2, .tp = 2, .ep = 4}})
    list.push_back({.mesh = mesh, .sets = {"blocks.moe.num_groups=4", "blocks.moe.topk_group=1", "blocks.moe.bias_update_rate=0"}});
  return list;
}
INSTANTIATE_TEST_SUITE_P(Every, AllLayouts, testing::ValuesIn(every()), [](const auto& info) { return fmt::format("{}_{}", info.index, name_of(info.param)); });

}  // namespace
}  // namespace tessera
