// Import and export of Hugging Face configurations and checkpoints.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>

#include "checkpoint/checkpoint.hpp"
#include "hf/convert.hpp"
#include "hf/hf_config.hpp"
#include "hf/hf_json.hpp"
#include "hf/hf_names.hpp"
#include "tests/support/compare.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const fs::path kGolden = fs::path(TESSERA_SOURCE_DIR) / "tests/golden";

testing::AssertionResult has(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "\n" << part << "\n  is not in\n" << text;
}
testing::AssertionResult has(const std::vector<std::string>& lines, const std::string& part) { return has(fmt::format("{}\n", fmt::join(lines, "\n")), part); }

const Registry& registry() {
  static const Registry loaded = Registry::load({fs::path(TESSERA_BINARY_DIR) / "plugins"});
  return loaded;
}

class HfTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / fmt::format("tessera_hf_{}_{}", getpid(), testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  // A copy of a golden folder whose config.json is edited.
  fs::path edited(const std::string& name, const std::function<void(json&)>& edit) {
    const fs::path to = folder_ / (name + "_edited");
    fs::remove_all(to);
    fs::create_directories(to);
    fs::copy_file(kGolden / name / "model.safetensors", to / "model.safetensors");
    json config = read_hf_json(kGolden / name / "config.json");
    edit(config);
    write_file(to / "config.json", hf_json_text(config));
    return to;
  }

  // What importing the edited config.json says, with the file's path cut to its name.
  std::string import_error(const std::string& name, const std::function<void(json&)>& edit, const std::vector<std::string>& waived = {}) {
    const fs::path file = edited(name, edit) / "config.json";
    std::vector<std::string> notes;
    try {
      import_hf_config(file, registry(), waived, notes);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
      return replaced(error.what(), file.string());
    }
    return "imported";
  }

  static std::string replaced(std::string text, const std::string& path) {
    for (size_t at; (at = text.find(path)) != std::string::npos;) text.replace(at, path.size(), "config.json");
    return text;
  }

  template <class F>
  static std::string error_of(F run) {
    try {
      run();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }

  fs::path folder_;
};

Config import(const fs::path& folder, std::vector<std::string>* notes = nullptr) {
  std::vector<std::string> own;
  return import_hf_config(folder / "config.json", registry(), {}, notes ? *notes : own);
}

TEST(HfJson, BareInfinitiesAreNumbersOutsideStringsAlone) {
  const json j = parse_hf_json(R"({"a": [0.0, Infinity], "b": -Infinity, "c": "Infinity \" NaN", "d": NaN, "e": {"__float__": "Infinity"}})", "x");
  EXPECT_EQ(hf_number(j["a"][1]), INFINITY);
  EXPECT_EQ(hf_number(j["b"]), -INFINITY);
  EXPECT_EQ(j["c"], "Infinity \" NaN");
  EXPECT_TRUE(std::isnan(*hf_number(j["d"])));
  EXPECT_EQ(hf_number(j["e"]), INFINITY);
  EXPECT_EQ(hf_number(j["c"]), std::nullopt);
  EXPECT_EQ(parse_hf_json(hf_json_text(j), "y"), j);
}

TEST(HfJson, BrokenTextIsAnError) {
  for (const char* text : {"{\"a\": Infinityx}", "{\"a\": 1", "[1]", "{\"a\": 1, \"a\": 2}", "", "Infinity", "{\"a\": xInfinity}"})
    EXPECT_THROW(parse_hf_json(text, "x"), Error) << text;
}

TEST(HfJson, KeysHavePlaces) {
  const auto places = hf_key_places("{\n  \"a\": {\"b\": 1},\n  \"c\": \"d\\\"\", \"e\" : 2}", "f");
  EXPECT_EQ(places, (std::map<std::string, std::string>{{"a", "f:2:3"}, {"c", "f:3:3"}, {"e", "f:3:15"}}));
}

TEST(HfImport, ReadsEverySpellingOfAPattern) {
  const std::pair<const char*, const char*> cases[] = {{"dense", "M-M*-"}, {"moe", "ME*EM"}, {"latent", "MEM*E"}, {"mtp", "M*E/*E"}, {"groups", "E*ME"}, {"packed", "M*EM-"}};
  for (const auto& [name, pattern] : cases) EXPECT_EQ(import(kGolden / name).model.hybrid_override_pattern, pattern) << name;
}

