// The other verbs on a tiny run: generate, eval, plan, bench, plugins, describe; usage errors and exit codes.
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

class Commands : public TinyRunTest {
 protected:
  // stdout is exactly one JSON document.
  static json document(const Finished& done) {
    EXPECT_EQ(done.code, 0) << done.err;
    json parsed = json::parse(done.out, nullptr, false);
    EXPECT_FALSE(parsed.is_discarded()) << done.out;
    return parsed;
  }
  void expect_usage(const std::vector<std::string>& words, const std::string& text) const {
    const Finished done = tessera(words);
    EXPECT_EQ(done.code, 2) << fmt::format("{}", fmt::join(words, " "));
    EXPECT_EQ(done.err.substr(0, text.size()), text);
    EXPECT_EQ(done.out, "");
  }
};

TEST_F(Commands, MistakesOfTheCommandLineEndWithTwo) {
  expect_usage({}, "error: A subcommand is required\nhelp: ");
  expect_usage({"trian", "tiny.toml"}, "error: no verb 'trian'\nhelp: did you mean 'train'? ");
  expect_usage({"train"}, "error: CONFIG is required\n");
  expect_usage({"train", "tiny.toml", "--fast"}, "error: The following argument was not expected: --fast\n");
  expect_usage({"train", "none.toml"}, "none.toml: error: ");
  expect_usage({"train", "tiny.toml", "--set", "training.sed=1"}, "--set training.sed=1: error: training.sed: unknown key\nhelp: did you mean 'seed'? ");
  expect_usage({"plan", "tiny.toml", "--mesh", "tq=2"}, "error: --mesh: \"tq=2\" must be AXIS=DEGREE\nhelp: axes: pp, dp_replicate, dp_shard, cp, tp, ep, etp\n");
  expect_usage({"plan", "tiny.toml", "--mesh", "tp=x"}, "error: --mesh: tp must be an integer in [1, 1048576], got \"x\"\n");
  expect_usage({"plan", "tiny.toml", "--mesh", "tp=2,ep=4"}, "error: --mesh: ep x etp = 4 must divide dp_shard x cp x tp = 2\n");
  expect_usage({"describe"}, "error: describe: give a TYPE or --markdown FOLDER\n");
  expect_usage({"describe", "mamba3"}, "error: no block, head or table \"mamba3\"\nhelp: did you mean 'mamba2'? ");
}

TEST_F(Commands, HelpAndVersionEndWithZero) {
  for (const std::vector<std::string>& words : std::vector<std::vector<std::string>>{{"--help"}, {"--version"}, {"train", "--help"}}) {
    const Finished done = tessera(words);
    EXPECT_EQ(done.code, 0);
    EXPECT_NE(done.out, "");
    EXPECT_EQ(done.err, "");
  }
}

TEST_F(Commands, PluginsThatCannotBeLoadedEndWithThree) {
  put_file(folder_ / "bad/broken.so", "no shared object");
  const Finished done = tessera({"plan", "tiny.toml"}, {"plugins.paths=[\"bad\"]"});
  EXPECT_EQ(done.code, 3);
  EXPECT_EQ(done.err.substr(0, 7), "error: ") << done.err;
  EXPECT_NE(done.err.find("bad/broken.so"), std::string::npos) << done.err;
}

TEST_F(Commands, PluginsAndDescribe) {
  const Finished plugins = tessera({"plugins"});
  EXPECT_EQ(plugins.code, 0) << plugins.err;
  for (const char* type : {"gqa", "latent_moe", "mamba2", "mlp", "moe", "mtp"}) {
    EXPECT_NE(plugins.out.find(std::string(type) + " "), std::string::npos) << type;
    EXPECT_NE(plugins.out.find(fmt::format("plugins/{}.so\n", type)), std::string::npos) << type;
  }
  for (const auto& [type, first_line] : {std::pair{"mamba2", "block mamba2, version 1\n"}, {"mtp", "head mtp, version 1\n"}}) {
    const Finished described = tessera({"describe", type});
    EXPECT_EQ(described.code, 0) << described.err;
    EXPECT_EQ(described.out.find(first_line), 0u) << described.out;
  }
  const Finished table = tessera({"describe", "training"});
  EXPECT_EQ(table.code, 0) << table.err;
  EXPECT_NE(table.out.find("local_batch_size"), std::string::npos);
}

