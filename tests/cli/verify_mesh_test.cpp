// The golden checkpoints over four processes: every layout gives the recorded values, and does what its axes say.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

const fs::path kGolden = fs::path(TESSERA_SOURCE_DIR) / "tests/golden";

struct Layout {
  std::string golden, mesh;
  std::vector<std::string> sets = {};
};

std::string name_of(const Layout& layout) {
  std::string name = layout.golden + "_";
  for (const char c : layout.mesh) name += c == '=' ? "" : c == ',' ? "_" : std::string(1, c);
  for (const std::string& set : layout.sets)
    for (const char c : "_" + set) name += c == '.' || c == '=' ? '_' : c;
  return name;
}
void PrintTo(const Layout& layout, std::ostream* out) { *out << name_of(layout); }

nlohmann::json verified(const Finished& end) {
  auto report = nlohmann::json::parse(end.out, nullptr, /*allow_exceptions=*/false);
  EXPECT_FALSE(report.is_discarded()) << end.out << end.err;
  return report.is_discarded() ? nlohmann::json::object() : report;
}

std::vector<std::string> words(const Layout& layout, const std::string& reference = "") {
  const std::string folder = (kGolden / layout.golden).string();
  std::vector<std::string> list{"launch", "-n", "4", "verify", folder, "--reference", reference.empty() ? folder + "/reference.safetensors" : reference, "--json"};
  if (!layout.mesh.empty()) list.insert(list.end(), {"--mesh", layout.mesh});
  for (const std::string& set : layout.sets) list.insert(list.end(), {"--set", set});
  return list;
}

class VerifyMesh : public FolderTest, public testing::WithParamInterface<Layout> {
 protected:
  void expect_recorded_values(const Layout& layout) const {
    const std::string folder = (kGolden / layout.golden).string();
    const Finished end = run_tessera(folder_, words(layout));
    EXPECT_EQ(end.code, 0) << end.err << end.out;
    EXPECT_EQ(end.err, "");
    const auto report = verified(end);
    ASSERT_TRUE(report.contains("tensors")) << end.err;
    EXPECT_TRUE(report["ok"].get<bool>()) << report.dump(1);
    const auto alone = verified(run_tessera(folder_, {"verify", folder, "--reference", folder + "/reference.safetensors", "--json"}));
    EXPECT_EQ(report["compared"], alone["compared"]);
    EXPECT_GT(report["compared"].get<int64_t>(), 10);

    // What each axis must have done.
    std::map<std::string, int64_t> degrees;
    for (size_t at = 0; at < layout.mesh.size();) {
      const size_t equals = layout.mesh.find('=', at), comma = std::min(layout.mesh.find(',', at), layout.mesh.size());
      degrees[layout.mesh.substr(at, equals - at)] = std::stoll(layout.mesh.substr(equals + 1, comma - equals - 1));
      at = comma + 1;
    }
    const auto degree = [&](const std::string& axis) { return degrees.contains(axis) ? degrees[axis] : 1; };
    ASSERT_EQ(report["ranks"].size(), 4u);
    const auto whole = alone["ranks"][0]["parameter_bytes"].get<double>();
    double most = 0, sum = 0;
    for (const auto& rank : report["ranks"]) {
      const auto bytes = rank["parameter_bytes"].get<double>();
      most = std::max(most, bytes), sum += bytes;
      for (const auto& [axis, sent] : rank["sent_bytes"].items()) {
        const bool works = degree(axis) > 1 || (axis == "ep" && degree("etp") > 1);
        EXPECT_EQ(sent.get<int64_t>() > 0, works) << axis << " in " << report["ranks"].dump();
      }
    }
    // Each replica holds everything at least once, and no rank holds all.
    EXPECT_GE(sum, whole * static_cast<double>(degree("dp_replicate")));
    EXPECT_LT(most, 0.85 * whole);
  }
};

TEST_P(VerifyMesh, GivesTheRecordedValues) { expect_recorded_values(GetParam()); }

class VerifyEveryMesh : public VerifyMesh {};
TEST_P(VerifyEveryMesh, GivesTheRecordedValues) {
  if (!std::getenv("TESSERA_TEST_ALL")) GTEST_SKIP() << "long: runs with --all";
  expect_recorded_values(GetParam());
}

const auto kName = [](const auto& info) { return name_of(info.param); };

INSTANTIATE_TEST_SUITE_P(Few, VerifyMesh, testing::Values(Layout{"dense", "dp_shard=2,tp=2"}, Layout{"moe", "dp_shard=4,ep=4"}, Layout{"mtp", "pp=2,tp=2"}, Layout{"packed", "cp=2,tp=2"}), kName);

