// The golden checkpoints against what HF transformers computed from them: forward, backward, training, generation.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <map>

#include "hf/convert.hpp"
#include "hf/verify.hpp"
#include "tests/support/compare.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

const fs::path kGolden = fs::path(TESSERA_SOURCE_DIR) / "tests/golden";

const Registry& registry() {
  static const Registry loaded = Registry::load({fs::path(TESSERA_BINARY_DIR) / "plugins"});
  return loaded;
}

struct Mode {
  const char* name;
  std::vector<std::string> sets;
  bool there_and_back = false;
};

const std::vector<Mode>& modes() {
  static const std::vector<Mode> list{{"plain", {}},
                                      {"recompute", {"activation_checkpoint.mode=full"}},
                                      {"chunk_1", {"blocks.mamba2.chunk=1"}},
                                      {"chunk_7", {"blocks.mamba2.chunk=7"}},
                                      {"chunk_16", {"blocks.mamba2.chunk=16"}},
                                      {"chunk_64", {"blocks.mamba2.chunk=64"}},
                                      {"one_row_micro_batches", {"training.local_batch_size=1"}},
                                      {"recompute_in_micro_batches", {"activation_checkpoint.mode=full", "training.local_batch_size=1"}},
                                      {"there_and_back", {}, true}};
  return list;
}

using Case = std::tuple<std::string, size_t>;
class Parity : public testing::TestWithParam<Case> {};

TEST_P(Parity, AgreesWithTransformers) {
  const auto& [name, index] = GetParam();
  const Mode& mode = modes()[index];
  fs::path folder = kGolden / name;
  const fs::path work = fs::temp_directory_path() / fmt::format("tessera_parity_{}_{}", getpid(), name);
  if (mode.there_and_back) {
    fs::remove_all(work);
    convert_to_tessera(folder, work / "checkpoint", registry());
    convert_to_hf(work / "checkpoint", work / "hub", registry());
    folder = work / "hub";
  }
  const VerifyReport report = verify_hf(folder, kGolden / name / "reference.safetensors", registry(), {.sets = mode.sets});
  fs::remove_all(work);
  EXPECT_EQ(report.num_failed(), 0) << report_text(report);
  // Everything in the file but the inputs was compared.
  int64_t held = 0;
  const auto reference = SafetensorsFile::open(kGolden / name / "reference.safetensors");
  for (const TensorEntry& entry : reference.entries())
    held += entry.name != "input_ids" && entry.name != "document_lengths" && entry.name != "generate.prompt";
  EXPECT_EQ(report.num_compared(), held);
  // One process holds everything, and sends nothing.
  ASSERT_EQ(report.ranks.size(), 1u);
  EXPECT_GT(report.ranks[0].parameter_bytes, 0);
  for (const auto& [axis, bytes] : report.ranks[0].sent_bytes) EXPECT_EQ(bytes, 0) << axis;
}

INSTANTIATE_TEST_SUITE_P(Golden, Parity, testing::Combine(testing::Values("dense", "moe", "latent", "mtp", "groups", "packed"), testing::Range<size_t>(0, 9)),
                         [](const auto& info) { return std::get<0>(info.param) + "_" + modes()[std::get<1>(info.param)].name; });

// The modes change how the numbers come about, so they change the last bits: a mode that did nothing would not.
TEST(ParityModes, TakeEffect) {
  auto grads = [](const std::vector<std::string>& sets) {
    return verify_hf(kGolden / "dense", kGolden / "dense/reference.safetensors", registry(), {.sets = sets}).find("grad.backbone.layers.0.mixer.A_log")->value;
  };
  const at::Tensor plain = grads({});
  EXPECT_TRUE(bit_equal(grads({}), plain));
  EXPECT_FALSE(bit_equal(grads({"blocks.mamba2.chunk=7"}), plain));
  EXPECT_FALSE(bit_equal(grads({"training.local_batch_size=1"}), plain));
  EXPECT_TRUE(bit_equal(grads({"activation_checkpoint.mode=full"}), plain));
}

