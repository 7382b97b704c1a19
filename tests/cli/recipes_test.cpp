// Small copies of published models, trained by processes on the layouts that such models are trained on, against one process.
#include <ATen/TensorOperators.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint.hpp"
#include "parallel/mesh_groups.hpp"
#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int64_t kSteps = 10;
// Under some seeds two experts tie for a token within these steps, closer than rounding, and layouts choose differently: of seeds 0 to 3, the
// first two hold such a tie, the others none. After a tie nothing is left to compare closely.
constexpr int64_t kSeed = 2;

struct Recipe {
  std::string model, layout;
  Mesh mesh;
  int64_t local = 1;  // rows a micro-batch
};
void PrintTo(const Recipe& recipe, std::ostream* out) { *out << recipe.model << ", " << recipe.layout; }

std::string name_of(const Recipe& recipe) {
  std::string name = recipe.model + "_" + recipe.layout;
  for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return name;
}

// Every recipe is tensor parallel with sequence parallelism: there is no other form here.
const Recipe kQuickest{"nano_4b", "PP2, data 2", {.pp = 2, .dp_shard = 2}};
const std::vector<Recipe> kRecipes{{"nano_4b", "TP2 PP2", {.pp = 2, .tp = 2}},
                                   {"nano_4b", "TP2, data 2", {.dp_shard = 2, .tp = 2}},
                                   {"nano_4b", "TP4", {.tp = 4}},
                                   {"nano_4b", "CP2, data 2", {.dp_shard = 2, .cp = 2}},
                                   {"nano_30b", "TP2 PP2 EP2", {.pp = 2, .tp = 2, .ep = 2}},
                                   {"nano_30b", "EP4", {.dp_shard = 4, .ep = 4}},
                                   {"nano_30b", "TP2 EP4", {.dp_shard = 2, .tp = 2, .ep = 4}},
                                   {"nano_30b", "PP2 EP4", {.pp = 2, .dp_shard = 4, .ep = 4}},
                                   {"nano_30b", "CP2 EP4", {.dp_shard = 2, .cp = 2, .ep = 4}}};
// One process that adds the same rows up in another order: what rounding alone makes of ten steps.
const std::vector<Recipe> kOrders{{"nano_4b", "one process, two rows a micro-batch", {}, 2}, {"nano_30b", "one process, two rows a micro-batch", {}, 2}};

std::string config_of(const Recipe& recipe) { return fmt::format("{}/configs/models/{}_small.toml", TESSERA_SOURCE_DIR, recipe.model); }

class Runs : public testing::Environment {
 public:
  void TearDown() override {
    std::error_code ignored;
    if (!folder_.empty()) fs::remove_all(folder_, ignored);
    write_table();
  }

  // Trains, and returns the run's folder.
  fs::path train(const Recipe& recipe, const std::string& run) {
    if (std::string pattern = (fs::temp_directory_path() / "tessera-XXXXXX").string(); folder_.empty() && mkdtemp(pattern.data())) folder_ = pattern;
    const Mesh& m = recipe.mesh;
    std::vector<std::string> words = m.size() > 1 ? std::vector<std::string>{"launch", "-n", std::to_string(m.size())} : std::vector<std::string>{};
    words.insert(words.end(), {"train", config_of(recipe), "--quiet"});
    std::vector<std::string> sets{fmt::format("training.steps={}", kSteps), fmt::format("run.folder={}", run), "training.num_threads=1", "training.device=cpu", "metrics.detail_interval=1",
                                  "metrics.tensorboard=false", fmt::format("training.seed={}", kSeed),
                                  fmt::format("checkpoint.interval={}", kSteps / 2), fmt::format("training.local_batch_size={}", recipe.local)};
    for (const auto& [key, degree] : {std::pair{"pipeline", m.pp}, {"data_parallel_shard", m.dp_shard}, {"context", m.cp}, {"tensor", m.tp}, {"expert", m.ep}})
      sets.push_back(fmt::format("parallelism.{}{}_degree={}", key, std::string(key).ends_with("shard") ? "" : "_parallel", degree));
    for (const std::string& set : sets) words.insert(words.end(), {"--set", set});
    const Finished end = run_tessera(folder_, words, [] { alarm(1800); });  // against a hang
    EXPECT_EQ(end.code, 0) << fmt::format("tessera {}\n{}", fmt::join(words, " "), end.err);
    return folder_ / run;
  }
  // One process's run of a model, made once.
  const fs::path& reference(const std::string& model) {
    auto [found, added] = references_.try_emplace(model);
    if (added) found->second = train({model, "", {}}, "one_" + model);
    return found->second;
  }

