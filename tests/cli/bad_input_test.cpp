// Every verb with missing, extra and wrong arguments, and with files that are none: exact text and exit code, and nothing on stdout.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

constexpr const char* kHelp = "help: tessera --help lists the verbs, tessera VERB --help their options\n";

class BadCommand : public TinyRunTest {
 protected:
  void expect(const std::vector<std::string>& words, int code, const std::string& text, const std::vector<std::string>& sets = {}) const {
    // Nothing here needs more address space than the libraries take: what a file claims is not allocated.
    const Finished done = tessera(words, sets, [] {
      const struct rlimit limit{rlim_t{6} << 30, rlim_t{6} << 30};
      ::setrlimit(RLIMIT_AS, &limit);
    });
    EXPECT_EQ(done.code, code) << fmt::format("{}", fmt::join(words, " "));
    EXPECT_EQ(done.err, text) << fmt::format("{}", fmt::join(words, " "));
    EXPECT_EQ(done.out, "") << fmt::format("{}", fmt::join(words, " "));
  }
  void expect_usage(const std::vector<std::string>& words, const std::string& text) const { expect(words, 2, "error: " + text + "\n" + kHelp); }
};

TEST_F(BadCommand, AMissingArgumentIsNamed) {
  for (const char* verb : {"train", "plan", "bench"}) expect_usage({verb}, "CONFIG is required");
  expect_usage({"sweep"}, "SWEEP is required");
  for (const char* verb : {"generate", "eval", "inspect"}) expect_usage({verb}, "CHECKPOINT is required");
  expect_usage({"convert"}, "IN is required");
  expect_usage({"convert", "a"}, "OUT is required");
  expect_usage({"convert", "a", "b"}, "--to is required");
  expect_usage({"verify"}, "HF_DIR is required");
  expect_usage({"verify", "a"}, "--reference is required");
  expect_usage({"new-plugin"}, "NAME is required");
  expect_usage({"train", "tiny.toml", "--set"}, "--set: 1 required KEY=VALUE missing");
}

TEST_F(BadCommand, AnExtraArgumentIsNamed) {
  expect_usage({"train", "tiny.toml", "more"}, "The following argument was not expected: more");
  expect_usage({"plan", "tiny.toml", "more", "and"}, "The following arguments were not expected: and more");
  expect_usage({"eval", "run", "more"}, "The following argument was not expected: more");
  expect_usage({"generate", "run", "more"}, "The following argument was not expected: more");
  expect_usage({"convert", "a", "b", "c", "--to", "hf"}, "The following argument was not expected: c");
  expect_usage({"verify", "a", "b", "--reference", "c"}, "The following argument was not expected: b");
  expect_usage({"plugins", "more"}, "The following argument was not expected: more");
  expect_usage({"plan", "tiny.toml", "--jsn"}, "The following argument was not expected: --jsn");
  expect_usage({"plan", "tiny.toml", "train"}, "The following argument was not expected: train");
}

TEST_F(BadCommand, AWrongValueIsNamed) {
  expect_usage({"eval", "run", "--tokens", "0"}, "--tokens: must be an integer in [1, 9223372036854775807], got 0");
  expect_usage({"eval", "run", "--tokens", "many"}, "--tokens: must be an integer in [1, 9223372036854775807], got many");
  expect_usage({"generate", "run", "--prompt", "a", "--max-new-tokens", "-1"}, "--max-new-tokens: must be an integer in [0, 9223372036854775807], got -1");
  expect_usage({"generate", "run", "--prompt", "a", "--max-new-tokens", "1e99"}, "--max-new-tokens: must be an integer in [0, 9223372036854775807], got 1e99");
  expect_usage({"generate", "run", "--prompt", "a", "--temperature", "nan"}, "--temperature: must be a number in [0, inf), got nan");
  expect_usage({"generate", "run", "--prompt", "a", "--temperature", "inf"}, "--temperature: must be a number in [0, inf), got inf");
  expect_usage({"generate", "run", "--prompt", "a", "--top-p", "nan"}, "--top-p: must be a number in [0, 1], got nan");
  expect_usage({"generate", "run", "--prompt", "a", "--seed", "-1"}, "--seed: must be an integer in [0, 9223372036854775807], got -1");
  expect_usage({"generate", "run", "--prompt", "a", "--seed", "18446744073709551616"}, "--seed: must be an integer in [0, 9223372036854775807], got 18446744073709551616");
  expect_usage({"convert", "a", "b", "--to", "onnx"}, "--to: onnx not in {hf,tessera}");
  expect_usage({"convert", "a", "b", "--to", "hf", "--dtype", "int4"}, "--dtype: int4 not in {float32,bfloat16,float16}");
  expect_usage({"convert", "a", "b", "--to", "hf", "--max-shard-bytes", "0"}, "--max-shard-bytes: must be an integer in [1, 9223372036854775807], got 0");
  expect_usage({"bench", "tiny.toml", "--steps", "-1"}, "--steps: must be an integer in [0, 9223372036854775807], got -1");
}

