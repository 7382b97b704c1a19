// tessera new-plugin: what it writes is built with the tests (tests/plugins_example) and trains as it is; what it refuses; and a block outside the
// tree from its folder to a trained model, against the build folder and an installation.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <sstream>

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
  void expect_refused(std::vector<std::string> args, const std::string& message, bool in_tree = true) const {
    if (in_tree) args.push_back("--in-tree");
    const Finished done = run(args);
    EXPECT_EQ(done.code, 2);
    EXPECT_EQ(done.err, message);
    EXPECT_EQ(done.out, "");
    EXPECT_TRUE(entries(folder_ / "plugins").empty());
  }
  // A line that new-plugin printed, run by a shell in `where`.
  Finished shell(const fs::path& where, const std::string& line) const {
    const fs::path out = folder_ / "shell.txt";
    const std::string command = fmt::format("cd '{}' && ( unset TESSERA_PLUGIN_PATH TESSERA_CONFORMANCE_PATH; export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive; {} ) >'{}' 2>&1", where.string(), line, out.string());
    const int status = std::system(command.c_str());
    return {.code = WEXITSTATUS(status), .out = file_text(out)};
  }
  void expect_whole_round(const std::string& program);
};

// The lines that a message lists, indented by two.
std::vector<std::string> listed(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);)
    if (line.starts_with("  ")) lines.push_back(line.substr(2));
  return lines;
}

std::string with(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return at == std::string::npos ? text : text.replace(at, from.size(), to);
}

// What new-plugin prints, line by line; then wrong versions of the block, which must not pass.
void NewPlugin::expect_whole_round(const std::string& program) {
  const fs::path mine = folder_ / "my blocks";
  fs::create_directory(mine);
  const Finished made = shell(mine, fmt::format("'{}' new-plugin soft_gate --symbol '~'", program));
  ASSERT_EQ(made.code, 0) << made.out;
  const std::vector<std::string> lines = listed(made.out);
  ASSERT_EQ(lines.size(), 4u) << made.out;
  const fs::path block = mine / "soft_gate";
  EXPECT_EQ(lines[0], fmt::format("cd '{}'", block.string()));
  EXPECT_EQ(entries(block), (std::vector<std::string>{"CMakeLists.txt", "README.md", "soft_gate.cpp", "soft_gate.toml", "train-soft_gate.toml"}));
  for (size_t i = 1; i < 4; ++i) EXPECT_NE(file_text(block / "README.md").find(lines[i] + "\n"), std::string::npos) << lines[i];

  Finished done = shell(block, lines[1]);
  ASSERT_EQ(done.code, 0) << done.out;
  done = shell(block, lines[2]);
  EXPECT_EQ(done.code, 0) << done.out;
  EXPECT_NE(done.out.find("soft_gate: tested with the sizes of "), std::string::npos) << done.out;
  EXPECT_TRUE(done.out.ends_with(" passed, 0 failed\n")) << done.out;
  fs::remove(block / "soft_gate.toml");
  done = shell(block, lines[2]);
  EXPECT_EQ(done.code, 0) << done.out;
  EXPECT_NE(done.out.find("soft_gate: tested with intermediate_size = 8, as its schema suggests"), std::string::npos) << done.out;
  done = shell(block, lines[3] + " --set training.steps=2 --set lr_scheduler.warmup_steps=1 --set checkpoint.interval=2 --set validation.tokens=256");
  EXPECT_EQ(done.code, 0) << done.out;
  EXPECT_TRUE(fs::exists(block / "runs/soft_gate/checkpoints/step-2/model.safetensors")) << done.out;
  done = shell(block, fmt::format("TESSERA_PLUGIN_PATH=build '{}' describe soft_gate", program));
  EXPECT_NE(done.out.find("block soft_gate, version 1\n"), std::string::npos) << done.out;

  const std::string right = file_text(block / "soft_gate.cpp");
  put_file(block / "soft_gate.cpp", with(with(right, "6 * N * D * F", "5 * N * D * F"), "const at::Tensor gate_up = linear(ctx, x_nd,", "const at::Tensor gate_up = linear(ctx, x_nd.roll({-1}, {0}),"));
  done = shell(block, "cmake --build build");
  ASSERT_EQ(done.code, 0) << done.out;
  done = shell(block, lines[2]);
  EXPECT_EQ(done.code, 1) << done.out;
  for (const char* check : {"nothing depends on later tokens", "documents are independent", "declared flops are those that run", "prefill and decoding give the whole forward"})
    EXPECT_NE(done.out.find(fmt::format("  FAILED  soft_gate: {}\n", check)), std::string::npos) << done.out;
  EXPECT_FALSE(done.out.ends_with(" 0 failed\n")) << done.out;
}

TEST_F(NewPlugin, MakesABlockOutsideTheTree) {
  if (!std::getenv("TESSERA_TEST_ALL")) GTEST_SKIP() << "compiles a block twice; runs with --all";
  expect_whole_round(TESSERA_BINARY_DIR "/bin/tessera");
}

TEST_F(NewPlugin, MakesABlockFromAnInstallationThatWasMoved) {
  if (!std::getenv("TESSERA_TEST_ALL")) GTEST_SKIP() << "compiles a block twice; runs with --all";
  const Finished done = shell(folder_, fmt::format("cmake --install '{}' --prefix first", TESSERA_BINARY_DIR));
  ASSERT_EQ(done.code, 0) << done.out;
  fs::rename(folder_ / "first", folder_ / "second");
  expect_whole_round((folder_ / "second/bin/tessera").string());
  const Finished missing = shell(folder_, fmt::format("TESSERA_TORCH_DIR=/nowhere '{}' plugins", (folder_ / "second/bin/tessera").string()));
  EXPECT_EQ(missing.code, 4);
  EXPECT_EQ(missing.out.find("error: no libtorch at /nowhere\nhelp: TESSERA_TORCH_DIR="), 0u) << missing.out;
}

TEST_F(NewPlugin, RefusesAFolderThatIsThere) {
  put_file(folder_ / "gated/notes.txt", "mine\n");
  expect_refused({"gated", "--symbol", "~"}, "error: " + (folder_ / "gated").string() + ": exists already\nhelp: choose another NAME or --folder\n", false);
  EXPECT_EQ(entries(folder_ / "gated"), std::vector<std::string>{"notes.txt"});
  expect_refused({"gated", "--symbol", "~", "--folder", "elsewhere"}, "error: --folder: no folder \"elsewhere\"\nhelp: name a folder that exists\n", false);
}

// A failure halfway leaves nothing behind: here the folder cannot be renamed into place.
TEST_F(NewPlugin, LeavesNothingHalfWritten) {
  fs::create_symlink("nowhere", folder_ / "gated");
  const Finished done = run({"gated", "--symbol", "~"});
  EXPECT_NE(done.code, 0);
  for (const std::string& name : entries(folder_)) EXPECT_EQ(name.find("tmp"), std::string::npos) << name;
}

TEST_F(NewPlugin, WritesOneFileAndSaysWhatIsNext) {
  const Finished done = run({"soft_gate2", "--symbol", "~", "--in-tree"});
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
