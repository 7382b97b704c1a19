// tessera new-plugin: what it writes is built with the tests (tests/plugins_example) and trains as it is; what it refuses.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/process.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

class NewPlugin : public FolderTest {
 protected:
  void SetUp() override {
    FolderTest::SetUp();
    fs::create_directory(folder_ / "plugins");
  }
  Finished run(std::vector<std::string> args) const {
    args.insert(args.begin(), "new-plugin");
    return run_tessera(folder_, args, [] { unsetenv("TESSERA_PLUGIN_PATH"); });
  }
  void expect_refused(const std::vector<std::string>& args, const std::string& message) const {
    const Finished done = run(args);
    EXPECT_EQ(done.code, 2);
    EXPECT_EQ(done.err, message);
    EXPECT_EQ(done.out, "");
    EXPECT_TRUE(entries(folder_ / "plugins").empty());
  }
};

TEST_F(NewPlugin, WritesOneFileAndSaysWhatIsNext) {
  const Finished done = run({"soft_gate2", "--symbol", "~"});
  EXPECT_EQ(done.code, 0) << done.err;
  EXPECT_EQ(done.out,
            "plugins/soft_gate2.cpp: written, a gated feed-forward block to change into yours. The next ./tessera command builds it:\n"
            "  ./tessera describe soft_gate2\n"
            "  ./tessera train configs/debug_model.toml --set 'model.hybrid_override_pattern=M~*~' --set blocks.soft_gate2.intermediate_size=256 --set run.name=soft_gate2\n"
            "docs/adding_a_block.md explains each part.\n");
  EXPECT_EQ(entries(folder_ / "plugins"), std::vector<std::string>{"soft_gate2.cpp"});
  const std::string text = file_text(folder_ / "plugins/soft_gate2.cpp");
  EXPECT_NE(text.find("TESSERA_PLUGIN(SoftGate2Block)\n"), std::string::npos);
  EXPECT_EQ(text.find('@'), std::string::npos);
}

TEST_F(NewPlugin, TrainsAsItIs) {
  std::string text;
  for (int i = 0; i < 200; ++i) text += fmt::format("{} times {} is {}\n", i, i, i * i);
  put_file(folder_ / "text/a.txt", text);
  put_file(folder_ / "text/b.txt", text);
  std::vector<std::string> args{"train", std::string(TESSERA_SOURCE_DIR) + "/configs/debug_model.toml"};
  for (const char* value : {"model.hybrid_override_pattern=M~*~", "blocks.new_plugin_example.intermediate_size=48", "run.name=new", "model.hidden_size=32", "blocks.mamba2.num_heads=1",
                            "data.path=text/*.txt", "training.local_batch_size=2", "training.seq_len=32", "training.steps=6", "lr_scheduler.warmup_steps=1", "validation.tokens=64"})
    args.insert(args.end(), {"--set", value});
  const Finished done = run_tessera(folder_, args, [] {
    setenv("TESSERA_PLUGIN_PATH", TESSERA_BINARY_DIR "/example_plugins/example_new.so", 1);
    setenv("OMP_NUM_THREADS", "2", 1);
    setenv("OMP_WAIT_POLICY", "passive", 1);
  });
  EXPECT_EQ(done.code, 0) << done.err;
  EXPECT_TRUE(fs::exists(folder_ / "runs/new/checkpoints/step-6/model.safetensors"));
}

TEST_F(NewPlugin, RefusesNames) {
  const std::string rule = "error: NAME: must be lower case letters, digits and '_', beginning with a letter, got ";
  expect_refused({"Gated", "--symbol", "~"}, rule + "\"Gated\"\n");
  expect_refused({"2nd", "--symbol", "~"}, rule + "\"2nd\"\n");
  expect_refused({"../gated", "--symbol", "~"}, rule + "\"../gated\"\n");
  expect_refused({"", "--symbol", "~"}, rule + "\"\"\n");
  const std::string built = TESSERA_BINARY_DIR "/plugins/";
  expect_refused({"moe", "--symbol", "~"}, "error: NAME: type 'moe' is there already, from " + built + "moe.so\nhelp: choose another NAME\n");
  expect_refused({"mtp", "--symbol", "~"}, "error: NAME: type 'mtp' is there already, from " + built + "mtp.so\nhelp: choose another NAME\n");
}

TEST_F(NewPlugin, RefusesLetters) {
  const std::string rule = "error: --symbol: must be one printable ASCII character other than | / ' and \\, got ";
  expect_refused({"gated", "--symbol", "GG"}, rule + "\"GG\"\n");
  expect_refused({"gated", "--symbol", "|"}, rule + "\"|\"\n");
  expect_refused({"gated", "--symbol", "'"}, rule + "\"'\"\n");
  expect_refused({"gated", "--symbol", "\\"}, rule + "\"\\\\\"\n");
  expect_refused({"gated", "--symbol", "é"}, rule + "\"é\"\n");
  const Finished taken = run({"gated", "--symbol", "M"});
  EXPECT_EQ(taken.code, 2);
  EXPECT_TRUE(taken.err.starts_with("error: --symbol: 'M' is mamba2 in the card dialect\nhelp: free: ")) << taken.err;
  EXPECT_TRUE(taken.err.ends_with(" Z; [symbols] of a configuration can bind any letter to any block\n")) << taken.err;
  EXPECT_EQ(taken.err.find(" M "), std::string::npos) << taken.err;
}

TEST_F(NewPlugin, RefusesFolders) {
  expect_refused({"gated", "--symbol", "~", "--folder", "elsewhere"}, "error: --folder: no folder \"elsewhere\"\nhelp: run it where plugins/ is, or name a folder that exists\n");
  put_file(folder_ / "mine/gated.cpp", "// mine\n");
  expect_refused({"gated", "--symbol", "~", "--folder", "mine"}, "error: mine/gated.cpp: exists already\nhelp: choose another NAME\n");
  EXPECT_EQ(file_text(folder_ / "mine/gated.cpp"), "// mine\n");
}

TEST_F(NewPlugin, NeedsANameAndALetter) {
  expect_refused({"gated"}, "error: --symbol is required\nhelp: tessera --help lists the verbs, tessera VERB --help their options\n");
  expect_refused({"--symbol", "~"}, "error: NAME is required\nhelp: tessera --help lists the verbs, tessera VERB --help their options\n");
}

}  // namespace
}  // namespace tessera
