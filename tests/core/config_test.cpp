#include "config/config.hpp"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include <gtest/gtest.h>

#include "tests/core/fake_blocks.hpp"

namespace tessera {
namespace {
namespace fs = std::filesystem;

const Registry& registry() {
  static const Registry r = fake::registry();
  return r;
}

const std::string kBase = R"([model]
hybrid_override_pattern = "MM*E"
hidden_size = 64
[blocks.scan]
num_heads = 8
)";

Config parse(const std::string& toml, const std::vector<std::string>& sets = {}) { return parse_config(toml, "test.toml", sets, registry()); }

std::string error_of(const std::string& toml, const std::vector<std::string>& sets = {}, const std::string& name = "test.toml") {
  try {
    parse_config(toml, name, sets, registry());
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage) << error.what();
    return error.what();
  }
  return "no error";
}

std::string read(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

std::vector<fs::path> bad_configs() {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(fs::path(TESSERA_SOURCE_DIR) / "tests/bad_configs"))
    if (entry.path().extension() == ".toml") files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  return files;
}

// tests/bad_configs/NAME.toml fails with the text of NAME.txt. Lines `# --set a.b=c` at its top are applied to it.
class BadConfig : public testing::TestWithParam<fs::path> {};
TEST_P(BadConfig, SaysExactlyThis) {
  const std::string toml = read(GetParam());
  std::vector<std::string> sets;
  std::istringstream lines(toml);
  for (std::string line; std::getline(lines, line) && line.starts_with("# --set");) sets.push_back(line.size() > 8 ? line.substr(8) : "");
  const std::string error = error_of(toml, sets, GetParam().filename().string()) + "\n";
  fs::path expected = GetParam();
  expected.replace_extension(".txt");
  if (std::getenv("TESSERA_WRITE_EXPECTED")) std::ofstream(expected) << error;
  EXPECT_NE(error, "no error\n");
  EXPECT_EQ(error, read(expected));
}
INSTANTIATE_TEST_SUITE_P(All, BadConfig, testing::ValuesIn(bad_configs()), [](const auto& info) { return info.param.stem().string(); });
TEST(BadConfigs, AreThere) { EXPECT_GE(bad_configs().size(), 50u); }

TEST(Config, DefaultsAndBindings) {
  const Config c = parse(kBase);
  EXPECT_EQ(c.run.name, "test");
  EXPECT_EQ(c.run.folder, "runs/test");
  ASSERT_EQ(c.bindings.size(), 3u);
  EXPECT_EQ(c.bindings[0].symbol, 'M');
  EXPECT_EQ(c.bindings[0].name, "scan");
  EXPECT_EQ(c.binding('*').type->type(), "attn");
  EXPECT_EQ(c.binding('E').type->type(), "dense");
  EXPECT_FALSE(c.head);
  EXPECT_EQ(c.pattern.main.size(), 4u);
  const Env env = make_env(c, {.tp = 2});
  EXPECT_EQ(env.hidden_size, 64);
  EXPECT_EQ(env.num_layers, 4);
  EXPECT_EQ(env.mesh.tp, 2);
  EXPECT_THROW(c.binding('Q'), Error);
}

TEST(Config, SymbolsOverrideTheDialect) {
  const Config c = parse(R"([model]
hybrid_override_pattern = "MWMV|E/WE"
hidden_size = 64
[symbols]
W = "wide"
V = { block = "wide", shared = true }
E = "attn"
[blocks.scan]
num_heads = 8
[blocks.wide]
type = "scan"
num_heads = 16
)");
  ASSERT_EQ(c.bindings.size(), 4u);
  EXPECT_EQ(c.binding('W').name, "wide");
  EXPECT_EQ(c.binding('W').type->type(), "scan");
  EXPECT_EQ(c.binding('W').config, c.binding('V').config);
  EXPECT_NE(c.binding('W').config, c.binding('M').config);
  EXPECT_FALSE(c.binding('W').shared);
  EXPECT_TRUE(c.binding('V').shared);
  EXPECT_EQ(c.binding('E').type->type(), "attn");
  ASSERT_TRUE(c.head);
  EXPECT_EQ(c.head->name, "ahead");
  EXPECT_EQ(c.pattern.num_stages, 2);
}

