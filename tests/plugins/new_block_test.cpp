// docs/adding_a_block.md: its code is the file that is built, its commands run, and the block they make behaves as every other one.
#include <algorithm>
#include <sstream>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "tests/support/process.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

const fs::path kSource = TESSERA_SOURCE_DIR, kBinary = TESSERA_BINARY_DIR;

// The fenced blocks of a language in the document.
std::vector<std::string> quoted(const std::string& language) {
  std::istringstream document(file_text(kSource / "docs/adding_a_block.md"));
  std::vector<std::string> blocks;
  bool inside = false;
  for (std::string line; std::getline(document, line);) {
    if (line == "```" + language) blocks.emplace_back(), inside = true;
    else if (line.starts_with("```")) inside = false;
    else if (inside) blocks.back() += line + "\n";
  }
  return blocks;
}

// The words of a command line; quotes keep spaces.
std::vector<std::string> words(const std::string& line) {
  std::vector<std::string> list;
  char open = 0;
  bool fresh = true;
  for (const char c : line) {
    if (open ? c == open : c == '"' || c == '\'') open = open ? 0 : c;
    else if (c == ' ' && !open) fresh = true;
    else {
      if (fresh) list.emplace_back();
      list.back() += c, fresh = false;
    }
  }
  return list;
}

// A copy in plugins/ is what the document asks for: the example's own build is then left out.
void use_example() {
  setenv("OMP_NUM_THREADS", "2", 1);
  setenv("OMP_WAIT_POLICY", "passive", 1);
  if (fs::exists(kBinary / "plugins/ema.so")) unsetenv("TESSERA_PLUGIN_PATH");
  else setenv("TESSERA_PLUGIN_PATH", (kBinary / "example_plugins").c_str(), 1);
}

class NewBlock : public FolderTest {
 protected:
  void SetUp() override {
    FolderTest::SetUp();
    for (const char* name : {"a", "b"})
      for (int i = 0; i < 200; ++i) text_ += fmt::format("{}: {} times {} is {}\n", name, i, i, i * i);
    put_file(folder_ / "text/a.txt", text_);
    put_file(folder_ / "text/b.txt", text_);
  }
  // A configuration in seconds: what a verb that reads one gets behind the words of the document.
  std::vector<std::string> small(std::vector<std::string> args) const {
    const std::string verb = args[0];
    if (verb != "train" && verb != "plan" && verb != "bench") return args;
    for (const char* value : {"model.hidden_size=32", "blocks.ema.width=32", "blocks.mlp.intermediate_size=32", "blocks.mamba2.num_heads=1", "data.path=text/*.txt",
                              "training.local_batch_size=2", "training.seq_len=32", "training.steps=4", "training.dtype=float32", "validation.tokens=64",
                              "checkpoint.interval=2", "lr_scheduler.warmup_steps=1"})
      args.insert(args.end(), {"--set", value});
    if (verb == "bench") args.insert(args.end(), {"--steps", "1", "--decode-tokens", "4"});
    return args;
  }
  Finished run(const std::vector<std::string>& args) const {
    const Finished done = run_tessera(folder_, small(args), use_example);
    EXPECT_EQ(done.code, 0) << fmt::format("{}: {}", args[0], done.err);
    return done;
  }
  Finished train(const std::string& name, std::vector<std::string> more = {}) const {
    std::vector<std::string> args{"train", (kSource / "configs/debug_model.toml").string(), "--set", "model.hybrid_override_pattern=AEA", "--set", "run.name=" + name};
    args.insert(args.end(), more.begin(), more.end());
    return run(args);
  }
  std::vector<double> losses(const std::string& name) const {
    std::istringstream lines(file_text(folder_ / "runs" / name / "metrics.jsonl"));
    std::vector<double> list;
    for (std::string line; std::getline(lines, line);) list.push_back(nlohmann::json::parse(line).at("loss"));
    return list;
  }
  std::string weights(const std::string& name) const { return file_text(folder_ / "runs" / name / "checkpoints/step-4/model.safetensors"); }

