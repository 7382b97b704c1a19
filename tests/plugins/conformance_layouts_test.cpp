// Conformance: a model of the block over several ranks computes what one process computes: loss, gradients and counts, whatever the block declares.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <fmt/format.h>

#include <mutex>
#include <utility>

#include "tests/support/conformance.hpp"
#include "tests/support/ranks.hpp"
#include "train/step.hpp"

namespace tessera::conformance {

namespace {

struct Outcome {
  StepResult step;
  std::map<std::string, at::Tensor> gradients;
};

// Two rows a data rank; documents of all lengths, single tokens too.
Outcome outcome(const Config& config, const MeshGroups* groups, uint64_t generator = 5) {
  const Mesh mesh = groups ? groups->mesh() : Mesh{};
  const ModelPlan plan = make_plan(config, mesh);
  Store store(plan, at::kCPU, at::kDouble, {}, groups);
  store.initialise(3);
  Model model(plan, store);
  std::vector<Batch> batches;
  const std::vector<std::vector<int64_t>> documents{{1, 1, 17, 20}, {30, 1, 9}};
  for (int64_t b = 0, first_token = 0; b < 2; ++b) {
    Batch batch = random_batch(documents[static_cast<size_t>(b)], kVocab, 1 + static_cast<uint64_t>(b));
    batch.first_token = std::exchange(first_token, first_token + batch.ids_n.numel());
    if (mesh.dp_shard == 1 || data_rank(groups) == b) batches.push_back(batch);
  }
  at::manual_seed(generator);
  Outcome out{.step = accumulate(model, batches)};
  for (const TensorRow& row : tensor_rows(plan))
    if (row.param) out.gradients[row.name] = store.whole(row.name, gradients);
  return out;
}

void expect_layouts(const std::string& text) {
  const Config config = parse_config(text, "test.toml", {}, plugins());
  at::set_num_threads(1);
  const Outcome one = outcome(config, nullptr);
  EXPECT_EQ(outcome(config, nullptr, 6).step.total_loss, one.step.total_loss) << "it draws from libtorch's generator, which every layout asks in another order: use layers/random.hpp";
  const double limit = tolerance(at::kFloat, Op::kModel, kHidden);  // gradients are kept in fp32
  int compared = 0;
  for (const Mesh& mesh : {Mesh{.dp_shard = 2}, Mesh{.cp = 2}, Mesh{.tp = 2}, Mesh{.pp = 2}, Mesh{.dp_shard = 2, .ep = 2}}) {
    Issues issues;
    check_config(config, mesh, issues);
    if (!issues.empty()) continue;  // a rule refuses this mesh
    ++compared;
    std::mutex mutex;
    run_ranks(mesh, [&](MeshGroups& groups) {
      const Outcome many = outcome(config, &groups);
      if (groups.place().rank != 0) return;
      const std::lock_guard lock(mutex);
      const std::string over = mesh_text(mesh);
      EXPECT_NEAR(many.step.total_loss, one.step.total_loss, limit * std::abs(one.step.total_loss)) << "the loss over " << over << ": what several ranks compute alike may count once";
      for (const auto& [name, gradient] : one.gradients) expect(close(many.gradients.at(name), gradient, limit), fmt::format("{}: its gradient over {}, against one process", name, over));
      for (const auto& [prefix, by_name] : many.step.counts)
        for (const auto& [name, count] : by_name)
          expect(close(count.to(at::kDouble), one.step.counts.at(prefix).at(name).to(at::kDouble), limit), fmt::format("{}{}: counts over {}, against one process", prefix, name, over));
    });
  }
  EXPECT_GE(compared, 3) << "data, context and pipeline ranks need nothing of a block, yet a rule refuses them";
}

}  // namespace

TEST_P(Conformance, RanksComputeWhatOneProcessComputes) { expect_layouts(text()); }
TEST_P(HeadConformance, RanksComputeWhatOneProcessComputes) { expect_layouts(text_); }

}  // namespace tessera::conformance