TEST(Config, ALetterOfTwoTypesIsSettledByTheTables) {
  const std::string nemotron = "[model]\nhybrid_override_pattern = \"EE\"\nhidden_size = 64\ndialect = \"nemotron\"\n";
  EXPECT_EQ(parse(nemotron).binding('E').name, "experts");
  EXPECT_EQ(parse(nemotron + "[blocks.latent_experts]\n").binding('E').name, "latent_experts");
  EXPECT_EQ(parse(nemotron + "[blocks.experts]\n").binding('E').name, "experts");
  EXPECT_EQ(parse(nemotron + "[blocks.experts]\n[blocks.latent_experts]\n[symbols]\nE = \"latent_experts\"\n").binding('E').name, "latent_experts");
}

TEST(Config, SeveralHeadsAreSettledByTheTables) {
  const Registry two = fake::registry_of<fake::Small<0>, fake::SmallHead<0>, fake::SmallHead<1>>();
  const std::string toml = "[model]\nhybrid_override_pattern = \"*/*\"\nhidden_size = 64\n";
  EXPECT_EQ(parse_config(toml + "[heads.other]\ndepths = 3\n", "test.toml", {}, two).head->name, "other");
  try {
    parse_config(toml, "test.toml", {}, two);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "test.toml:2:27: error: model.hybrid_override_pattern: the '/' part may mean several heads\n"
                               "help: add the table of one: [heads.ahead]; loaded types: ahead, other");
  }
  const Registry none = fake::registry_of<fake::Small<0>>();
  try {
    parse_config(toml, "test.toml", {}, none);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "test.toml:2:27: error: model.hybrid_override_pattern: the '/' part needs a head, and no head type is loaded");
  }
}

TEST(Config, WhatThePatternDoesNotUseIsLegal) {
  const Config c = parse(kBase + "[blocks.experts]\nwidth = 3\n[blocks.spare]\ntype = \"scan\"\n[heads.ahead]\n[symbols]\nQ = \"spare\"\n");
  EXPECT_EQ(c.bindings.size(), 3u);
  EXPECT_FALSE(c.head);
}

TEST(Config, IntegersAreTakenWhereNumbersAreWanted) {
  const Config c = parse(kBase + "limit = [0, 3]\n[optimizer]\nlr = 1\n");
  EXPECT_EQ(c.optimizer.lr, 1.0);
  EXPECT_EQ(std::get<std::vector<double>>(registry().block("scan")->fields().find("limit")->get(c.binding('M').config.get())), (std::vector<double>{0, 3}));
}

TEST(Config, Sets) {
  const Config c = parse(kBase, {"training.steps=7", " training.steps = 8 ", "model.hybrid_override_pattern=M-*E", "symbols.-=scan", "symbols.\"*\"=experts",
                                 "training.freeze=[\"embedding\", \"layers.3.\"]", "run.name=\"a=b\"", "data.path=/é/b-*.bin", "blocks.scan.limit=[0, inf]",
                                 "symbols.E={ block = \"attn\", shared = true }", "symbols.E.shared=false", "optimizer.lr=1e-4"});
  EXPECT_EQ(c.training.steps, 8);
  EXPECT_EQ(c.pattern.main.size(), 4u);
  EXPECT_EQ(c.binding('-').name, "scan");
  EXPECT_EQ(c.binding('*').name, "experts");
  EXPECT_EQ(c.binding('E').name, "attn");
  EXPECT_FALSE(c.binding('E').shared);
  EXPECT_EQ(c.training.freeze, (std::vector<std::string>{"embedding", "layers.3."}));
  EXPECT_EQ(c.run.name, "a=b");
  EXPECT_EQ(c.run.folder, "runs/a=b");
  EXPECT_EQ(c.data.path, "/é/b-*.bin");
  EXPECT_EQ(c.optimizer.lr, 1e-4);
  // A table is put over the table that is there, key by key.
  const Config merged = parse(kBase + "[training]\nsteps = 7\nseq_len = 9\n", {"training={ steps = 8, seed = 3 }"});
  EXPECT_EQ(merged.training.steps, 8);
  EXPECT_EQ(merged.training.seed, 3);
  EXPECT_EQ(merged.training.seq_len, 9);
}