  struct Measured {
    Recipe recipe;
    double loss = 0, norm = 0, weights = 0, moments = 0;
    int64_t moved = 0, first_moved = 0;  // choices of an expert that are other ones, and in which step first
  };
  std::vector<Measured> measured;

 private:
  // Where TESSERA_RECIPE_TABLE names a file.
  void write_table() const {
    const char* path = std::getenv("TESSERA_RECIPE_TABLE");
    if (!path || measured.empty()) return;
    std::ofstream out(path);
    out << fmt::format(
        "# Recipes of published models against one process\n"
        "Made by `TESSERA_RECIPE_TABLE=docs/recipes.md ./tessera test Recipes --all`: `tessera launch` trains `configs/models/nano_4b_small.toml` and `nano_30b_small.toml`, reduced copies of Nemotron 3 Nano, for\n"
        "{} steps of AdamW in fp32 on layouts that models of their kind are trained on, and one process trains them on the same batches. Largest differences, relative to the largest value: of the loss and of the\n"
        "gradient norm in any step, of any weight and of any optimizer moment after the last. Data parallel ranks share parameters and state; tensor parallel ones cut the tokens between layers too, so a recipe\n"
        "with sequence parallelism is the same layout as the one without: TP2 PP2 EP2 stands for both. `training.seed = {}`: under some seeds, such as 0 and 1, two experts tie for a token closer than rounding.\n\n"
        "What rounding alone makes of {} steps is in the rows of one process that adds the same rows in another order. Where experts tie, rounding chooses: how many choices of a step are\n"
        "other ones is told, and the first step with any. Up to there such a run agrees as the others do; from there on it has another token in an expert's gradient.\n\n"
        "| model | layout | mesh | processes | steps | loss | gradient norm | weights | moments | choices that differ |\n|---|---|---|---|---|---|---|---|---|---|\n", kSteps, kSeed, kSteps);
    for (const Measured& m : measured)
      out << fmt::format("| {} | {} | {} | {} | {} | {:.1e} | {:.1e} | {:.1e} | {:.1e} | {} |\n", m.recipe.model, m.recipe.layout, mesh_text(m.recipe.mesh), m.recipe.mesh.size(), kSteps, m.loss, m.norm,
                         m.weights, m.moments, m.recipe.model == "nano_4b" ? "" : m.moved ? fmt::format("{} in step {}", m.moved, m.first_moved) : "none");
  }

  fs::path folder_;
  std::map<std::string, fs::path> references_;
};
Runs& runs() {
  static Runs* const environment = new Runs;
  return *environment;
}
const testing::Environment* const kRuns = testing::AddGlobalTestEnvironment(&runs());

double difference(double got, double want) { return std::abs(got - want) / std::abs(want); }

// Of any of the tensors, relative to its largest value.
double difference(const SafetensorsFolder& got, const SafetensorsFolder& want, const std::vector<std::string>& names) {
  EXPECT_EQ(got.names(), want.names());
  double most = 0;
  for (const std::string& name : names) {
    const at::Tensor a = got.tensor(name), b = want.tensor(name);
    EXPECT_EQ(a.sizes(), b.sizes()) << name;
    const double scale = b.abs().max().item<double>(), far = (a - b).abs().max().item<double>();
    EXPECT_TRUE(std::isfinite(far)) << name;
    most = std::max(most, scale > 0 ? far / scale : far);
  }
  return most;
}

// Choices that went to another expert in a step: those that one has less of than it should.
int64_t moved(const json& got, const json& want) {
  double count = 0;
  for (const auto& [key, loads] : want.items()) {
    if (!key.ends_with(".expert_load")) continue;
    EXPECT_TRUE(got.contains(key)) << key;
    if (!got.contains(key)) continue;
    for (size_t e = 0; e < loads.size(); ++e) count += std::max(0.0, loads[e].get<double>() - got[key][e].get<double>());
  }
  return static_cast<int64_t>(count);
}

