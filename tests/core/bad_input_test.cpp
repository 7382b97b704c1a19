// Files and values that nobody meant well with: each is refused with its exact text, before anything of the size it claims is made.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint.hpp"
#include "data/dataset.hpp"
#include "data/glob.hpp"
#include "data/loader.hpp"
#include "hf/convert.hpp"
#include "hf/hf_config.hpp"
#include "hf/hf_json.hpp"
#include "hf/hf_names.hpp"
#include "plan/plan.hpp"
#include "tests/core/fake_blocks.hpp"
#include "tests/support/folder.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const fs::path kGolden = fs::path(TESSERA_SOURCE_DIR) / "tests/golden";

const Registry& fakes() {
  static const Registry one = fake::registry();
  return one;
}
const Registry& blocks() {
  static const Registry one = Registry::load({fs::path(TESSERA_BINARY_DIR) / "plugins"});
  return one;
}

class BadInput : public FolderTest {
 protected:
  // What `run` says, with this test's folder cut from its paths.
  template <class F>
  std::string error_of(F run, ExitCode code) const {
    std::string text = "no error";
    try {
      run();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), code) << error.what();
      text = error.what();
    }
    const std::string prefix = folder_.string() + "/";
    for (size_t at; (at = text.find(prefix)) != std::string::npos;) text.erase(at, prefix.size());
    return text;
  }
  fs::path put(const std::string& name, const std::string& bytes) const {
    put_file(folder_ / name, bytes);
    return folder_ / name;
  }
  std::string config_error(const std::string& text) const {
    return error_of([&] { parse_config(text, "a.toml", {}, fakes()); }, ExitCode::kUsage);
  }
  // Of importing golden/`name`'s config.json with `edit` applied.
  std::string import_error(const std::string& name, const std::function<void(json&)>& edit) const {
    json config = read_hf_json(kGolden / name / "config.json");
    edit(config);
    return import_text_error(hf_json_text(config));
  }
  std::string import_text_error(const std::string& text) const {
    const fs::path file = put("config.json", text);
    std::vector<std::string> notes;
    return error_of([&] { import_hf_config(file, blocks(), {}, notes); }, ExitCode::kUsage);
  }
};

const std::string kScan = "[model]\nhybrid_override_pattern = \"M\"\nhidden_size = 64\n[blocks.scan]\nnum_heads = 8\n";

// --- messages ---------------------------------------------------------------------------------------------------------------------
TEST_F(BadInput, IssuesSayErrorInTheirFirstLineWhateverHasAPlace) {
  Issues issues;
  issues.add({"parallelism", "is wrong", "", ""});
  issues.add({"model.hidden_size", "must be in [1, 9], got 0", "take 1", "a.toml:3:1"});
  EXPECT_EQ(error_of([&] { issues.raise(); }, ExitCode::kUsage), "error: parallelism: is wrong\na.toml:3:1: error: model.hidden_size: must be in [1, 9], got 0\nhelp: take 1");
  EXPECT_EQ(std::string(Error(ExitCode::kRuntime, "a: error: b").what()), "a: error: b");
  EXPECT_EQ(std::string(Error(ExitCode::kRuntime, "a\nb: error: c").what()), "error: a\nb: error: c");
}

TEST_F(BadInput, MessagesHoldNoControlCharacters) {
  EXPECT_EQ(std::string(Error(ExitCode::kRuntime, "a\x1b[2J\r\b\x7f", "\x07x\ny").what()), "error: a?[2J???\nhelp: ?x\ny");
  EXPECT_EQ(std::string(Error(ExitCode::kRuntime, "\xc3\xa9 \xe9 \xbb\xbf \xf0\x9f\x98\x80 \xf0\x9f\x98").what()), "error: \xc3\xa9 ? ?? \xf0\x9f\x98\x80 ???");
  EXPECT_EQ(error_of([&] { strict_json("{\"\\u001b[31m\":1,\"\\u001b[31m\":1}", "x"); }, ExitCode::kRuntime), "error: x: key '?[31m' occurs twice");
}

TEST_F(BadInput, FiftyMistakesAreToldAndTheOthersCounted) {
  std::string text = kScan + "[training]\n";
  for (int i = 0; i < 60; ++i) text += fmt::format("k{:02} = 1\n", i);
  const std::string error = config_error(text);
  EXPECT_NE(error.find("a.toml:56:1: error: training.k49: unknown key\n"), std::string::npos) << error;
  EXPECT_EQ(error.find("k50"), std::string::npos);
  EXPECT_TRUE(error.ends_with("\nerror: 10 more mistakes")) << error;
}

