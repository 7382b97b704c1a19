#include "cli/describe.hpp"

#include <gtest/gtest.h>

#include "sweep/sweep.hpp"
#include "tests/core/fake_blocks.hpp"

namespace tessera {
namespace {

TEST(Describe, ABlock) {
  EXPECT_EQ(describe_text(fake::registry(), "scan"), R"(block scan, version 1
  source: arXiv:0000.00000
  letters: 'M' in dialect card, 'M' in dialect nemotron
  takes: all tokens and channels on every tensor rank
  gives: a summand on every tensor rank
  around it: RMSNorm before, residual

keys of [blocks.scan]
  key         values                         default     meaning             HF key
  num_heads   integer in [1, 1000000000]     required    heads               mamba_num_heads, num_heads
  num_groups  integer in [1, 1000000000]     1           groups
  state_size  integer in [1, 4096]           128         state of a channel
  limit       list of 2 numbers in [0, inf)  [0.0, inf]  clamp of the step
  bias        boolean                        false       adds a bias
  norm        one of "rms", "layer"          "rms"       the norm

parameters, with hidden_size = 64, num_heads = 8
  name       shape    cut         dtype    weight decay  initial values   HF name
  in.weight  [8, 64]  tp dim 0    compute  yes           normal(0, 0.02)  mixer.in.weight
  A          [8]      replicated  float32  no            1                mixer.A_log

plugin: built-in
)");
}

TEST(Describe, ATable) {
  EXPECT_EQ(describe_text(fake::registry(), "profiling"), R"([profiling]: a trace of some steps
  key        values                      default  unit   meaning
  enable     boolean                     false           writes a trace of some steps
  step       integer in [1, 1000000000]  10       steps  the first that is traced
  num_steps  integer in [1, 1000]        1        steps  how many are traced, into one file
)");
  EXPECT_NE(describe_text(fake::registry(), "data").find("[[data.mixture]]"), std::string::npos);
}

TEST(Describe, TheTablesOfASweep) {
  const std::string text = describe_text(fake::registry(), "sweep");
  EXPECT_EQ(text.find("[sweep]: what is swept\n"), 0u) << text;
  for (const char* key : {"\n  base ", "\n  stop_above ", "\n[halving]", "\n  rungs ", "\n[match]", "\n  tolerance ", "\nbend of [match]", "\n  multiple_of ", "\n  cell "}) EXPECT_NE(text.find(key), std::string::npos) << key;
  const std::string page = reference_markdown(fake::registry()).at("sweep.md");
  for (const auto& schema : {sweep_schema().list, halving_schema().list, match_schema().list, bend_schema().list})
    for (const Field& field : schema) EXPECT_NE(page.find("\n| " + field.key + " | "), std::string::npos) << field.key;
}

TEST(Describe, NoSuchName) {
  try {
    describe_text(fake::registry(), "scann");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    EXPECT_STREQ(error.what(), "error: no block, head or table \"scann\"\n"
                               "help: did you mean 'scan'? types: attn, dense, experts, latent_experts, scan, ahead; tables: run, model, training, validation, optimizer, "
                               "lr_scheduler, activation_checkpoint, data, data.task, metrics, profiling, plugins, parallelism, checkpoint, sweep");
  }
}

TEST(Describe, OneReferenceFileForEveryType) {
  const auto files = reference_markdown(fake::registry());
  EXPECT_EQ(files.size(), 8u);
  EXPECT_TRUE(files.contains("ahead.md"));
  EXPECT_NE(files.at("attn.md").find("| width | integer in [1, 1000000000] | 4 | width |\n"), std::string::npos) << files.at("attn.md");
  EXPECT_NE(files.at("configuration.md").find("`\\|` cuts pipeline stages"), std::string::npos);
  EXPECT_EQ(files.at("scan.md").find("built-in"), std::string::npos);  // no path of a machine
}

}  // namespace
}  // namespace tessera
