// Every conformance check can fail: for each fault of tests/broken_blocks/, the check that names it does, and a sound block passes all.
#include <map>
#include <set>
#include <sstream>

#include "tests/support/process.hpp"

namespace tessera {
namespace {

const std::string kPlugin = TESSERA_BINARY_DIR "/broken_blocks/broken_blocks.so";

class BrokenBlocks : public FolderTest {
 protected:
  Finished check(std::vector<std::string> args) const {
    args.insert(args.begin(), {"test", "--plugin", kPlugin});
    return run_tessera(folder_, args, [] { unsetenv("TESSERA_PLUGIN_PATH"), setenv("OMP_NUM_THREADS", "2", 1); });
  }
};

// Fault -> the checks that failed.
std::map<std::string, std::set<std::string>> failures(const std::string& report) {
  std::map<std::string, std::set<std::string>> found;
  std::istringstream lines(report);
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with("  FAILED  ")) continue;
    const size_t colon = line.find(": ");
    found[line.substr(10, colon - 10)].insert(line.substr(colon + 2));
  }
  return found;
}

TEST_F(BrokenBlocks, EachIsFoundByTheCheckThatNamesIt) {
  const std::vector<std::pair<std::string, std::string>> expected{
      {"acausal", "nothing depends on later tokens"},
      {"leaks", "documents are independent"},
      {"counts_spans", "odd lengths together equal each alone"},
      {"forgets", "prefill and decoding give the whole forward"},
      {"never_writes", "every state row is written"},
      {"keeps_slot", "a slot is used again from nothing"},
      {"mixes_slots", "prompts of different lengths together equal each alone"},
      {"hides_state", "decode state rolls back"},
      {"remembers", "nothing is kept from call to call"},
      {"matmul", "declared flops are those that run"},
      {"mixing", "declared flops are those that run"},
      {"detached", "gradients are those of finite differences"},
      {"rounds", "gradients in fp32 are those in fp64"},
      {"unused", "rows are complete"},
      {"undeclared", "rows are complete"},
      {"no_source", "rows are complete"},
      {"random", "recomputation gives equal gradients"},
      {"random_once", "ranks compute what one process computes"},
      {"same_columns", "ranks compute what one process computes"},
      {"counts_grad_mode", "counts and losses enter once in recomputation"},
      {"local_shape", "shards cover every parameter"},
      {"segments", "shards cover every parameter"},
      {"uncut", "ranks together compute the whole"},
      {"bias_twice", "ranks together compute the whole"},
      {"draws_anew", "initial values depend on seed and name alone"},
      {"one_member", "each key has its own member"},
      {"reads_other", "configuration is written and read back"},
      {"edge", "the edges of a range run"},
      {"dtype", "runs in bfloat16"},
  };
  const Finished done = check({});
  EXPECT_EQ(done.code, 1) << done.err;
  const auto found = failures(done.out);
  for (const auto& [fault, name] : expected) EXPECT_TRUE(found.contains(fault) && found.at(fault).contains(name)) << fault << " is not found by: " << name << "\n" << done.out;
  EXPECT_EQ(found.size(), expected.size()) << done.out;
  EXPECT_FALSE(found.contains("sound") || found.contains("masked")) << done.out;
  size_t failed = 0;
  for (const auto& [fault, names] : found) failed += names.size();
  EXPECT_TRUE(done.out.ends_with(" passed, " + std::to_string(failed) + " failed\n")) << done.out;
}

TEST_F(BrokenBlocks, TheReportSaysWhatIsWrong) {
  const Finished done = check({"*NothingDependsOnLater*/acausal:*RowsAreComplete*/unused:*RowsAreComplete*/undeclared:*Flops*/matmul:*LaterTokens*/sound"});
  EXPECT_EQ(done.code, 1) << done.err;
  for (const char* line : {"sound: tested with width = 8, as its schema suggests (there is no sound.toml)\n", "  ok      sound: nothing depends on later tokens\n",
                           "  FAILED  acausal: nothing depends on later tokens\n          - tokens from 1 on were changed, and outputs before 1 changed too: not bit-equal: ",
                           "  FAILED  unused: rows are complete\n          - layers.0.unused is declared, but gets no gradient\n",
                           "layer layers.0 (undeclared), forward: forward asks for the parameter 'scale', which its table does not declare\n",
                           "two layers over 194 tokens declare 417178 FLOPs in products with parameters (Cost::matmul), and 397312 ran\n", "1 passed, 4 failed\n"})
    EXPECT_NE(done.out.find(line), std::string::npos) << line << "is not in:\n" << done.out;
}

TEST_F(BrokenBlocks, ChecksAreChosenByName) {
  const Finished one = check({"LaterTokens/sound"});
  EXPECT_EQ(one.code, 0) << one.out << one.err;
  EXPECT_TRUE(one.out.ends_with("1 passed, 0 failed\n")) << one.out;
  const Finished none = check({"NoSuchCheck"});
  EXPECT_EQ(none.code, 2);
  EXPECT_EQ(none.err, "error: test: no check matches \"*NoSuchCheck*\"\n");
}

TEST_F(BrokenBlocks, MistakesOfTheCommandLineEndWithTwo) {
  Finished done = run_tessera(folder_, {"test", "--plugin", "none.so"});
  EXPECT_EQ(done.code, 2);
  EXPECT_EQ(done.err, "error: --plugin: no file \"none.so\"\nhelp: name the .so that the build made\n");
  done = run_tessera(folder_, {"test", "--plugin", kPlugin, "--sizes", "nowhere"});
  EXPECT_EQ(done.code, 2);
  EXPECT_EQ(done.err, "error: --sizes: no folder \"nowhere\"\n");
  put_file(folder_ / "broken.so", "no shared object");
  done = run_tessera(folder_, {"test", "--plugin", "broken.so"});
  EXPECT_EQ(done.code, 3) << done.err;
  EXPECT_NE(done.err.find("broken.so"), std::string::npos) << done.err;
  done = run_tessera(folder_, {"test", "--help"});
  EXPECT_EQ(done.code, 0);
  EXPECT_NE(done.out.find("--plugin"), std::string::npos) << done.out;
}

}  // namespace
}  // namespace tessera