std::vector<Layout> every() {
  std::vector<Layout> list;
  for (const char* golden : {"dense", "packed", "moe", "latent", "mtp", "groups"}) {
    for (const char* mesh : {"dp_shard=2,tp=2", "cp=2,tp=2", "cp=4", "pp=2,tp=2", "dp_replicate=2,dp_shard=2", "tp=4", "pp=2,cp=2"})
      list.push_back({golden, mesh});
    list.push_back({golden, "pp=2,dp_replicate=2", {"training.local_batch_size=1"}});
    list.push_back({golden, "dp_shard=2,tp=2", {"activation_checkpoint.mode=full"}});
    if (std::string(golden) == "dense") continue;
    for (const char* mesh : {"dp_shard=4,ep=4", "dp_shard=2,tp=2,ep=2,etp=2", "cp=2,tp=2,ep=4", "pp=2,tp=2,ep=2"}) list.push_back({golden, mesh});
  }
  return list;
}
INSTANTIATE_TEST_SUITE_P(All, VerifyEveryMesh, testing::ValuesIn(every()), kName);

class VerifyMeshUse : public FolderTest {};

// Another file than the checkpoint's own: the first layer that differs is named, by the first rank alone, and the code is a comparison's.
TEST_F(VerifyMeshUse, ADifferenceIsFound) {
  const Finished end = run_tessera(folder_, words({"moe", "dp_shard=2,tp=2"}, (kGolden / "dense/reference.safetensors").string()));
  EXPECT_EQ(end.code, 1) << end.err;
  EXPECT_EQ(end.err, "");
  const auto report = verified(end);
  EXPECT_FALSE(report["ok"].get<bool>());
  EXPECT_EQ(report["first_difference"], "embedding");
}

TEST_F(VerifyMeshUse, WrongUse) {
  for (const auto& [mesh, message] : std::vector<std::pair<std::string, std::string>>{
           {"tp=2", "error: --mesh: tp=2 is for 2 ranks, there are 4\nhelp: start that many with `tessera launch -n 2`, or for example --mesh dp_shard=4\n"},
           {"tp=1048576,cp=1048576,dp_shard=1048576,pp=1048576", "error: --mesh: tp=1048576,cp=1048576,dp_shard=1048576,pp=1048576 is for 1208925819614629174706176 ranks, there are 4\n"},
           {"", "error: --mesh: is missing: it says how the 4 ranks divide the work\nhelp: for example --mesh dp_shard=4\n"},
           {"tp", "error: --mesh: \"tp\" must be AXIS=DEGREE\n"},
           {"tp=4,ep=3", "error: --mesh: ep x etp = 3 must divide dp_shard x cp x tp = 4\n"}}) {
    const Finished end = run_tessera(folder_, words({"dense", mesh}));
    EXPECT_EQ(end.code, 2) << end.err;
    EXPECT_EQ(end.out, "");
    EXPECT_EQ(end.err.substr(0, message.size()), message);
  }
  // A mesh that the model does not admit: 8 heads of mamba2 and 4 of gqa.
  auto eight = words({"dense", "tp=8"});
  eight[2] = "8";
  const Finished end = run_tessera(folder_, eight);
  EXPECT_EQ(end.code, 2) << end.err;
  EXPECT_NE(end.err.find("num_heads"), std::string::npos) << end.err;
}

class MeshGeneration : public TinyRunTest {};

TEST_F(MeshGeneration, GreedyTokensAndHeldOutLossAreThoseOfOneProcess) {
  ASSERT_EQ(train("run", {"training.steps=2"}).code, 0);
  const std::vector<std::string> generate{"generate", "run", "--prompt-ids", "51,32,116,105,109", "--max-new-tokens", "20"};
  const std::vector<std::string> drawn{"generate", "run", "--prompt", "7 times", "--max-new-tokens", "20", "--temperature", "0.9", "--seed", "5"};
  const Finished tokens = tessera(generate), text = tessera(drawn);
  ASSERT_EQ(tokens.code, 0) << tokens.err;
  const auto loss = [](const Finished& end) { return nlohmann::json::parse(end.out, nullptr, false).value("loss", -1.0); };
  const double held_out = loss(tessera({"eval", "run", "--json"}));
  EXPECT_GT(held_out, 0);
  const auto over = [&](const char* mesh, const std::vector<std::string>& verb) {
    std::vector<std::string> launched{"launch", "-n", "2"};
    launched.insert(launched.end(), verb.begin(), verb.end());
    launched.insert(launched.end(), {"--mesh", mesh});
    return tessera(launched);
  };
  for (const char* mesh : {"tp=2", "pp=2", "dp_shard=2,ep=2"}) {
    const Finished end = over(mesh, generate);
    EXPECT_EQ(end.code, 0) << end.err;
    EXPECT_EQ(end.out, tokens.out) << mesh;
  }
  EXPECT_EQ(over("tp=2", drawn).out, text.out);
  EXPECT_NEAR(loss(over("cp=2", {"eval", "run", "--json"})), held_out, 1e-5);
  const Finished refused = over("cp=2", generate);
  EXPECT_EQ(refused.code, 2);
  EXPECT_EQ(refused.out, "");
  EXPECT_EQ(refused.err.find("error: generation does not run over context-parallel ranks, got cp = 2\n"), 0u) << refused.err;
}

}  // namespace
}  // namespace tessera