TEST_F(BadCommand, AMeshOutOfRange) {
  expect({"plan", "tiny.toml", "--mesh", "ep=4294967296,etp=4294967296"}, 2, "error: --mesh: ep must be an integer in [1, 1048576], got \"4294967296\"\n");
  expect({"plan", "tiny.toml", "--mesh", "tp=9223372036854775808"}, 2, "error: --mesh: tp must be an integer in [1, 1048576], got \"9223372036854775808\"\n");
  expect({"plan", "tiny.toml", "--mesh", "tp=0"}, 2, "error: --mesh: tp must be an integer in [1, 1048576], got \"0\"\n");
  expect({"plan", "tiny.toml", "--mesh", "pp=2,,"}, 2, "error: --mesh: \"\" must be AXIS=DEGREE\nhelp: axes: pp, dp_replicate, dp_shard, cp, tp, ep, etp\n");
  expect({"plan", "tiny.toml", "--mesh", "dp_replicate=1048576,dp_shard=1048576"}, 2,
         "error: parallelism: must make at most 1073741824 ranks, got pp 1 x dp_replicate 1048576 x dp_shard 1048576 x cp 1 x tp 1 = 1099511627776\n", {"training.global_batch_size=0"});
}

TEST_F(BadCommand, AConfigurationThatIsNoFile) {
  fs::create_directory(folder_ / "folder.toml");
  ASSERT_EQ(::mkfifo((folder_ / "pipe.toml").c_str(), 0600), 0);
  for (const char* verb : {"train", "plan", "bench"}) {
    expect({verb, "folder.toml"}, 2, "folder.toml: error: is a folder, not a configuration file\n");
    expect({verb, "pipe.toml"}, 2, "pipe.toml: error: is a device or pipe, not a configuration file\n");
    expect({verb, "/dev/null"}, 2, "/dev/null: error: is a device or pipe, not a configuration file\n");
    expect({verb, "none.toml"}, 2, "none.toml: error: the configuration file cannot be opened\n");
    expect({verb, ""}, 2, "error: the name of the configuration file is empty\n");
  }
}

