#include "plugin/registry.hpp"

#include <cstdlib>
#include <fstream>

#include <gtest/gtest.h>

#include "tests/core/fake_blocks.hpp"

namespace tessera {
namespace {
namespace fs = std::filesystem;

const fs::path kBad = fs::path(TESSERA_BINARY_DIR) / "bad_plugins";
constexpr const char* kRebuild = "\nhelp: rebuild the plugin against this tessera's headers and libtorch";
constexpr const char* kMacro = "\nhelp: a plugin ends with TESSERA_PLUGIN(Type) in one of its files";

template <class F>
std::string error_of(F f) {
  try {
    f();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kPlugin);
    return error.what();
  }
  return "no error";
}

std::string load_error(const std::vector<fs::path>& paths) {
  return error_of([&] { Registry::load(paths); });
}

// What the loader says of bad_plugins/NAME.so.
std::string said(const std::string& name) {
  const fs::path file = kBad / (name + ".so");
  const std::string error = load_error({file}), begin = "error: plugin " + file.string() + ": ";
  return error.starts_with(begin) ? error.substr(begin.size()) : error;
}

TEST(Registry, BrokenPlugins) {
  ASSERT_TRUE(fs::is_directory(kBad)) << "build the target bad_plugins";
  EXPECT_EQ(said("no_entry"), std::string("exports no entry `tessera_plugin_1`") + kMacro + "; the number is the ABI it was built for");
  EXPECT_EQ(said("null_head"), std::string("tessera_plugin_1() returned null") + kMacro);
  EXPECT_EQ(said("wrong_size"), "its head has 24 bytes, this tessera's has " + std::to_string(sizeof(PluginHead)) + kRebuild);
  EXPECT_EQ(said("wrong_abi"), std::string("ABI 7, this tessera has ABI 1") + kRebuild);
  EXPECT_EQ(said("wrong_build_key"), std::string("build key 'gcc-4 cxx11abi=0 libtorch=1.0.0 abi=1', this tessera has '") + core_build_key() + "'" + kRebuild);
  EXPECT_EQ(said("wrong_struct_size"), "its Param has 4 bytes, this tessera's has " + std::to_string(sizeof(Param)) + kRebuild);
  EXPECT_EQ(said("throwing"), "its types cannot be made: no schema today");
  EXPECT_EQ(said("null_manifest"), std::string("its `make` returned null") + kMacro);
  const fs::path undefined = kBad / "undefined_symbol.so";
  EXPECT_EQ(said("undefined_symbol"), "cannot be loaded: " + undefined.string() + ": undefined symbol: nobody_defines_this");
}

TEST(Registry, TwoPluginsOfOneType) {
  const fs::path a = kBad / "duplicate_a.so", b = kBad / "duplicate_b.so";
  EXPECT_EQ(load_error({a, b}), "error: plugin " + b.string() + ": type 'twice' is already loaded from " + a.string() + "\nhelp: leave one of the two out, or rename its type");
}

TEST(Registry, OneFileTwiceIsLoadedOnce) {
  const fs::path a = kBad / "duplicate_a.so";
  const Registry registry = Registry::load({a, a, kBad / "." / "duplicate_a.so"});
  ASSERT_EQ(registry.plugins().size(), 1u);
  EXPECT_EQ(registry.plugins()[0].types, std::vector<std::string>{"twice"});
  ASSERT_NE(registry.block("twice"), nullptr);
  EXPECT_EQ(registry.file_of("twice"), a);
  EXPECT_EQ(registry.block("thrice"), nullptr);
  EXPECT_TRUE(registry.file_of("thrice").empty());
}

TEST(Registry, FilesThatAreNoPlugins) {
  const fs::path folder = fs::path(testing::TempDir()) / "tessera_registry";
  fs::remove_all(folder);
  fs::create_directories(folder / "sub.so");
  std::ofstream(folder / "readme.txt") << "not looked at";
  EXPECT_TRUE(Registry::load({folder}).blocks().empty());
  EXPECT_TRUE(Registry::load({}).plugins().empty());
  const fs::path text = folder / "text.so", missing = folder / "missing";
  std::ofstream(text) << "no shared object";
  EXPECT_EQ(load_error({folder}), "error: plugin " + text.string() + ": cannot be loaded: " + text.string() + ": file too short");
  EXPECT_EQ(load_error({missing}), "error: plugin " + missing.string() +
                                       ": no such file or folder\nhelp: plugins are looked for in the build's plugins/, in [plugins] paths and in TESSERA_PLUGIN_PATH");
  fs::remove_all(folder);
}

TEST(Registry, SearchPaths) {
  ::setenv("TESSERA_PLUGIN_PATH", "/c::/d:", 1);
  const auto paths = Registry::search_paths({"/a", "b"});
  ::unsetenv("TESSERA_PLUGIN_PATH");
  ASSERT_EQ(paths.size(), 5u);
  EXPECT_EQ(std::vector<fs::path>(paths.begin() + 1, paths.end()), (std::vector<fs::path>{"/a", "b", "/c", "/d"}));
  EXPECT_EQ(Registry::search_paths({}).size(), 1u);
}

TEST(Registry, TypesInTheOrderOfTheirNames) {
  const Registry registry = fake::registry();
  std::vector<std::string> names;
  for (const BlockType* type : registry.blocks()) names.emplace_back(type->type());
  EXPECT_EQ(names, (std::vector<std::string>{"attn", "dense", "experts", "latent_experts", "scan"}));
  ASSERT_NE(registry.head("ahead"), nullptr);
  EXPECT_EQ(registry.head("scan"), nullptr);
  EXPECT_EQ(registry.block("ahead"), nullptr);
}

// Manifests that are broken in one way each.
template <int kKind>
struct Broken final : fake::Nothing {
  static constexpr BlockInfo kInfo{.type = kKind == 1 ? "" : kKind == 2 ? "two words" : "broken",
                                   .symbols = {{kKind == 3 ? "card" : kKind == 4 ? nullptr : "card", kKind == 3 ? '|' : 'Q'}}};
  struct Config {
    int64_t width = 4;
  };
  static Schema<Config> schema() {
    Schema<Config> s;
    s.field(kKind == 7 ? "a.b" : kKind == 8 ? "type" : "width", &Config::width, "width").range(kKind == 5 ? 5 : 1);
    if (kKind == 6) s.field("width", &Config::width, "width again");
    return s;
  }
  static void check(const Config&, const Env&, Issues&) {}
  Broken(const Config&, const Env&) {}
};

template <int kKind>
std::string manifest_error() {
  return error_of([] { fake::registry_of<Broken<kKind>>(); });
}

TEST(Registry, BrokenManifests) {
  const std::string begin = "error: plugin built-in: ";
  EXPECT_EQ(manifest_error<1>(), begin + "a type without a name\nhelp: set `type` in its kInfo");
  EXPECT_EQ(manifest_error<2>(), begin + "type name 'two words' must consist of letters, digits, '_' and '-'");
  EXPECT_EQ(manifest_error<3>(), begin + "broken: symbol 0x7c of dialect 'card' cannot stand in a pattern\nhelp: a symbol is one printable ASCII character other than '|' and '/'");
  EXPECT_EQ(manifest_error<4>(), begin + "broken: symbol 'Q' names no dialect");
  EXPECT_EQ(manifest_error<5>(), begin + "field 'broken.width': the default breaks the field's own rule: must be in [5, 1000000000], got 4");
  EXPECT_EQ(manifest_error<6>(), begin + "field 'broken.width' is declared twice");
  EXPECT_EQ(manifest_error<7>(), begin + "field 'broken.a.b': a key must consist of letters, digits, '_' and '-'");
  EXPECT_EQ(manifest_error<8>(), begin + "field 'broken.type': `type` is taken: it names the block type of a table");
  EXPECT_EQ(error_of([] { fake::registry_of<>(); }), begin + "brings no block or head type\nhelp: a plugin ends with TESSERA_PLUGIN(Type) in one of its files");
  EXPECT_EQ(error_of([] { Registry::of(nullptr); }), begin + "its `make` returned null\nhelp: a plugin ends with TESSERA_PLUGIN(Type) in one of its files");
  EXPECT_EQ(error_of([] { fake::registry_of<fake::Scan, fake::Scan>(); }), begin + "type 'scan' is already loaded from built-in\nhelp: leave one of the two out, or rename its type");
}

}  // namespace
}  // namespace tessera
