// Plugins that the loader refuses, as the command says it: one message, exit code 3.
#include "tests/bad_plugins/refusals.hpp"

#include <gtest/gtest.h>

#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

class BadPlugin : public TinyRunTest {
 protected:
  Finished with_plugins(const std::string& path, const std::vector<std::string>& words = {"plugins"}, const std::vector<std::string>& sets = {}) const {
    return tessera(words, sets, [path] { setenv("TESSERA_PLUGIN_PATH", path.c_str(), 1); });
  }
  void expect_refused(const std::string& path, const std::string& error) const {
    const Finished end = with_plugins(path);
    EXPECT_EQ(end.code, 3) << path;
    EXPECT_EQ(end.out, "") << path;
    EXPECT_EQ(end.err, error + "\n");
  }
};

TEST_F(BadPlugin, EachIsRefusedWithItsReason) {
  for (const Refusal& refusal : refusals()) expect_refused(bad_plugin(refusal.name).string(), "error: plugin " + bad_plugin(refusal.name).string() + ": " + refusal.why);
  const std::string eager = bad_plugin("throwing_initialiser").string();
  expect_refused(eager, "error: plugin " + eager + ": its static initialisers failed: no device today");
  const std::string a = bad_plugin("duplicate_a").string(), b = bad_plugin("duplicate_b").string();
  expect_refused(a + ":" + b, "error: plugin " + b + ": type 'twice' is already loaded from " + a + "\nhelp: leave one of the two out, or rename its type");
}

TEST_F(BadPlugin, FilesThatAreNone) {
  const std::string good = file_text(bad_plugin("duplicate_a"));
  put_file(folder_ / "cut.so", good.substr(0, 3000));
  put_file(folder_ / "arm.so", std::string(good).replace(18, 2, std::string("\xf3\0", 2)));
  put_file(folder_ / "text.so", "a text");
  const auto name = [&](const char* file) { return (folder_ / file).string(); };
  const Finished cut = with_plugins(name("cut.so"));
  EXPECT_EQ(cut.code, 3);
  EXPECT_EQ(cut.err.find("error: plugin " + name("cut.so") + ": is cut short: it has 3000 bytes, and a part that ends at byte "), 0u) << cut.err;
  const Finished arm = with_plugins(name("arm.so"));
  EXPECT_EQ(arm.code, 3);
  EXPECT_EQ(arm.err.find("error: plugin " + name("arm.so") + ": is built for RISC-V, this tessera is for "), 0u) << arm.err;
  expect_refused(name("text.so"), "error: plugin " + name("text.so") + ": is no shared object: it does not begin as an ELF file does");
  expect_refused(name("none"), "error: plugin " + name("none") + ": no such file or folder\nhelp: plugins are looked for in the build's plugins/, in [plugins] paths and in TESSERA_PLUGIN_PATH");
}

// It loads, and fails where the model is made.
TEST_F(BadPlugin, AConstructorThatThrowsNamesItsLayer) {
  const Finished end = with_plugins(bad_plugin("throwing_constructor").string(), {"train", "tiny.toml", "--quiet"},
                                    {"model.hybrid_override_pattern=EU", "symbols.U=unmade"});
  EXPECT_EQ(end.code, 3);
  EXPECT_EQ(end.err, "error: layer layers.1 (unmade), construction: no block today\n");
}

}  // namespace
}  // namespace tessera