void compare(const Recipe& recipe) {
  const fs::path one = runs().reference(recipe.model), many = runs().train(recipe, name_of(recipe));
  if (testing::Test::HasFailure()) return;
  Runs::Measured m{.recipe = recipe};
  const auto got = metrics_of(many), want = metrics_of(one);
  ASSERT_EQ(static_cast<int64_t>(want.size()), kSteps);
  ASSERT_EQ(static_cast<int64_t>(got.size()), kSteps);
  for (size_t s = 0; s < want.size(); ++s) {
    EXPECT_EQ(got[s]["tokens"], want[s]["tokens"]);
    EXPECT_EQ(got[s]["lr"], want[s]["lr"]);
    const double loss = difference(got[s]["loss"].get<double>(), want[s]["loss"].get<double>()), norm = difference(got[s]["grad_norm"].get<double>(), want[s]["grad_norm"].get<double>());
    m.loss = std::max(m.loss, loss), m.norm = std::max(m.norm, norm);
    if (!m.moved) {
      m.moved = moved(got[s], want[s]);
      if (m.moved) m.first_moved = static_cast<int64_t>(s) + 1;
    }
    if (m.moved) continue;
    EXPECT_LT(loss, 1e-6) << "step " << s + 1;
    EXPECT_LT(norm, 2e-6) << "step " << s + 1;
  }
  // A tie that is broken the other way gives two experts another row, some percent of their gradients, and the token's later layers another input.
  EXPECT_LE(m.moved, 20) << "more than a tie can explain";
  EXPECT_LT(m.loss, m.moved ? 1e-4 : 1e-6);
  EXPECT_LT(m.norm, m.moved ? 1e-2 : 2e-6);
  for (const int64_t step : {kSteps / 2, kSteps}) {
    const bool tied = m.moved && step >= m.first_moved;
    const OpenCheckpoint a = open_checkpoint(many / fmt::format("checkpoints/step-{}", step)), b = open_checkpoint(one / fmt::format("checkpoints/step-{}", step));
    std::vector<std::string> parameters, buffers;
    for (const std::string& name : b.model.names()) (b.optimizer->find("optimizer.exp_avg." + name) ? parameters : buffers).push_back(name);
    m.weights = difference(a.model, b.model, parameters);
    m.moments = difference(*a.optimizer, *b.optimizer, b.optimizer->names());
    EXPECT_LT(m.weights, tied ? 1e-1 : 2e-4) << "step " << step;
    // The balance loss counts choices without the router's bias: ties in those are not seen, and weigh 1e-4.
    EXPECT_LT(m.moments, tied ? 5e-1 : recipe.model == "nano_30b" ? 5e-4 : 2e-5) << "step " << step;
    EXPECT_GT(m.weights, 0) << "not a bit differs: did the layout do anything?";
    const double counted = difference(a.model, b.model, buffers);
    EXPECT_TRUE(tied || counted == 0) << "router biases, which go by the sign of a count, differ in step " << step;
  }
  fs::remove_all(many);
  runs().measured.push_back(m);
  fmt::print("{}, {}: loss {:.1e}, gradient norm {:.1e}, weights {:.1e}, moments {:.1e}, {} choices differ\n", recipe.model, recipe.layout, m.loss, m.norm, m.weights, m.moments, m.moved);
}

class RecipesPlan : public FolderTest {};
TEST_F(RecipesPlan, AdmitsEach) {
  std::vector<Recipe> all = kRecipes;
  all.push_back(kQuickest);
  for (const Recipe& recipe : all) {
    const Mesh& m = recipe.mesh;
    const Finished end = run_tessera(folder_, {"plan", config_of(recipe), "--mesh", fmt::format("pp={},dp_shard={},cp={},tp={},ep={}", m.pp, m.dp_shard, m.cp, m.tp, m.ep)});
    EXPECT_EQ(end.code, 0) << recipe.model << ", " << recipe.layout << "\n" << end.err;
  }
}

class QuickestRecipe : public testing::TestWithParam<Recipe> {};
TEST_P(QuickestRecipe, TrainsAsOneProcess) { compare(GetParam()); }

class AllRecipes : public testing::TestWithParam<Recipe> {};
TEST_P(AllRecipes, TrainAsOneProcess) {
  if (!std::getenv("TESSERA_TEST_ALL")) GTEST_SKIP() << "long: runs with --all";
  compare(GetParam());
}

const auto kName = [](const auto& info) { return name_of(info.param); };
INSTANTIATE_TEST_SUITE_P(Recipes, QuickestRecipe, testing::Values(kQuickest), kName);
INSTANTIATE_TEST_SUITE_P(Every, AllRecipes, testing::ValuesIn(kRecipes), kName);
INSTANTIATE_TEST_SUITE_P(Orders, AllRecipes, testing::ValuesIn(kOrders), kName);

}  // namespace
}  // namespace tessera