TEST(HfImport, ALetterOfTwoTypesIsToldApartByAKey) {
  EXPECT_EQ(import(kGolden / "moe").binding('E').type->type(), "moe");
  const Config latent = import(kGolden / "latent");
  EXPECT_EQ(latent.binding('E').type->type(), "latent_moe");
  const Field* field = latent.binding('E').type->fields().find("router_input");
  EXPECT_EQ(std::get<std::string>(field->get(latent.binding('E').config.get())), "hidden");
}

TEST(HfImport, SaysWhatTheFileDoesNot) {
  std::vector<std::string> notes;
  const Config config = import(kGolden / "mtp", &notes);
  ASSERT_TRUE(config.head);
  EXPECT_TRUE(has(notes, "not in the file, chosen here: heads.mtp: depths = 1, repeated = true, loss_scale = 0.3"));
  EXPECT_TRUE(has(notes, "not in the file, chosen here: blocks.moe: aux_loss_coeff = 0.0, z_loss_coeff = 0.0, bias_update_rate = 0.001"));
  EXPECT_TRUE(has(notes, "kept, without effect: chunk_size, expand, "));
}

TEST(HfImport, TheResolvedConfigurationReadsBack) {
  for (const char* name : {"dense", "moe", "latent", "mtp", "groups", "packed"}) {
    const std::string text = to_toml(import(kGolden / name));
    EXPECT_EQ(to_toml(parse_config(text, "again.toml", {}, registry())), text) << name;
  }
}

TEST_F(HfTest, MistakesAreNamedWithTheirPlace) {
  struct Case {
    const char* name;
    std::function<void(json&)> edit;
    const char* message;
  };
  const Case cases[] = {
      {"dense", [](json& j) { j["model_type"] = "llama"; }, "config.json:28:3: error: model_type: only \"nemotron_h\" is supported, got \"llama\""},
      {"dense", [](json& j) { j["mlp_hidden_act"] = "silu"; }, "config.json:27:3: error: mlp_hidden_act: only \"relu2\" is supported, got \"silu\""},
      {"dense", [](json& j) { j["mamba_hidden_act"] = "gelu"; }, "config.json:21:3: error: mamba_hidden_act: only \"silu\" is supported, got \"gelu\""},
      {"dense", [](json& j) { j["attention_bias"] = true; }, "config.json:5:3: error: attention_bias: only false is supported, got true"},
      {"dense", [](json& j) { j["attention_dropout"] = 0.1; }, "config.json:6:3: error: attention_dropout: only 0.0 is supported, got 0.1"},
      {"dense", [](json& j) { j["hidden_dropout"] = 0.1; }, "config.json:14:3: error: hidden_dropout: only 0.0 is supported, got 0.1"},
      {"dense", [](json& j) { j["sliding_window"] = 4096; }, "config.json:48:3: error: sliding_window: only 0 is supported, got 4096"},
      {"moe", [](json& j) { j["n_shared_experts"] = 2; }, "config.json:36:3: error: n_shared_experts: only 1 is supported, got 2"},
      {"dense", [](json& j) { j["num_hidden_layers"] = 7; }, "config.json:40:3: error: num_hidden_layers: must equal the number of layers of hybrid_override_pattern, 5, got 7"},
      {"dense", [](json& j) { j.erase("head_dim"); }, "config.json:1:1: error: head_dim: is missing: blocks.gqa.head_dim has no default"},
      {"dense", [](json& j) { j["head_dim"] = "16"; }, "config.json:13:3: error: head_dim: must be an integer in [1, 1000000000], got \"16\""},
      {"dense", [](json& j) { j["head_dim"] = 0; }, "config.json:13:3: error: head_dim: must be in [1, 1000000000], got 0"},
      {"dense", [](json& j) { j["attention_head_dim"] = 8; }, "config.json:7:3: error: attention_head_dim: must equal head_dim, which means the same, got 8 and 16"},
      {"dense", [](json& j) { j["rotary_base"] = 1e4; },
       "config.json:47:3: error: rotary_base: unknown key, got 10000.0\nhelp: to import without it: --waive rotary_base"},
      {"dense", [](json& j) { j["conv_kernl"] = 4; },
       "config.json:10:3: error: conv_kernl: unknown key, got 4\nhelp: did you mean 'conv_kernel'? to import without it: --waive conv_kernl"},
      {"dense", [](json& j) { j["hybrid_override_pattern"] = "M-MX-"; },
       "config.json:16:3: error: hybrid_override_pattern: no loaded block has the letter 'X' in HF's dialect\n"
       "help: loaded blocks: '*' gqa, 'E' latent_moe, 'M' mamba2, '-' mlp, 'E' moe"},
      {"dense", [](json& j) { j["hybrid_override_pattern"] = "M-M|*-"; },
       "config.json:16:3: error: hybrid_override_pattern: HF's patterns hold letters of layers alone, got '|'"},
      {"latent", [](json& j) { j["layers_block_type"][1] = "lstm"; }, "no loaded block is called \"lstm\" in HF's lists"},
      {"latent", [](json& j) { j["hybrid_override_pattern"] = "MEMEE"; }, "layers_block_type: says 'MEM*E' where hybrid_override_pattern says 'MEMEE'"},
      {"dense", [](json& j) { j.erase("hybrid_override_pattern"); },
       "config.json:1:1: error: hybrid_override_pattern: is missing: one of hybrid_override_pattern, layers_block_type, layer_types must give the layers"},
      {"dense", [](json& j) { j["num_nextn_predict_layers"] = -1; }, "num_nextn_predict_layers: must be an integer in [0, 2^63), got -1"},
      {"dense", [](json& j) { j["num_attention_heads"] = 5; },
       "num_attention_heads (blocks.gqa.num_heads): must be a multiple of num_kv_heads, got 5 % 2 = 1\nhelp: nearest: 4, 6"},
  };
  for (const Case& c : cases) {
    const std::string got = import_error(c.name, c.edit);
    EXPECT_TRUE(has(got, c.message));
  }
}