  std::string text_;
};

TEST_F(NewBlock, TheDocumentQuotesTheFile) {
  const std::string file = file_text(kSource / "docs/examples/ema.cpp");
  const auto blocks = quoted("cpp");
  EXPECT_GE(blocks.size(), 8u);
  for (const std::string& block : blocks) EXPECT_NE(file.find(block), std::string::npos) << "not in docs/examples/ema.cpp:\n" << block;
  EXPECT_LE(std::count(file.begin(), file.end(), '\n'), 150);
}

TEST_F(NewBlock, TheDocumentsCommandsWork) {
  std::map<std::string, std::string> out;  // by verb
  for (const std::string& block : quoted("sh")) {
    std::istringstream lines(block);
    for (std::string line; std::getline(lines, line);) {
      if (!line.starts_with("./tessera ")) continue;
      std::vector<std::string> args = words(line.substr(10));
      if (args[0] == "test") continue;
      for (std::string& word : args)
        if (word.starts_with("configs/")) word = (kSource / word).string();
      out[args[0]] += run(args).out;
    }
  }
  EXPECT_NE(out["describe"].find("block ema, version 1\n"), std::string::npos) << out["describe"];
  EXPECT_NE(out["plan"].find("A = ema"), std::string::npos) << out["plan"];
  EXPECT_NE(out["bench"].find("\n  ema "), std::string::npos) << out["bench"];
  EXPECT_NE(out["generate"].find("namespace "), std::string::npos) << out["generate"];
  EXPECT_EQ(losses("ema").size(), 4u);
  for (const char* name : {"layers.1.in_proj.weight", "layers.1.decay", "layers.1.out_proj.weight", "layers.1.gate_mean"})
    EXPECT_NE(weights("ema").find(fmt::format("\"{}\":", name)), std::string::npos) << name;
}

TEST_F(NewBlock, ResumesAndRecomputesToTheSameLosses) {
  train("kept");
  train("recomputed", {"--set", "activation_checkpoint.mode=full"});
  train("resumed");
  fs::remove_all(folder_ / "runs/resumed/checkpoints/step-4");
  EXPECT_NE(train("resumed", {"--resume"}).err.find("at step 2\n"), std::string::npos) << "it did not go on from step 2";
  ASSERT_EQ(losses("kept").size(), 4u);
  EXPECT_LT(losses("kept")[3], losses("kept")[0]);
  EXPECT_EQ(losses("resumed"), losses("kept"));
  EXPECT_EQ(losses("recomputed"), losses("kept"));
  EXPECT_TRUE(weights("recomputed") == weights("kept")) << "weights or the gates' running mean differ";
  EXPECT_TRUE(weights("resumed") == weights("kept"));
}

// Gradients, causality, documents, decoding, recomputation: the tests of every block, in the sizes of docs/examples/ema.toml.
TEST_F(NewBlock, Conforms) {
  use_example();
  setenv("TESSERA_CONFORMANCE_PATH", (kSource / "docs/examples").c_str(), 1);
  const fs::path out = folder_ / "conformance.txt";
  const std::string command = fmt::format("'{}' '--gtest_filter=*/Conformance.*/ema' --gtest_brief=1 > '{}' 2>&1", fs::read_symlink("/proc/self/exe").string(), out.string());
  const int code = std::system(command.c_str());
  unsetenv("TESSERA_PLUGIN_PATH"), unsetenv("TESSERA_CONFORMANCE_PATH"), unsetenv("OMP_NUM_THREADS"), unsetenv("OMP_WAIT_POLICY");
  EXPECT_EQ(code, 0) << file_text(out);
  EXPECT_EQ(file_text(out).find("[==========] 0 tests"), std::string::npos) << file_text(out);
  EXPECT_NE(file_text(out).find("[  PASSED  ]"), std::string::npos) << file_text(out);
}

}  // namespace
}  // namespace tessera