// --- the pattern and sizes ---------------------------------------------------------------------------------------------------------
TEST_F(BadInput, APatternOfAMillionLayersIsRefused) {
  const auto text = [](size_t n) { return "[model]\nhybrid_override_pattern = \"" + std::string(n, '*') + "\"\nhidden_size = 64\n"; };
  EXPECT_EQ(config_error(text(1'000'000)), "a.toml:2:27: error: model.hybrid_override_pattern: must have at most 10000 layers, got 1000000");
  EXPECT_EQ(config_error(text(10'001)), "a.toml:2:27: error: model.hybrid_override_pattern: must have at most 10000 layers, got 10001");
  EXPECT_EQ(config_error(text(10'000)), "no error");
  EXPECT_EQ(make_plan(parse_config(text(10'000), "a.toml", {}, fakes())).layers.size(), 10'000u);
}

TEST_F(BadInput, AHeadOfManyLayersIsRefused) {
  const auto text = [](const std::string& pattern, const std::string& depths) {
    return "[model]\nhybrid_override_pattern = \"" + pattern + "\"\nhidden_size = 64\n[blocks.mlp]\nintermediate_size = 8\n[heads.mtp]\nrepeated = false\ndepths = " + depths + "\n";
  };
  const auto error = [&](const std::string& toml) { return error_of([&] { parse_config(toml, "a.toml", {}, blocks()); }, ExitCode::kUsage); };
  EXPECT_EQ(error(text("E/E", "1000000000000")), "a.toml:8:10: error: heads.mtp.depths: must be in [1, 1024], got 1000000000000");
  EXPECT_EQ(error(text("E/" + std::string(20, 'E'), "1000")), "a.toml:6:1: error: heads.mtp: must make at most 10000 layers, got 1 + 1000 sets of 20 = 20001");
}

TEST_F(BadInput, WhatIsMerelyBigIsPlanned) {
  const Config big = parse_config("[model]\nhybrid_override_pattern = \"" + std::string(9999, 'M') + "*\"\nhidden_size = 100000\nvocab_size = 1000000000\n[blocks.scan]\nnum_heads = 1000000\n",
                                  "a.toml", {}, fakes());
  const Totals sum = totals(make_plan(big));
  EXPECT_EQ(sum.trained, int64_t{9999} * (100'000 + 1'000'000 * int64_t{100'000} + 1'000'000) + 100'000 + 2 * int64_t{1'000'000'000} * 100'000 + 100'000);
}

// --- TOML ---------------------------------------------------------------------------------------------------------------------------
TEST_F(BadInput, EncodingsOfAConfiguration) {
  std::string crlf;
  for (const char c : kScan) crlf += c == '\n' ? "\r\n" : std::string(1, c);
  EXPECT_EQ(config_error(crlf), "no error");
  EXPECT_EQ(config_error("\xef\xbb\xbf" + kScan), "no error");
  EXPECT_EQ(config_error(std::string("[model]\0\n", 9)), "a.toml:1:8: error: malformed TOML: while parsing table header: expected a comment or whitespace, saw '\\u0000'");
  EXPECT_EQ(config_error("# a\n[run]\nname = \"\xe9\"\n"), "a.toml:3:8: error: malformed TOML: Encountered invalid utf-8 sequence");
  EXPECT_EQ(config_error(std::string("\xff\xfe[\0m\0", 6)), "a.toml:1:1: error: malformed TOML: a character outside ASCII must stand in a string or a comment");
  EXPECT_EQ(config_error("[run]\nname = \"a\x01\"\n"),
            "a.toml:2:10: error: malformed TOML: while parsing string: unescaped control characters other than TAB (U+0009) are explicitly prohibited");
  EXPECT_EQ(config_error("[run]\nname = \"\\ud800\"\n"),
            "a.toml:2:15: error: malformed TOML: while parsing unicode scalar sequence: unicode surrogates (U+D800 - U+DFFF) are explicitly prohibited");
}

// toml++ looks for the end of a number or a word behind the quotes in it.
TEST_F(BadInput, LettersOutsideAsciiAreInStringsThatBeginAValue) {
  const std::string rule = "malformed TOML: a character outside ASCII must stand in a string or a comment";
  EXPECT_EQ(config_error("a=1r.\"gr\xc3\xb6\"\n"), "a.toml:1:9: error: " + rule);
  EXPECT_EQ(config_error("a = [\"\xc3\xb6\", 1\"\xc3\xb6\"]\n"), "a.toml:1:14: error: " + rule);
  EXPECT_EQ(config_error("a = { b = x'\xc3\xb6' }\n"), "a.toml:1:13: error: " + rule);
  EXPECT_EQ(config_error(kScan + "[run]\nname = \"\xc3\xb6\" # \xc3\xb6\n[training]\nfreeze = [\"\xc3\xb6\",\n  # \xc3\xb6\n  '\xc3\xb6', \"\"\"\n\xc3\xb6\"\"\"]\n[blocks.\"\xc3\xb6\"]\ntype = \"scan\"\n"
                         "[symbols]\nW = { \"block\" = \"\xc3\xb6\", shared = true }\nV = { block = \"\xc3\xb6\", 'shared' = true }\n"), "no error");
}

// --- data ---------------------------------------------------------------------------------------------------------------------------
TEST_F(BadInput, DataPathsThatAreNoFiles) {
  ASSERT_EQ(::mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  ASSERT_EQ(::mkfifo((folder_ / "p.idx").c_str(), 0600), 0);
  fs::create_directory(folder_ / "m.idx");
  put("q.idx", ""), put("p.bin", ""), put("m.bin", "");
  const auto bytes = [&](const std::string& path) { return error_of([&] { open_bytes(path); }, ExitCode::kRuntime); };
  const auto megatron = [&](const std::string& prefix) { return error_of([&] { open_megatron((folder_ / prefix).string()); }, ExitCode::kRuntime); };
  EXPECT_EQ(bytes((folder_ / "pipe").string()), "error: data.path: 'pipe' is a device or pipe, not a regular file");
  EXPECT_EQ(bytes("/dev/zero"), "error: data.path: '/dev/zero' is a device or pipe, not a regular file");
  EXPECT_EQ(bytes("/dev/"), "error: data.path: '/dev/' is a folder\nhelp: '/dev/**' names the files in it and below");
  EXPECT_EQ(error_of([&] { open_jsonl((folder_ / "pipe").string(), "text"); }, ExitCode::kRuntime), "error: data.path: 'pipe' is a device or pipe, not a regular file");
  EXPECT_EQ(megatron("p"), "error: p.idx: must be a regular file, got a device or pipe");
  EXPECT_EQ(megatron("m"), "error: m.idx: must be a regular file, got a folder");
  EXPECT_EQ(megatron("q"), "error: q.bin: cannot be opened: No such file or directory");
  EXPECT_EQ(megatron("none"), "error: none.idx: cannot be opened: No such file or directory");
  EXPECT_EQ(error_of([&] { read_file(folder_ / "pipe"); }, ExitCode::kRuntime), "error: pipe: must be a regular file, got a device or pipe");
  EXPECT_EQ(error_of([&] { SafetensorsFile::open(folder_ / "pipe"); }, ExitCode::kRuntime), "error: pipe: must be a regular file, got a device or pipe");
}

TEST_F(BadInput, DocumentsWithoutATarget) {
  for (int i = 0; i < 4; ++i) put(fmt::format("one/{}.txt", i), "x");
  DataConfig config;
  config.path = (folder_ / "one/*").string();
  config.validation_fraction = 0;
  Loader loader(Dataset::open(config, 256), 3);
  const Row row = loader.next_rows(1).at(0);
  EXPECT_EQ(row.lengths, (std::vector<int64_t>{1, 1, 1}));
  EXPECT_EQ(row.num_targets(), 0);
}

// 2^50 ways to cut a path into the parts of fifty `**`.
TEST_F(BadInput, ManyWildcardsAreOne) {
  fs::path deep = folder_;
  for (int i = 0; i < 12; ++i) deep /= "d";
  fs::create_directories(deep);
  put_file(deep / "a.txt", "x");
  std::string pattern = folder_.string();
  for (int i = 0; i < 50; ++i) pattern += "/**";
  EXPECT_EQ(glob(pattern), std::vector<fs::path>{deep / "a.txt"});
}

// --- checkpoints --------------------------------------------------------------------------------------------------------------------
TEST_F(BadInput, AStateThatWasEdited) {
  put("model.safetensors", std::string("\2\0\0\0\0\0\0\0{}", 10));
  const json good{{"format", 1}, {"step", 3}, {"tokens", 9}, {"data", nullptr}, {"hf", nullptr}, {"extra", nullptr},
                  {"files", {{"model.safetensors", {{"bytes", 10}, {"crc32", 83891703}}}}}};
  const auto text_error = [&](const std::string& text) {
    put("state.json", text);
    return error_of([&] { open_checkpoint(folder_); }, ExitCode::kRuntime);
  };
  const auto error = [&](const std::function<void(json&)>& edit) {
    json state = good;
    edit(state);
    return text_error(state.dump());
  };
  const std::string begin = "error: state.json: not a checkpoint's state: ";
  EXPECT_EQ(error([](json&) {}), "no error");
  EXPECT_EQ(error([](json& s) { s.erase("step"); }), begin + "has no 'step'");
  EXPECT_EQ(error([](json& s) { s = json::array(); }), begin + "has no 'format'");
  EXPECT_EQ(error([](json& s) { s["format"] = "1"; }), begin + "format must be an integer in [0, 2^63), got \"1\"");
  EXPECT_EQ(error([](json& s) { s["step"] = -1; }), begin + "step must be an integer in [0, 2^63), got -1");
  EXPECT_EQ(error([](json& s) { s["tokens"] = uint64_t{1} << 63; }), begin + "tokens must be an integer in [0, 2^63), got 9223372036854775808");
  EXPECT_EQ(error([](json& s) { s["optimizer_steps"] = 1.5; }), begin + "optimizer_steps must be an integer in [0, 2^63), got 1.5");
  EXPECT_EQ(error([](json& s) { s["files"] = json::array({1}); }), begin + "files must be an object, got array");
  EXPECT_EQ(error([](json& s) { s["files"] = {{"model.safetensors", 3}}; }), begin + "has no 'bytes'");
  EXPECT_EQ(error([](json& s) { s["files"] = {{"../../../etc/passwd", {{"bytes", 1}, {"crc32", 1}}}}; }), "error: passwd: missing from the checkpoint");
  EXPECT_EQ(error([](json& s) { s["files"]["model.safetensors"]["bytes"] = 11; }), "error: model.safetensors: damaged: 10 bytes, 11 when it was written\nhelp: take an older checkpoint");
  EXPECT_EQ(text_error(""), "error: state.json: not valid JSON at byte 0");
  EXPECT_EQ(text_error("\xef\xbb\xbf{}"), begin + "has no 'format'");
  EXPECT_EQ(text_error(good.dump() + "{}"), fmt::format("error: state.json: not valid JSON at byte {}", good.dump().size()));
  EXPECT_EQ(text_error(std::string("{\"a\":\"\0\"}", 9)), "error: state.json: not valid JSON at byte 6");
  EXPECT_EQ(text_error(std::string(100, '[')), "error: state.json: JSON nested deeper than 64 levels");
}

TEST_F(BadInput, NamesThatNoFileSystemTakes) {
  const std::string longest(5000, 'x');
  EXPECT_EQ(error_of([&] { open_checkpoint(longest); }, ExitCode::kRuntime), fmt::format("error: {}: no such folder\nhelp: name a run's folder or one of its checkpoints/step-N", longest));
  EXPECT_EQ(error_of([&] { SafetensorsFolder::open(longest); }, ExitCode::kRuntime), fmt::format("error: {}: cannot be opened: File name too long", longest));
  put("model.safetensors.index.json", json{{"weight_map", {{"a", std::string(300, 'x')}}}}.dump());
  EXPECT_EQ(error_of([&] { SafetensorsFolder::open(folder_); }, ExitCode::kRuntime), fmt::format("error: model.safetensors.index.json: shard {} of tensor 'a' is missing", std::string(300, 'x')));
}

// --- config.json --------------------------------------------------------------------------------------------------------------------
TEST_F(BadInput, SizesOfAConfigJson) {
  EXPECT_EQ(import_error("dense", [](json& j) { j["hidden_size"] = int64_t{1} << 40; }),
            "config.json:15:3: error: hidden_size: must be in [1, 1000000000], got 1099511627776");
  EXPECT_EQ(import_error("dense", [](json& j) { j["vocab_size"] = int64_t{1} << 62; }),
            "config.json:63:3: error: vocab_size: must be in [1, 1000000000], got 4611686018427387904");
  EXPECT_EQ(import_error("dense", [](json& j) { j["head_dim"] = UINT64_MAX; }),
            "config.json:13:3: error: head_dim: must be an integer in [1, 1000000000], got 18446744073709551615");
  EXPECT_EQ(import_error("dense", [](json& j) { j["mamba_num_heads"] = int64_t{1} << 62; }),
            "config.json:22:3: error: mamba_num_heads: must be in [1, 1000000000], got 4611686018427387904");
  EXPECT_EQ(import_error("moe", [](json& j) { j["n_routed_experts"] = int64_t{1} << 62; }),
            "config.json:35:3: error: n_routed_experts: must be in [1, 1000000000], got 4611686018427387904");
  EXPECT_EQ(import_error("mtp", [](json& j) { j["num_nextn_predict_layers"] = int64_t{1} << 40; }),
            "config.json:44:3: error: num_nextn_predict_layers: must be in [1, 1024], got 1099511627776");
  EXPECT_EQ(import_error("mtp", [](json& j) { j["num_nextn_predict_layers"] = UINT64_MAX; }),
            "config.json:44:3: error: num_nextn_predict_layers: must be an integer in [0, 2^63), got 18446744073709551615");
  EXPECT_EQ(import_error("dense", [](json& j) { j["hybrid_override_pattern"] = std::string(20'000, '-'); j["num_hidden_layers"] = 20'000; }),
            "config.json:16:3: error: hybrid_override_pattern: must have at most 10000 layers, got 20000");
  EXPECT_EQ(import_error("dense", [](json& j) { j["layer_norm_epsilon"] = hf_json_number(NAN); j["initializer_range"] = hf_json_number(INFINITY); }),
            "config.json:17:3: error: initializer_range: must be finite, got inf\nconfig.json:19:3: error: layer_norm_epsilon: must be finite, got nan");
}

TEST_F(BadInput, MoreTensorsThanAFolderHas) {
  const Config config = parse_config("[model]\nhybrid_override_pattern = \"O\"\nhidden_size = 2\n[blocks.moe]\nnum_experts = 1000000\ntop_k = 1\nintermediate_size = 1\n", "a.toml", {}, blocks());
  EXPECT_EQ(error_of([&] { hub_tensors(make_plan(config)); }, ExitCode::kUsage),
            "error: the hub layout splits this model into 2000006 tensors; at most 1000000 are read and written");
}

TEST_F(BadInput, TextsOfAConfigJson) {
  EXPECT_EQ(import_text_error(""), "error: config.json: not valid JSON at byte 0");
  EXPECT_EQ(import_text_error("\xef\xbb\xbf{\"model_type\": \"llama\"}"),
            "config.json:1:5: error: model_type: only \"nemotron_h\" is supported, got \"llama\"");
  EXPECT_EQ(import_text_error("{\"model_type\":\r\n \"llama\"}"),
            "config.json:1:2: error: model_type: only \"nemotron_h\" is supported, got \"llama\"");
  EXPECT_EQ(import_text_error(std::string("{\"model_type\": \"a\0b\"}", 21)), "error: config.json: not valid JSON at byte 17");
  EXPECT_EQ(import_text_error("{\"model_type\": \"\xe9\"}"), "error: config.json: not UTF-8 at byte 16");
  EXPECT_EQ(import_text_error("{\"model_type\": \"nemotron_h\", \"model_type\": 1}"), "error: config.json: key 'model_type' occurs twice");
  EXPECT_EQ(import_text_error("{\"model_type\": " + std::string(100, '[')), "error: config.json: JSON nested deeper than 32 levels");
  EXPECT_EQ(import_text_error("{\"model_type\": \"\\ud800\"}"), "error: config.json: not valid JSON at byte 22");
  EXPECT_EQ(import_text_error("{\"model_type\": \"nemotron_h\", \"hidden_dropout\": 1e999}"),
            "error: config.json: JSON holds a number out of range");
  EXPECT_EQ(import_text_error("{\"model_type\": \"nemotron_h\"} x"), "error: config.json: not valid JSON at byte 29");
  EXPECT_EQ(import_text_error("{\"model_type\": \"\\u001b[2J\"}"),
            "config.json:1:2: error: model_type: only \"nemotron_h\" is supported, got \"\\u001b[2J\"");
}

}  // namespace
}  // namespace tessera