TEST_F(HfTest, AllMistakesAreToldAtOnce) {
  const std::string text = import_error("dense", [](json& j) { j["zzz_a"] = 1, j["zzz_b"] = 2, j["mlp_hidden_act"] = "silu", j["head_dim"] = 0; });
  for (const char* part : {"zzz_a", "zzz_b", "mlp_hidden_act", "head_dim"}) EXPECT_TRUE(has(text, part));
}

TEST_F(HfTest, AnUnknownKeyCanBeWaivedByName) {
  const auto edit = [](json& j) { j["rotary_base"] = 1e4; };
  EXPECT_EQ(import_error("dense", edit, {"rotary_base"}), "imported");
  EXPECT_NE(import_error("dense", edit, {"rotary"}), "imported");
}

TEST_F(HfTest, KeysThatChangeNothingAreAccepted) {
  EXPECT_EQ(import_error("dense", [](json& j) {
    j["rope_theta"] = 1e4, j["rope_scaling"] = nullptr, j["torch_dtype"] = "bfloat16", j["auto_map"] = json::object(), j["chunk_size"] = 7, j["expand"] = 3;
    j["moe_intermediate_size"] = "of a block that the pattern lacks";
  }), "imported");
}

TEST_F(HfTest, AHeadWithoutAPatternHasTheUsualOne) {
  const fs::path folder = edited("mtp", [](json& j) { j.erase("mtp_hybrid_override_pattern"); });
  EXPECT_EQ(import(folder).model.hybrid_override_pattern, "M*E/*E");
  const fs::path words = edited("mtp", [](json& j) { j.erase("mtp_hybrid_override_pattern"), j["mtp_layers_block_type"] = {"mamba", "moe"}; });
  EXPECT_EQ(import(words).model.hybrid_override_pattern, "M*E/ME");
}

TEST(HfNames, PublishedModelsCountExactly) {
  struct Case {
    const char* file;
    int64_t elements, tensors;  // 0: not published
  };
  for (const Case& c : {Case{"nano_4b", 3'973'556'832, 263}, Case{"nano_30b", 31'577'940'288, 0}, Case{"super_120b", 123'611'033'088, 42'683}}) {
    const Config config = load_config(fs::path(TESSERA_SOURCE_DIR) / "configs/models" / fmt::format("{}.toml", c.file), {}, registry());
    const ModelPlan plan = make_plan(config);
    int64_t elements = 0, tensors = 0;
    for (const HubTensor& t : hub_tensors(plan)) elements += num_elements(t.shape), ++tensors;
    EXPECT_EQ(elements, c.elements) << c.file;
    EXPECT_EQ(c.tensors == 0 ? 0 : tensors, c.tensors) << c.file;
    EXPECT_EQ(totals(plan).elements, elements) << c.file;
    EXPECT_EQ(totals(plan).tensors, tensors) << c.file;
  }
}