TEST_F(BadCommand, ACheckpointThatIsNone) {
  put_file(folder_ / "file", "x");
  fs::create_directory(folder_ / "empty");
  ASSERT_EQ(::mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  const std::string no_folder = ": no such folder\nhelp: name a run's folder or one of its checkpoints/step-N\n";
  for (const std::vector<std::string>& words : std::vector<std::vector<std::string>>{{"eval"}, {"generate", "--prompt", "a"}, {"convert", "out", "--to", "hf"}}) {
    const auto with = [&](const std::string& checkpoint) {
      auto all = words;
      all.insert(all.begin() + 1, checkpoint);
      return all;
    };
    expect(with("none"), 4, "error: none" + no_folder);
    expect(with("file"), 4, "error: file" + no_folder);
    expect(with("pipe"), 4, "error: pipe" + no_folder);
    expect(with("empty"), 4, "error: empty: no complete checkpoint there\n");
  }
  expect({"convert", "empty", "out", "--to", "tessera"}, 4, "error: empty/config.json: cannot be opened: No such file or directory\n");
  put_file(folder_ / "none.safetensors", "");
  expect({"verify", "empty", "--reference", "none"}, 4, "error: none: cannot be opened: No such file or directory\n");
  expect({"verify", "empty", "--reference", "none.safetensors"}, 4, "error: none.safetensors: must begin with 8 bytes of header length, but the file has 0\n");
  put_file(folder_ / "hub/config.json", "{}");
  expect({"eval", "hub"}, 4, "error: hub: no complete checkpoint there\nhelp: it looks like a Hugging Face checkpoint: `tessera convert hub OUT --to tessera` first\n");
}

TEST_F(BadCommand, DataThatIsNone) {
  ASSERT_EQ(::mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  put_file(folder_ / "empty.txt", "");
  put_file(folder_ / "wide.txt", "abc\xff");
  const auto data = [&](const std::string& path, const std::string& text, std::vector<std::string> sets = {}, int code = 4) {
    sets.push_back("data.path=" + path);
    sets.push_back("run.folder=r" + std::to_string(text.size()));
    expect({"train", "tiny.toml", "--quiet"}, code, text, sets);
  };
  data("text", "error: data.path: 'text' is a folder\nhelp: 'text/**' names the files in it and below\n");
  data("pipe", "error: data.path: 'pipe' is a device or pipe, not a regular file\n");
  data("/dev/zero", "error: data.path: '/dev/zero' is a device or pipe, not a regular file\n");
  data("none/*.txt", fmt::format("error: data.path: no file matches 'none/*.txt'\nhelp: paths are relative to the current folder, {}\n", fs::canonical(folder_).string()));
  data("empty.txt", "error: bytes 'empty.txt': all 1 documents for training are empty\n");
  data("\"{home}/a\"", "error: data.path: unknown placeholder '{home}' in '{home}/a'\nhelp: placeholders: {libtorch}\n", {}, 2);
  data("pipe", "error: pipe.idx: cannot be opened: No such file or directory\n", {"data.source=megatron"});
  data("wide.txt", "error: bytes 'wide.txt': token 255 at position 3 of wide.txt must be in [0, 255)\nhelp: model.vocab_size is the number of ids; bytes need 256\n",
       {"model.vocab_size=255", "data.validation_fraction=0", "validation.interval=0"});
}

TEST_F(BadCommand, SizesThatNoMachineHas) {
  const auto refused = [&](const char* verb, const std::vector<std::string>& sets, const std::string& begin) {
    const Finished done = tessera({verb, "tiny.toml"}, sets);
    EXPECT_EQ(done.code, 4);
    EXPECT_EQ(done.err.substr(0, begin.size()), begin);
    EXPECT_TRUE(done.err.ends_with(" GiB of memory\nhelp: `tessera plan` tells what a configuration needs\n")) << done.err;
    EXPECT_EQ(done.out, "");
  };
  expect({"train", "tiny.toml"}, 2,
         "--set model.hidden_size=1099511627776: error: model.hidden_size: must be in [1, 1000000000], got 1099511627776\n"
         "--set model.vocab_size=4611686018427387904: error: model.vocab_size: must be in [1, 1000000000], got 4611686018427387904\n",
         {"model.vocab_size=4611686018427387904", "model.hidden_size=1099511627776"});
  refused("train", {"model.vocab_size=1000000000", "model.hidden_size=1000000"},
          "error: 2002000318000186 elements of 16 bytes, gradient and optimizer included, take 29832129.4 GiB and 4 rows of 32 tokens, 2 at a time through 3 layers, at least 0.7 GiB, "
          "but this machine has ");
  refused("train", {"training.seq_len=1000000000"},
          "error: 28794 elements of 16 bytes, gradient and optimizer included, take 0.0 GiB and 4 rows of 1000000000 tokens, 2 at a time through 3 layers, at least 745.1 GiB, but this machine has ");
  refused("bench", {"training.local_batch_size=1000000000", "training.global_batch_size=0"},
          "error: 28794 elements of 16 bytes, gradient and optimizer included, take 0.0 GiB and 1000000000 rows of 32 tokens, 1000000000 at a time through 3 layers, at least 11682.5 GiB, "
          "but this machine has ");
}

}  // namespace
}  // namespace tessera