class VerifyFile : public testing::Test {
 protected:
  void SetUp() override { file_ = fs::temp_directory_path() / fmt::format("tessera_verify_{}.safetensors", getpid()); }
  void TearDown() override { fs::remove(file_); }
  // The golden reference with some tensors left out or replaced.
  void write(const std::string& name, const std::function<void(std::map<std::string, at::Tensor>&)>& edit) {
    std::map<std::string, at::Tensor> tensors;
    const auto golden = SafetensorsFile::open(kGolden / name / "reference.safetensors");
    for (const TensorEntry& entry : golden.entries()) tensors[entry.name] = golden.tensor(entry.name).clone();
    edit(tensors);
    std::vector<TensorSpec> specs;
    for (const auto& [key, t] : tensors) specs.push_back({.name = key, .dtype = t.scalar_type(), .shape = t.sizes().vec()});
    SafetensorsWriter writer(file_, specs);
    for (const auto& [key, t] : tensors) writer.write(key, t);
    writer.finish();
  }
  fs::path file_;
};

TEST_F(VerifyFile, TheFirstLayerThatDiffersIsNamed) {
  write("dense", [](auto& tensors) {
    for (const char* name : {"hidden.3", "hidden.4", "hidden.5", "logits"}) tensors[name].mul_(1.001);
  });
  const VerifyReport report = verify_hf(kGolden / "dense", file_, registry());
  EXPECT_EQ(report.num_failed(), 4);
  EXPECT_EQ(report.first_difference, "layer 2 (mamba2)");
  EXPECT_FALSE(report_json(report)["ok"].get<bool>());
}

TEST_F(VerifyFile, AWrongGradientIsNamedByItsLayer) {
  write("moe", [](auto& tensors) { tensors["grad.backbone.layers.1.mixer.gate.weight"].mul_(1.01); });
  const VerifyReport report = verify_hf(kGolden / "moe", file_, registry());
  EXPECT_EQ(report.num_failed(), 1);
  EXPECT_EQ(report.first_difference, "layer 1 (moe), backward");
}

TEST_F(VerifyFile, TokensMustBeEqualAndShapesToo) {
  write("dense", [](auto& tensors) {
    tensors["generate.tokens"].view({-1}).narrow(0, 23, 1).add_(1);
    tensors["train.losses"] = tensors["train.losses"].narrow(0, 0, 4).clone();
    tensors["mtp.1.loss"] = tensors["loss"].clone();
  });
  const VerifyReport report = verify_hf(kGolden / "dense", file_, registry());
  EXPECT_EQ(report.num_failed(), 3);
  EXPECT_EQ(report.first_difference, "generation");
  EXPECT_EQ(report.not_computed, std::vector<std::string>{"mtp.1.loss"});
}

TEST_F(VerifyFile, InputsAloneCompareNothingAndTheDumpHoldsEverything) {
  write("packed", [](auto& tensors) { std::erase_if(tensors, [](const auto& entry) { return entry.first != "input_ids" && entry.first != "document_lengths"; }); });
  const VerifyReport report = verify_hf(kGolden / "packed", file_, registry());
  EXPECT_EQ(report.num_compared(), 0);
  EXPECT_EQ(report.num_failed(), 0);
  EXPECT_NE(report_text(report).find("nothing to compare"), std::string::npos);
  dump_report(report, file_);
  const auto dump = SafetensorsFile::open(file_), golden = SafetensorsFile::open(kGolden / "packed/reference.safetensors");
  for (const TensorEntry& entry : golden.entries()) ASSERT_TRUE(dump.find(entry.name)) << entry.name;
  for (const char* name : {"hidden.0", "hidden.5", "generate.prompt", "generate.tokens", "train.losses", "train.grad_norms"}) EXPECT_TRUE(dump.find(name)) << name;
  EXPECT_TRUE(close(dump.tensor("logits"), golden.tensor("logits"), kForwardLimit));
}

TEST_F(VerifyFile, BrokenInputsAreRefused) {
  write("dense", [](auto& tensors) { tensors.erase("input_ids"); });
  EXPECT_THROW(verify_hf(kGolden / "dense", file_, registry()), Error);
  write("dense", [](auto& tensors) { tensors["input_ids"].fill_(256); });
  EXPECT_THROW(verify_hf(kGolden / "dense", file_, registry()), Error);
  write("packed", [](auto& tensors) { tensors["document_lengths"].fill_(48); });
  EXPECT_THROW(verify_hf(kGolden / "packed", file_, registry()), Error);
}

}  // namespace
}  // namespace tessera