TEST(HfNames, EveryNameOfTheGoldenFoldersIsMade) {
  for (const char* name : {"dense", "moe", "latent", "mtp", "groups", "packed"}) {
    std::vector<std::string> made;
    for (const HubTensor& t : hub_tensors(make_plan(import(kGolden / name)))) made.push_back(t.name);
    std::sort(made.begin(), made.end());
    EXPECT_EQ(made, SafetensorsFolder::open(kGolden / name).names()) << name;
  }
}

// Same names, dtypes, shapes and bytes.
void expect_same_tensors(const fs::path& a, const fs::path& b) {
  const auto first = SafetensorsFolder::open(a), second = SafetensorsFolder::open(b);
  ASSERT_EQ(first.names(), second.names());
  for (const std::string& name : first.names()) EXPECT_TRUE(bit_equal(second.tensor(name), first.tensor(name))) << name;
}

TEST_F(HfTest, ThereAndBackIsTheSameFolder) {
  for (const char* name : {"dense", "moe", "latent", "mtp", "groups", "packed"}) {
    convert_to_tessera(kGolden / name, folder_ / name, registry());
    convert_to_hf(folder_ / name, folder_ / (std::string(name) + "_hub"), registry());
    expect_same_tensors(kGolden / name, folder_ / (std::string(name) + "_hub"));
    EXPECT_EQ(read_hf_json(folder_ / (std::string(name) + "_hub") / "config.json"), read_hf_json(kGolden / name / "config.json")) << name;
  }
}

// Rewrites a golden folder: names, dtypes, packed experts.
fs::path rewritten(const fs::path& from, const fs::path& to, const std::function<void(std::map<std::string, at::Tensor>&)>& edit) {
  fs::create_directories(to);
  fs::copy_file(from / "config.json", to / "config.json");
  std::map<std::string, at::Tensor> tensors;
  const auto file = SafetensorsFolder::open(from);
  for (const std::string& name : file.names()) tensors[name] = file.tensor(name);
  edit(tensors);
  std::vector<TensorSpec> specs;
  for (const auto& [name, t] : tensors) specs.push_back({.name = name, .dtype = t.scalar_type(), .shape = t.sizes().vec()});
  SafetensorsFolderWriter writer(to, specs);
  for (const auto& [name, t] : tensors) writer.write(name, t);
  writer.finish();
  return to;
}

void to_bf16(std::map<std::string, at::Tensor>& tensors) {
  for (auto& [name, t] : tensors)
    if (!name.ends_with("A_log") && !name.ends_with("e_score_correction_bias") && !name.ends_with("experts.3.up_proj.weight")) t = t.to(at::kBFloat16);
}

TEST_F(HfTest, EveryTensorKeepsItsOwnDtype) {
  const fs::path source = rewritten(kGolden / "latent", folder_ / "source", to_bf16);
  convert_to_tessera(source, folder_ / "checkpoint", registry());
  convert_to_hf(folder_ / "checkpoint", folder_ / "hub", registry());
  expect_same_tensors(source, folder_ / "hub");
}

TEST_F(HfTest, ADtypeCanBeChosen) {
  convert_to_tessera(kGolden / "moe", folder_ / "checkpoint", registry(), {.dtype = at::kBFloat16});
  EXPECT_EQ(SafetensorsFolder::open(folder_ / "checkpoint").find("layers.0.in_proj.weight")->dtype, at::kBFloat16);
  convert_to_hf(folder_ / "checkpoint", folder_ / "hub", registry(), {.dtype = at::kHalf});
  const auto hub = SafetensorsFolder::open(folder_ / "hub");
  for (const std::string& name : hub.names())
    EXPECT_EQ(hub.find(name)->dtype, name.ends_with("e_score_correction_bias") ? at::kFloat : at::kHalf) << name;
  EXPECT_EQ(read_hf_json(folder_ / "hub/config.json")["dtype"], "float16");
}