// One set more than a default, so that every key is seen to travel.
TEST(Config, TheResolvedConfigurationReproducesItself) {
  const std::string full = R"([run]
name = "x \"y\"\n"
[model]
hybrid_override_pattern = "MW*|E/W*"
hidden_size = 64
init_std = 0.1
tie_embeddings = true
[symbols]
W = { block = "wide one", shared = true }
[blocks.scan]
num_heads = 8
limit = [0.1, inf]
[blocks."wide one"]
type = "scan"
num_heads = 12
norm = "layer"
[heads.far]
type = "ahead"
loss_scale = 0.30000000000000004
[training]
freeze = ["embedding"]
seed = 9223372036854775807
[lr_scheduler]
decay_type = "linear"
min_lr_factor = 0.01
[activation_checkpoint]
mode = "selective"
block_types = ["wide one"]
[data]
source = "mixture"
[[data.mixture]]
source = "random"
document_len = 9
[[data.mixture]]
path = "p"
weight = 2
[checkpoint]
initial_load_path = "ckpt"
initial_load_map = ["a=b"]
)";
  for (const std::string& toml : {kBase, full}) {
    const Config c = parse(toml);
    const std::string resolved = to_toml(c);
    EXPECT_EQ(to_toml(parse(resolved)), resolved);
  }
  const std::string resolved = to_toml(parse(full));
  for (const char* line : {"name = \"x \\\"y\\\"\\n\"", "limit = [0.1, inf]", "W = { block = \"wide one\", shared = true }", "[blocks.\"wide one\"]", "type = \"ahead\"",
                           "loss_scale = 0.30000000000000004", "seed = 9223372036854775807", "block_types = [\"wide one\"]", "[[data.mixture]]", "weight = 2.0"})
    EXPECT_NE(resolved.find(std::string("\n") + line + "\n"), std::string::npos) << line;
  EXPECT_EQ(to_toml(parse(kBase)).find("[data]"), std::string::npos);
  EXPECT_EQ(to_toml(parse(kBase)).find("min_lr_factor"), std::string::npos);
}

// Each field of the core: its default is legal unless required, and what lies outside its range is refused.
TEST(Config, CoreTablesAreConsistent) {
  for (const ConfigTable& table : config_tables()) {
    Config config;
    for (const Field& field : table.fields.list) {
      EXPECT_FALSE(field.doc.empty()) << table.name << "." << field.key;
      EXPECT_TRUE(same_value(field.get(table.of(config)), field.default_value)) << table.name << "." << field.key;
      if (!field.required_) {
        EXPECT_EQ(broken_rule(field, field.default_value), "") << table.name << "." << field.key;
      }
    }
  }
}

TEST(Config, InMemoryConfigurationsAreCheckedToo) {
  Config c = parse(kBase);
  c.model.hidden_size = 0;
  c.training.steps = 0;
  c.model.hybrid_override_pattern = "M||M";
  Issues issues;
  check_config(c, {}, issues);
  std::vector<std::string> told;
  for (const Issue& issue : issues.list()) told.push_back(issue.key + ": " + issue.rule);
  EXPECT_EQ(told, (std::vector<std::string>{"model.hidden_size: required key is missing", "training.steps: must be in [1, 1000000000], got 0",
                                            "model.hybrid_override_pattern: empty stage at position 2\n  M||M\n    ^"}));
  Issues none;
  check_config(parse(kBase), {}, none);
  EXPECT_TRUE(none.empty());
}

TEST(Config, WhatABlockThrowsNamesIt) {
  try {
    parse(kBase + "[blocks.attn]\nwidth = 13\n");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kPlugin);
    EXPECT_STREQ(error.what(), "error: blocks.attn: block type 'attn' failed in check: thirteen");
  }
}

TEST(Config, Mesh) {
  ParallelismConfig p;
  EXPECT_EQ(make_mesh(p).size(), 1);
  EXPECT_EQ(make_mesh(p, 8).dp_shard, 8);
  p.tensor_parallel_degree = 2;
  p.expert_parallel_degree = 8;
  EXPECT_EQ(make_mesh(p).dp_shard, 4);
  EXPECT_EQ(make_mesh(p, 8).dp_shard, 4);
  for (const auto& [shard, world] : std::vector<std::pair<int64_t, int64_t>>{{-1, 7}, {2, 8}, {-1, 1}}) {
    p.data_parallel_shard_degree = shard;
    EXPECT_THROW(make_mesh(p, world), Error) << shard << " " << world;
  }
  p = {1 << 20, -1, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20};
  EXPECT_THROW(make_mesh(p, 8), Error);
  p = {};
  try {
    p.tensor_parallel_degree = 3;
    make_mesh(p, 8);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "error: the degrees of [parallelism] must make the number of ranks, got pp 1 x dp_replicate 1 x dp_shard 2 x cp 1 x tp 3 = 6 for 8 ranks\n"
                               "help: start that many ranks, or set parallelism.data_parallel_shard_degree = -1 for the ranks that are left");
  }
}

