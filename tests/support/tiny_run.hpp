// A run small enough for the command to train in a second: a configuration and its text in a temporary folder.
#pragma once
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/support/folder.hpp"
#include "tests/support/process.hpp"

namespace tessera {

inline constexpr const char* kTinyRun = R"(
[run]
folder = "run"
[model]
hybrid_override_pattern = "M*O/E"
hidden_size = 32
[blocks.mamba2]
num_heads = 2
head_dim = 8
state_size = 8
num_groups = 1
chunk = 16
[blocks.gqa]
num_heads = 2
num_kv_heads = 1
head_dim = 8
[blocks.mlp]
intermediate_size = 32
[blocks.moe]
num_experts = 4
top_k = 2
intermediate_size = 16
[training]
local_batch_size = 2
global_batch_size = 4
seq_len = 32
steps = 6
device = "cpu"
dtype = "float32"
num_threads = 2
[validation]
interval = 3
tokens = 128
[optimizer]
lr = 1e-2
[lr_scheduler]
warmup_steps = 2
decay_type = "cosine"
[data]
source = "bytes"
path = "text/*.txt"
validation_fraction = 0.2
[metrics]
tensorboard = false
)";

inline std::vector<nlohmann::json> metrics_of(const std::filesystem::path& run) {
  std::vector<nlohmann::json> lines;
  std::ifstream file(run / "metrics.jsonl");
  for (std::string line; std::getline(file, line);)
    if (auto object = nlohmann::json::parse(line, nullptr, false); !object.is_discarded()) lines.push_back(std::move(object));  // a line may be half written
  return lines;
}

inline std::vector<pid_t> ranks_of(pid_t launcher) {
  std::ifstream file(fmt::format("/proc/{}/task/{}/children", launcher, launcher));
  std::vector<pid_t> list;
  for (pid_t pid; file >> pid;) list.push_back(pid);
  return list;
}

class TinyRunTest : public FolderTest {
 protected:
  void SetUp() override {
    FolderTest::SetUp();
    for (int document = 0; document < 6; ++document) {
      std::string text;
      for (int word = 0; static_cast<int>(text.size()) < 300 + 170 * document; ++word) text += fmt::format("{} times {} is {}\n", document + word, word, (document + word) * word);
      put_file(folder_ / fmt::format("text/{}.txt", document), text);
    }
    put_file(folder_ / "tiny.toml", kTinyRun);
  }

  static std::vector<std::string> with_sets(std::vector<std::string> words, const std::vector<std::string>& sets) {
    for (const std::string& set : sets) words.insert(words.end(), {"--set", set});
    return words;
  }
  Finished tessera(const std::vector<std::string>& words, const std::vector<std::string>& sets = {}, const std::function<void()>& prepare = {}) const {
    return run_tessera(folder_, with_sets(words, sets), prepare);
  }
  Finished train(const std::string& run, std::vector<std::string> sets = {}, bool resume = false, const std::function<void()>& prepare = {}) const {
    sets.push_back("run.folder=" + run);
    std::vector<std::string> words{"train", "tiny.toml"};
    if (resume) words.push_back("--resume");
    return tessera(words, sets, prepare);
  }

  std::vector<nlohmann::json> metrics(const std::string& run) const { return metrics_of(folder_ / run); }
  // What a step did, without what depends on the machine's mood.
  static nlohmann::json numbers(nlohmann::json line) {
    for (const char* key : {"tokens_per_s", "flops_per_s", "input_s", "peak_bytes", "save_s", "save_wait_s"}) line.erase(key);
    return line;
  }
  // Two runs took the same steps to the same end, bit for bit.
  void expect_same_run(const std::string& run, const std::string& reference, int64_t steps) const {
    const auto got = metrics(run), want = metrics(reference);
    ASSERT_EQ(got.size(), static_cast<size_t>(steps)) << run;
    ASSERT_EQ(want.size(), static_cast<size_t>(steps)) << reference;
    for (size_t i = 0; i < want.size(); ++i) EXPECT_EQ(numbers(got[i]).dump(), numbers(want[i]).dump()) << run;
    for (const char* name : {"model.safetensors", "optimizer.safetensors"}) {
      const std::string below = fmt::format("checkpoints/step-{}/{}", steps, name), bytes = file_text(folder_ / reference / below);
      EXPECT_FALSE(bytes.empty()) << below;
      EXPECT_TRUE(file_text(folder_ / run / below) == bytes) << run << "/" << below << " differs";
    }
  }
};

}  // namespace tessera