TEST_F(HfTest, ReadsTheOtherPrefixAndPackedExperts) {
  const fs::path source = rewritten(kGolden / "mtp", folder_ / "source", [](std::map<std::string, at::Tensor>& tensors) {
    std::map<std::string, at::Tensor> out;
    std::map<std::string, std::vector<at::Tensor>> packed;
    for (auto& [name, t] : tensors) {
      std::string to = name.starts_with("backbone.") ? "model." + name.substr(9) : name;
      if (const size_t at = to.find(".experts."); at != std::string::npos) {
        const size_t dot = to.find('.', at + 9);
        auto& list = packed[to.substr(0, at + 9) + (to.find("up_proj") != std::string::npos ? "up_proj" : "down_proj")];
        list.resize(8);
        list[std::stoul(to.substr(at + 9, dot - at - 9))] = t;
      } else {
        out[to] = t;
      }
    }
    for (auto& [name, list] : packed) out[name] = at::stack(list);
    tensors = out;
  });
  convert_to_tessera(source, folder_ / "checkpoint", registry());
  convert_to_hf(folder_ / "checkpoint", folder_ / "hub", registry());
  expect_same_tensors(kGolden / "mtp", folder_ / "hub");
}

TEST_F(HfTest, ShardsAndTokenizerFilesTravel) {
  const fs::path source = edited("moe", [](json&) {});
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json"}) write_file(source / name, name);
  write_file(source / "README.md", "stays");
  convert_to_tessera(source, folder_ / "checkpoint", registry(), {.max_shard_bytes = 200'000});
  EXPECT_TRUE(fs::exists(folder_ / "checkpoint/model.safetensors.index.json"));
  convert_to_hf(folder_ / "checkpoint", folder_ / "hub/", registry(), {.max_shard_bytes = 100'000});
  EXPECT_TRUE(fs::exists(folder_ / "hub/model.safetensors.index.json"));
  expect_same_tensors(source, folder_ / "hub");
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json"})
    EXPECT_EQ(read_file(folder_ / "hub" / name), name);
  EXPECT_FALSE(fs::exists(folder_ / "hub/README.md"));
}

TEST_F(HfTest, WrongTensorsAreListed) {
  const fs::path source = rewritten(kGolden / "dense", folder_ / "source", [](std::map<std::string, at::Tensor>& tensors) {
    tensors.erase("backbone.norm_f.weight");
    tensors["backbone.extra"] = at::ones({2});
    tensors["lm_head.weight"] = at::ones({3, 64});
    tensors["backbone.layers.0.mixer.D"] = at::ones({8}, at::kLong);
  });
  EXPECT_EQ(error_of([&] { convert_to_tessera(source, folder_ / "checkpoint", registry()); }),
            fmt::format("error: {}: the tensors are not those of its configuration\n"
                        "  missing (1): backbone.norm_f.weight\n"
                        "  unexpected (1): backbone.extra\n"
                        "  misshapen (2): lm_head.weight: [3, 64] in the file, [256, 64] in the model, "
                        "backbone.layers.0.mixer.D: I64 in the file, only F64, F32, BF16 and F16 are read", source.string()));
  EXPECT_FALSE(fs::exists(folder_ / "checkpoint"));
}

TEST_F(HfTest, TiedEmbeddingsMayNotDiffer) {
  const auto tie = [](json& j) { j["tie_word_embeddings"] = true; };
  const fs::path differing = edited("dense", tie);
  EXPECT_TRUE(has(error_of([&] { convert_to_tessera(differing, folder_ / "a", registry()); }), "tie_word_embeddings is true, but the stored lm_head.weight differs from backbone.embeddings.weight"));
  for (const bool stored : {true, false}) {
    const fs::path source = rewritten(differing, folder_ / fmt::format("tied_{}", stored), [&](std::map<std::string, at::Tensor>& tensors) {
      if (stored) tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"];
      else tensors.erase("lm_head.weight");
    });
    convert_to_tessera(source, folder_ / fmt::format("checkpoint_{}", stored), registry());
    convert_to_hf(folder_ / fmt::format("checkpoint_{}", stored), folder_ / fmt::format("hub_{}", stored), registry());
    expect_same_tensors(source, folder_ / fmt::format("hub_{}", stored));
  }
}

TEST_F(HfTest, APlaceThatIsTakenIsRefused) {
  EXPECT_TRUE(has(error_of([&] { convert_to_tessera(kGolden / "dense", folder_, registry()); }), "is there already"));
  EXPECT_TRUE(has(error_of([&] { convert_to_hf(kGolden / "dense", folder_ / "x", registry()); }), "no complete checkpoint there"));
}

constexpr const char* kSizes = R"(
[blocks.mamba2]
num_heads = 4
head_dim = 8
state_size = 8
num_groups = 2
[blocks.gqa]
num_heads = 4
num_kv_heads = 2
head_dim = 8
[blocks.mlp]
intermediate_size = 48
[blocks.moe]
num_experts = 8
top_k = 2
intermediate_size = 24
shared_intermediate_size = 32
[blocks.latent_moe]
latent_size = 16
num_experts = 8
top_k = 2
intermediate_size = 24
shared_intermediate_size = 32
)";

Config made(const std::string& pattern, const std::vector<std::string>& sets, const std::string& more = "") {
  return parse_config(fmt::format("[model]\nhybrid_override_pattern = \"{}\"\nhidden_size = 32\n{}{}", pattern, kSizes, more), "made.toml", sets, registry());
}

TEST(HfExport, RefusesWhatHfCannotSay) {
  struct Case {
    std::string pattern, set, more, message;
  };
  const Case cases[] = {
      {"ML*", "blocks.latent_moe.router_input=latent", "", "blocks.latent_moe.router_input: is \"latent\" and not \"hidden\", which HF's config.json cannot say"},
      {"M*E", "blocks.gqa.rope_theta=10000.0", "", "blocks.gqa.rope_theta: is 10000.0 and not 0.0, which HF's config.json cannot say"},
      {"M*E", "blocks.gqa.qk_norm=true", "", "blocks.gqa.qk_norm: is true and not false"},
      {"M*E", "blocks.gqa.bias=true", "", "blocks.gqa.bias: is true and not false"},
      {"ML*O", "blocks.latent_moe.router_input=hidden", "", "blocks.moe: is a moe beside a latent_moe, which HF's config.json cannot say"},
      {"MW*", "model.norm_eps=1e-5", "[blocks.wide]\ntype = \"mamba2\"\nnum_heads = 8\nhead_dim = 8\nstate_size = 8\nnum_groups = 2\n[symbols]\nW = \"wide\"\n",
       "blocks.wide.num_heads: is 8 where blocks.mamba2.num_heads is 4"},
      {"M*M", "model.norm_eps=1e-5", "[symbols]\nM = { block = \"mamba2\", shared = true }\n", "blocks.mamba2: shares one set of weights among its layers"},
  };
  for (const Case& c : cases) {
    std::vector<std::string> notes;
    std::string text = "exported";
    try {
      export_hf_config(made(c.pattern, {c.set}, c.more), registry(), nullptr, notes);
    } catch (const Error& error) {
      text = error.what();
    }
    EXPECT_TRUE(has(text, c.message)) << c.pattern << " " << c.set;
  }
}

TEST_F(HfTest, AnOwnModelMeansTheSameAfterExport) {
  const Config config = made("MO|*EM", {"blocks.mamba2.chunk=16", "blocks.moe.aux_loss_coeff=1e-4", "model.norm_eps=1e-6", "blocks.mamba2.dt_limit=[0.0, 0.5]"});
  std::vector<std::string> notes;
  const json exported = export_hf_config(config, registry(), nullptr, notes);
  EXPECT_TRUE(has(notes, "left out, HF's results do not depend on it: blocks.mamba2.chunk = 16"));
  EXPECT_TRUE(has(notes, "left out, HF's results do not depend on it: blocks.moe.aux_loss_coeff = 0.0001"));
  write_file(folder_ / "config.json", hf_json_text(exported));
  const Config back = import(folder_);
  EXPECT_EQ(back.model.hybrid_override_pattern, "ME*-M");
  EXPECT_EQ(back.model.norm_eps, 1e-6);
  const ModelPlan a = make_plan(config), b = make_plan(back);
  const auto ours = hub_tensors(a), theirs = hub_tensors(b);
  ASSERT_EQ(ours.size(), theirs.size());
  for (size_t i = 0; i < ours.size(); ++i) EXPECT_TRUE(ours[i].name == theirs[i].name && ours[i].shape == theirs[i].shape) << ours[i].name;
  const Field* limit = back.binding('M').type->fields().find("dt_limit");
  EXPECT_EQ(std::get<std::vector<double>>(limit->get(back.binding('M').config.get())), (std::vector<double>{0.0, 0.5}));
}

TEST_F(HfTest, AChangedValueReplacesTheSources) {
  convert_to_tessera(kGolden / "dense", folder_ / "checkpoint", registry());
  convert_to_hf(folder_ / "checkpoint", folder_ / "hub", registry(), {.sets = {"model.norm_eps=1e-6"}});
  json wanted = read_hf_json(kGolden / "dense/config.json");
  wanted["layer_norm_epsilon"] = 1e-6;
  EXPECT_EQ(read_hf_json(folder_ / "hub/config.json"), wanted);
}

}  // namespace
}  // namespace tessera