TEST(Config, Files) {
  const fs::path folder = fs::path(testing::TempDir()) / "tessera_config";
  fs::create_directories(folder);
  const fs::path file = folder / "nano.toml";
  std::ofstream(file) << kBase << "[plugins]\npaths = [\"a\", \"b\"]\n";
  EXPECT_EQ(plugin_paths(file, {}), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(plugin_paths(file, {"plugins.paths=[\"c\"]", "nonsense"}), std::vector<std::string>{"c"});
  EXPECT_EQ(load_config(file, {}, registry()).run.name, "nano");
  const auto text = [&](const fs::path& path) {
    try {
      plugin_paths(path, {});
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(text(folder), folder.string() + ": error: is a folder, not a configuration file");
  EXPECT_EQ(text(folder / "none.toml"), (folder / "none.toml").string() + ": error: the configuration file cannot be opened");
  EXPECT_EQ(text("/dev/zero"), "/dev/zero: error: is a device or pipe, not a configuration file");
  std::ofstream(file) << std::string((1 << 20) + 1, '\n');
  EXPECT_EQ(text(file), file.string() + ":1:1: error: the file has more than 1048576 bytes: this is no configuration");
  fs::remove_all(folder);
}

// Nothing here may crash, hang or throw anything but Error.
TEST(Config, HostileTexts) {
  const auto repeat = [](const std::string& text, int n) {
    std::string out;
    for (int i = 0; i < n; ++i) out += text;
    return out;
  };
  EXPECT_EQ(parse(kBase + "[run]\nname = '''a''b''''\n").run.name, "a''b'");
  EXPECT_EQ(parse(kBase + "[run]\nname = \"" + std::string(1000, '.') + "\"\n").run.name, std::string(1000, '.'));
  std::string dots = repeat("a.", 100000) + "a = 1\n", headers = "[" + repeat("a.", 100000) + "a]\n";
  const std::vector<std::string> texts{
      dots, headers, "a = " + repeat("[", 100000), "a = " + repeat("{a=", 100000), "a = " + repeat("[", 100) + repeat("]", 100),
      "a = " + repeat("[{a.a.a.a.a.a.a.a = ", 10) + "1" + repeat("}]", 10), std::string("a = 1\0b = 2", 11), "\xff\xfe\x00", "a = \"\xc3\x28\"", "\xef\xbb\xbf" + kBase + "x",
      "a = \"", "a = '''", "a = \"\\u", "a.", "a. = 1", "[", "[[", "[]", "= 1", "\"", "a", "a =", "a = 99999999999999999999", "a = 1e999", "a = 0x", "[|]", "[a.|]", "a.| = 1", "{", "é = 1", "a = é", "a é = 1", "a = 1 é", "\"\"\"\"\"\" = \"\"\"", "a = 1979-13-40",
      kBase + "[blocks." + std::string(5000, 'x') + "]\n", kBase + "[symbols]\n\"\\u0000\" = \"scan\"\n", "[model]\nhybrid_override_pattern = \"" + std::string(500000, '|') + "\"\nhidden_size = 1\n",
      "[model]\nhybrid_override_pattern = \"" + std::string(500000, 'X') + "\"\nhidden_size = 1\n", "[model]\nhidden_size = 9223372036854775807\n",
      kBase + "[training]\nlocal_batch_size = 1000000000\nglobal_batch_size = 999999999\n[parallelism]\ndata_parallel_replicate_degree = 1048576\ndata_parallel_shard_degree = 1048576\n"};
  for (const std::string& text : texts) {
    const std::string error = error_of(text);
    EXPECT_NE(error, "no error") << shorten(text);
    EXPECT_LT(error.size(), 4000u) << shorten(text);
  }
  const std::vector<std::string> sets{"", "=", "==", ".", "a", "a=", ".=1", "a..b=1", "a.=1", ".a=1", "\"=1", "'a'b=1", "a=1\nb=2", "training.steps=1\n[model]\nhidden_size=3",
                                      "model=1", "a=[", "a={", "a=\"", std::string(100000, 'a') + "=1", "a=" + std::string(2000000, '.'), repeat("a.", 100000) + "a=1",
                                      std::string("a=\0", 3), "\xff=\xff", "model.hidden_size=\xff", "symbols=1", "blocks=[]", "blocks.scan=1", "data.mixture=[1]"};
  for (const std::string& set : sets) {
    const std::string error = error_of(kBase, {set});
    EXPECT_NE(error, "no error") << shorten(set);
    EXPECT_LT(error.size(), 4000u) << shorten(set);
  }
}

}  // namespace
}  // namespace tessera
