#include "plugin/registry.hpp"

#include <cstdlib>
#include <fstream>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "tests/bad_plugins/refusals.hpp"
#include "tests/core/fake_blocks.hpp"
#include "tests/support/folder.hpp"

namespace tessera {
namespace {
namespace fs = std::filesystem;

const fs::path kBad = fs::path(TESSERA_BINARY_DIR) / "bad_plugins";
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
  for (const Refusal& refusal : refusals()) EXPECT_EQ(said(refusal.name), refusal.why) << refusal.name;
}

// The process cannot go on from this one.
TEST(Registry, AnInitialiserThatThrowsEndsTheProcess) {
  const std::string text = "error: plugin " + bad_plugin("throwing_initialiser").string() + ": its static initialisers failed: no device today\n";
  EXPECT_EXIT(Registry::load({bad_plugin("throwing_initialiser")}), testing::ExitedWithCode(3), testing::Eq(text));
}

// A plugin's file, spoilt in one way each.
class SpoiltPlugin : public FolderTest {
 protected:
  void SetUp() override {
    FolderTest::SetUp();
    good_ = file_text(kBad / "duplicate_a.so");
    ASSERT_GT(good_.size(), 4096u);
  }
  std::string said_of(const std::string& bytes) {
    const fs::path file = folder_ / fmt::format("spoilt-{}.so", number_++);  // one that was loaded stays mapped
    put_file(file, bytes);
    const std::string error = load_error({file}), begin = "error: plugin " + file.string() + ": ";
    return error.starts_with(begin) ? error.substr(begin.size()) : error;
  }
  std::string with(size_t at, const std::string& bytes) const { return std::string(good_).replace(at, bytes.size(), bytes); }
  std::string good_;
  int number_ = 0;
};

TEST_F(SpoiltPlugin, IsNoSharedObject) {
  EXPECT_EQ(said_of("no shared object"), "is no shared object: it does not begin as an ELF file does");
  EXPECT_EQ(said_of(""), "is no shared object: it does not begin as an ELF file does");
  EXPECT_EQ(said_of(with(16, std::string("\2\0", 2))), "is an ELF file of type 2, not a shared object");
  const fs::path folder = folder_ / "pipe.so";
  ASSERT_EQ(mkfifo(folder.c_str(), 0600), 0);
  EXPECT_EQ(load_error({folder}), "error: plugin " + folder.string() + ": must be a regular file, got a device or pipe");
}

TEST_F(SpoiltPlugin, IsOfAnotherArchitecture) {
  const char* here = good_[18] == 62 ? "x86-64" : "AArch64";
  const auto other = [&](const char* name) { return fmt::format("is built for {}, this tessera is for {}", name, here); };
  EXPECT_EQ(said_of(with(18, std::string("\xf3\0", 2))), other("RISC-V"));
  EXPECT_EQ(said_of(with(18, std::string("\x34\x12", 2))), other("machine 4660"));
  EXPECT_EQ(said_of(with(4, "\1").replace(18, 1, "\3")), other("x86 (32 bits)"));
  EXPECT_EQ(said_of(with(5, "\2")), other("a big-endian machine"));
}

// Cut anywhere, it is refused or, where only what debuggers read is gone, loads; it never ends the process.
TEST_F(SpoiltPlugin, IsCutShort) {
  EXPECT_EQ(said_of(good_.substr(0, 20)), "is cut short: it has 20 bytes, its header alone 64");
  size_t refused = 0;
  for (size_t size = good_.size() - 1; size > 64; size -= std::min<size_t>(size, 997)) {
    const std::string text = said_of(good_.substr(0, size));
    if (text == "no error") {
      EXPECT_EQ(refused, 0u) << size;
      continue;
    }
    ++refused;
    EXPECT_TRUE(text.starts_with(fmt::format("is cut short: it has {} bytes, and a part that ends at byte ", size))) << text;
  }
  EXPECT_GT(refused, 10u);
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
  EXPECT_EQ(load_error({folder}), "error: plugin " + text.string() + ": is no shared object: it does not begin as an ELF file does");
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