TEST_F(Commands, PlanIsOneDocumentAndAllocatesNothing) {
  const json plan = document(tessera({"plan", "tiny.toml", "--json"}));
  EXPECT_EQ(plan.at("pattern"), "M*O/E");
  EXPECT_EQ(plan.at("legend"), (json{{"M", "mamba2"}, {"*", "gqa"}, {"O", "moe"}, {"E", "mlp"}}));
  ASSERT_EQ(plan.at("layers").size(), 3u);
  EXPECT_EQ(plan.at("head_layers").size(), 1u);
  int64_t elements = 0, tensors = 0;
  for (const char* layers : {"layers", "head_layers"})
    for (const json& layer : plan.at(layers)) elements += layer.at("elements").get<int64_t>(), tensors += static_cast<int64_t>(layer.at("params").size());
  // Beside the layers: embedding, lm_head, final norm; eh_proj and three norms of the head.
  EXPECT_EQ(plan.at("totals").at("elements").get<int64_t>(), elements + 2 * 256 * 32 + 32 + 2 * 32 * 32 + 3 * 32);
  EXPECT_TRUE(plan.at("totals").at("tensors").is_number_integer());
  EXPECT_EQ(plan.at("ranks"), 1);
  for (const char* key : {"parameters", "gradients", "optimizer", "compute_copies", "gathered", "activations", "save_copy", "total"}) EXPECT_TRUE(plan.at("memory_per_rank").at(key).is_number()) << key;
  // The copy that a save in the background is written from: what a checkpoint holds.
  const json now = plan.at("memory_per_rank"), later = document(tessera({"plan", "tiny.toml", "--json"}, {"checkpoint.async_mode=async"})).at("memory_per_rank");
  EXPECT_EQ(now.at("save_copy"), 0);
  EXPECT_EQ(later.at("save_copy"), now.at("parameters").get<double>() + now.at("optimizer").get<double>());
  EXPECT_EQ(later.at("total").get<double>(), now.at("total").get<double>() + later.at("save_copy").get<double>());
  EXPECT_EQ(plan.at("flops_per_token").at("mlp").at("matmul"), 4.0 * 32 * 32);
  // A model of terabytes is planned in this process.
  const json huge = document(tessera({"plan", "tiny.toml", "--json"}, {"model.vocab_size=1000000000", "model.hidden_size=1000000", "training.seq_len=16"}));
  EXPECT_GT(huge.at("totals").at("elements").get<int64_t>(), int64_t{2'000'000'000'000'000});
}

TEST_F(Commands, PlanOnAMeshGivesLocalShapesAndSmallerRanks) {
  const json one = document(tessera({"plan", "tiny.toml", "--json"})), two = document(tessera({"plan", "tiny.toml", "--json", "--mesh", "dp_shard=2,tp=2,ep=2"}));
  EXPECT_EQ(two.at("ranks"), 4);
  EXPECT_LT(two.at("memory_per_rank").at("parameters").get<double>(), one.at("memory_per_rank").at("parameters").get<double>());
  EXPECT_EQ(two.at("totals"), one.at("totals"));
  EXPECT_EQ(one.at("sent_per_step").at("bytes"), 0);
  for (const char* axis : {"dp_shard", "tp"}) EXPECT_GT(two.at("sent_per_step").at("by_axis").at(axis).get<int64_t>(), 0) << axis;
  EXPECT_EQ(two.at("pipeline_ranks").size(), 1u);
  for (const json& param : two.at("layers")[1].at("params"))
    if (param.at("name") == "layers.1.q_proj.weight") {
      EXPECT_EQ(param.at("local_shape"), (json{8, 32}));
    }
}

TEST_F(Commands, PlanNamesEveryBrokenRuleOfAMesh) {
  const Finished done = tessera({"plan", "tiny.toml", "--mesh", "tp=3"});
  EXPECT_EQ(done.code, 2);
  EXPECT_EQ(done.out, "");
  EXPECT_NE(done.err.find("blocks.mamba2.num_heads: must be a multiple of the tensor-parallel degree, got 2 % 3 = 2"), std::string::npos) << done.err;
  EXPECT_NE(done.err.find("up_proj.weight: 32 parts of 1 must divide by tp = 3, got 32 % 3 = 2"), std::string::npos) << done.err;
}

TEST_F(Commands, BenchIsOneDocument) {
  const json bench = document(tessera({"bench", "tiny.toml", "--json", "--steps", "1", "--decode-batch", "2", "--decode-context", "8", "--decode-tokens", "4"}));
  EXPECT_GT(bench.at("train").at("tokens_per_s").get<double>(), 0);
  EXPECT_GT(bench.at("decode").at("tokens_per_s").get<double>(), 0);
  EXPECT_GT(bench.at("peak_bytes").get<int64_t>(), 0);
  const json plan = document(tessera({"plan", "tiny.toml", "--json"}));
  EXPECT_EQ(bench.at("params"), plan.at("totals").at("trained"));
  EXPECT_EQ(bench.at("routing"), "natural");
  double seconds = 0, state = 0;
  std::set<std::string> parts;
  for (const json& part : bench.at("parts")) {
    const double forward = part.at("forward_s"), backward = part.at("backward_s");
    EXPECT_GT(forward, 0) << part;
    EXPECT_EQ(backward > 0, part.at("part") != "optimizer" && part.at("part") != "input") << part;
    state += part.at("state_bytes").get<double>();
    if (part.at("part") == "mamba2") {
      EXPECT_GT(part.at("kept_bytes").get<double>(), 0);
      EXPECT_GT(part.at("working_bytes").get<double>(), 0);
    }
    seconds += forward + backward + part.at("recompute_s").get<double>();
    parts.insert(part.at("part"));
  }
  EXPECT_EQ(parts, (std::set<std::string>{"mamba2", "gqa", "moe", "mlp", "mtp", "embedding", "lm_head", "optimizer", "input"}));
  const double four = 16.0 * bench.at("params").get<double>();  // fp32: the master, its gradient and two moments, each tensor aligned
  EXPECT_GE(state, four);
  EXPECT_LE(state, 1.01 * four);
  EXPECT_NEAR(seconds / bench.at("train").at("step_s").get<double>(), 1, 0.5);
}

// A layer that is computed again leaves what the next one begins with, and no more.
TEST_F(Commands, BenchCountsWhatALayerKeeps) {
  const auto kept = [&](const std::string& mode) {
    const json bench = document(tessera({"bench", "tiny.toml", "--json", "--steps", "1", "--decode-tokens", "0", "--no-peaks", "--no-check", "--set", "activation_checkpoint.mode=" + mode}));
    for (const json& part : bench.at("parts"))
      if (part.at("part") == "mamba2") return part.at("kept_bytes").get<double>() / part.at("layers").get<double>();
    return 0.0;
  };
  const double none = kept("none"), full = kept("full");
  EXPECT_GT(none, 4 * full);
  EXPECT_GT(full, 0);
}

// What is needed to time steps is there; what is not is said.
TEST_F(Commands, BenchSaysWhyInputWasNotMeasured) {
  const json bench = document(tessera({"bench", "tiny.toml", "--json", "--steps", "1", "--decode-tokens", "0", "--no-peaks", "--set", "data.path=nowhere/*.txt"}));
  EXPECT_NE(bench.at("no_input").get<std::string>().find("nowhere/*.txt"), std::string::npos) << bench;
  for (const json& part : bench.at("parts")) EXPECT_NE(part.at("part"), "input");
}

TEST_F(Commands, BenchTakesTurnsAndComparesWhatItMeasured) {
  const std::vector<std::string> fast{"--steps", "3", "--decode-tokens", "2"};
  const auto bench = [&](std::vector<std::string> words) {
    words.insert(words.begin(), "bench"), words.insert(words.end(), fast.begin(), fast.end());
    return tessera(words);
  };
  put_file(folder_ / "more.toml", file_text(folder_ / "tiny.toml"));
  const json both = document(bench({"tiny.toml", "more.toml", "--json", "--contexts", "4,32", "--routing", "balanced"}));
  ASSERT_EQ(both.at("results").size(), 2u);
  for (const json& result : both.at("results")) {
    EXPECT_EQ(result.at("train").at("samples_s").size(), 3u);
    EXPECT_LE(result.at("train").at("quartiles_s")[0], result.at("train").at("quartiles_s")[1]);
    ASSERT_EQ(result.at("contexts").size(), 2u);
    EXPECT_EQ(result.at("contexts")[1].at("context"), 32);
    EXPECT_GT(result.at("contexts")[1].at("state_bytes"), result.at("contexts")[0].at("state_bytes"));
    EXPECT_TRUE(result.at("unchecked").empty());
    EXPECT_EQ(result.at("routing"), "balanced");
  }
  // What compare.py of Google Benchmark reads.
  ASSERT_EQ(both.at("benchmarks").size(), 8u);
  for (const json& row : both.at("benchmarks"))
    for (const char* key : {"name", "run_type", "real_time", "cpu_time", "time_unit"}) EXPECT_TRUE(row.contains(key)) << key;
  EXPECT_TRUE(both.contains("context"));

  EXPECT_NE(bench({"tiny.toml"}).out.find(" on cpu, natural routing; "), std::string::npos);
  EXPECT_EQ(bench({"tiny.toml", "--routing", "even"}).code, 2);

  put_file(folder_ / "a.json", bench({"tiny.toml", "--json"}).out);
  const json same = document(tessera({"bench", "--compare", "a.json", "a.json", "--json"}));
  EXPECT_EQ(same.at(0).at("ratio"), 1.0);
  EXPECT_EQ(same.at(0).at("p"), 1.0);
  EXPECT_EQ(same.at(0).at("verdict"), "no difference beyond noise");
  const Finished none = tessera({"bench", "--compare", "a.json", "tiny.toml"});
  EXPECT_NE(none.code, 0);
  EXPECT_NE(none.err.find("tiny.toml"), std::string::npos) << none.err;
}

// A figure of a wrong result is worth nothing.
TEST_F(Commands, BenchRefusesABlockThatComputesSomethingElse) {
  const std::vector<std::string> sets{"--set", "model.hybrid_override_pattern=MX", "--set", "symbols.X=rounds", "--set", "blocks.rounds.width=16", "--set", "training.dtype=float32"};
  std::vector<std::string> words{"bench", "tiny.toml", "--steps", "1", "--decode-tokens", "0"};
  words.insert(words.end(), sets.begin(), sets.end());
  const auto with_blocks = [] { setenv("TESSERA_PLUGIN_PATH", TESSERA_BINARY_DIR "/broken_blocks", 1); };
  const Finished refused = run_tessera(folder_, words, with_blocks);
  EXPECT_EQ(refused.code, 1) << refused.err;
  EXPECT_NE(refused.err.find("error: rounds computes something else in float32 on cpu than in fp64: its output differs by "), std::string::npos) << refused.err;
  words.emplace_back("--no-check");
  EXPECT_EQ(run_tessera(folder_, words, with_blocks).code, 0);
}

class OnARun : public Commands {
 protected:
  void SetUp() override {
    Commands::SetUp();
    const Finished done = train("run");
    ASSERT_EQ(done.code, 0) << done.err;
  }
};

TEST_F(OnARun, EvalIsTheValidationLossOfTheRun) {
  const json eval = document(tessera({"eval", "run", "--json"}));
  EXPECT_EQ(eval.at("step"), 6);
  EXPECT_EQ(eval.at("checkpoint"), "run/checkpoints/step-6");
  EXPECT_EQ(eval.at("loss"), metrics("run").back().at("val_loss"));
  EXPECT_DOUBLE_EQ(eval.at("perplexity").get<double>(), std::exp(eval.at("loss").get<double>()));
  int64_t targets = 0;
  double sum = 0;
  for (const json& bin : eval.at("by_position")) targets += bin.at("targets").get<int64_t>(), sum += bin.at("targets").get<double>() * bin.at("loss").get<double>();
  EXPECT_EQ(eval.at("targets"), targets);
  EXPECT_NEAR(sum / static_cast<double>(targets), eval.at("loss").get<double>(), 1e-9);
  const Finished text = tessera({"eval", "run/checkpoints/step-6"});
  EXPECT_EQ(text.code, 0) << text.err;
  EXPECT_EQ(text.out.find(fmt::format("run/checkpoints/step-6: step 6\nloss {:.4f} nats", eval.at("loss").get<double>())), 0u) << text.out;
  EXPECT_NE(document(tessera({"eval", "run", "--json", "--tokens", "64"})).at("targets"), targets);
}

TEST_F(OnARun, GenerateContinuesTextAndIds) {
  const Finished text = tessera({"generate", "run", "--prompt", "ab", "--max-new-tokens", "7"});
  EXPECT_EQ(text.code, 0) << text.err;
  ASSERT_EQ(text.out.size(), 2u + 7 + 1);
  EXPECT_EQ(text.out.substr(0, 2), "ab");
  const Finished ids = tessera({"generate", "run", "--prompt-ids", "97,98", "--max-new-tokens", "7"});
  EXPECT_EQ(ids.code, 0) << ids.err;
  std::string listed;
  for (size_t i = 2; i + 1 < text.out.size(); ++i) listed += fmt::format("{}{}", i > 2 ? "," : "", static_cast<unsigned char>(text.out[i]));
  EXPECT_EQ(ids.out, listed + "\n");
  const std::vector<std::string> sampled{"generate", "run", "--prompt-ids", "97,98", "--temperature", "2", "--top-p", "0.9", "--max-new-tokens", "12", "--seed"};
  const auto with_seed = [&](const char* seed) {
    auto words = sampled;
    words.push_back(seed);
    return tessera(words).out;
  };
  EXPECT_EQ(with_seed("1"), with_seed("1"));
  EXPECT_NE(with_seed("1"), with_seed("2"));
}

TEST_F(OnARun, GenerateRefusesWhatItCannotRead) {
  expect_usage({"generate", "run"}, "error: generate: give either --prompt or --prompt-ids\n");
  expect_usage({"generate", "run", "--prompt", "a", "--prompt-ids", "1"}, "error: generate: give either --prompt or --prompt-ids\n");
  expect_usage({"generate", "run", "--prompt-ids", "1,x"}, "error: --prompt-ids: must be integers separated by commas, got \"x\"\n");
  expect_usage({"generate", "run", "--prompt-ids", ""}, "error: --prompt-ids: must be integers separated by commas, got \"\"\n");
  expect_usage({"generate", "run", "--prompt-ids", "1,256"}, "error: prompt 0: token id 256 is outside the vocabulary of 256\n");
  expect_usage({"generate", "run", "--prompt", "a", "--top-p", "1.5"}, "error: --top-p: ");
  const Finished none = tessera({"generate", "nowhere", "--prompt", "a"});
  EXPECT_EQ(none.code, 4);
  EXPECT_EQ(none.err, "error: nowhere: no such folder\nhelp: name a run's folder or one of its checkpoints/step-N\n");
}

TEST_F(OnARun, TextNeedsAByteVocabulary) {
  ASSERT_EQ(train("wide", {"model.vocab_size=300", "training.steps=2"}).code, 0);
  expect_usage({"generate", "wide", "--prompt", "a"},
               "error: --prompt: text needs a byte vocabulary of 256 ids, this model has 300\nhelp: give token ids by --prompt-ids 1,2,3\n");
  EXPECT_EQ(tessera({"generate", "wide", "--prompt-ids", "299", "--max-new-tokens", "1"}).code, 0);
}

TEST_F(OnARun, SetReachesTheCheckpointsConfiguration) {
  const Finished wrong = tessera({"eval", "run"}, {"training.dtype=float31"});
  EXPECT_EQ(wrong.code, 2);
  EXPECT_NE(wrong.err.find("training.dtype"), std::string::npos) << wrong.err;
  const json half = document(tessera({"eval", "run", "--json"}, {"training.dtype=bfloat16"}));
  EXPECT_NE(half.at("loss"), metrics("run").back().at("val_loss"));
  EXPECT_NEAR(half.at("loss").get<double>(), metrics("run").back().at("val_loss").get<double>(), 0.05);
}

TEST_F(OnARun, InspectTellsOfTensorsAndLayers) {
  const json alone = document(tessera({"inspect", "run", "--json"}));
  const json plan = document(tessera({"plan", "tiny.toml", "--json"}));
  EXPECT_TRUE(alone.at("layers").empty());
  std::map<std::string, json> tensors;
  for (const json& tensor : alone.at("tensors")) tensors[tensor.at("name")] = tensor;
  for (const char* name : {"embedding.weight", "layers.0.A_log", "layers.2.gate.weight", "final_norm.weight"}) ASSERT_TRUE(tensors.contains(name)) << name;
  EXPECT_EQ(tensors["embedding.weight"].at("shape"), (json{256, 32}));
  EXPECT_NEAR(tensors["final_norm.weight"].at("mean").get<double>(), 1, 0.2);
  EXPECT_EQ(tensors["final_norm.weight"].at("not_finite"), 0);

  const std::string text = "3 times 4 is 12";
  const json read = document(tessera({"inspect", "run", "--json", "--prompt", text}));
  ASSERT_EQ(read.at("layers").size(), 3u);
  EXPECT_EQ(read.at("layers")[2].at("layer"), "layers.2 (moe)");
  double load = 0;
  for (const json& count : read.at("layers")[2].at("counts").at("expert_load")) load += count.get<double>();
  EXPECT_EQ(load, 2.0 * static_cast<double>(text.size())) << "every token goes to two experts";
  for (const json& layer : read.at("layers")) {
    EXPECT_GT(layer.at("residual_rms"), 0);
    for (const auto& [name, rms] : layer.at("state_rms").items()) EXPECT_GT(rms, 0) << name;
  }
  EXPECT_FALSE(read.at("layers")[1].at("state_rms").empty());
  EXPECT_TRUE(read.at("layers")[0].at("observed").empty());
  const json entropy = read.at("layers")[1].at("observed").at("attention_entropy");
  double most = 0;  // where every token looks at all before it alike
  for (size_t i = 1; i <= text.size(); ++i) most += std::log(static_cast<double>(i)) / static_cast<double>(text.size());
  ASSERT_EQ(entropy.size(), 2u) << "a number for each query head";
  for (const json& head : entropy) {
    EXPECT_GT(head.get<double>(), 0.5 * most) << "a model that is hardly trained looks everywhere";
    EXPECT_LT(head.get<double>(), most);
  }
  EXPECT_NE(tessera({"inspect", "run", "--prompt", text}).out.find("expert_load ["), std::string::npos);
  EXPECT_NE(tessera({"inspect", "run", "--prompt", text}).out.find("attention_entropy ["), std::string::npos);
  EXPECT_EQ(tessera({"inspect", "run", "--prompt", ""}).code, 2);
  EXPECT_EQ(tessera({"inspect", "run", "--prompt-ids", "1,300"}).code, 2);
  EXPECT_EQ(tessera({"inspect", "none"}).code, 4);
}

}  // namespace
}  // namespace tessera
