// docs/reference/ says what the plugins of this build declare.
#include <filesystem>
#include <fstream>
#include <sstream>

#include <gtest/gtest.h>

#include "cli/describe.hpp"

namespace tessera {
namespace {

TEST(Reference, IsWhatTheTypesDeclare) {
  const std::filesystem::path folder = std::filesystem::path(TESSERA_SOURCE_DIR) / "docs/reference";
  const Registry registry = Registry::load({std::filesystem::path(TESSERA_BINARY_DIR) / "plugins"});
  ASSERT_GE(registry.blocks().size(), 5u);
  const auto files = reference_markdown(registry);
  for (const auto& [name, text] : files) {
    std::ifstream in(folder / name, std::ios::binary);
    std::stringstream held;
    held << in.rdbuf();
    EXPECT_EQ(held.str(), text) << name << ": run `tessera describe --markdown docs/reference`";
  }
  for (const auto& entry : std::filesystem::directory_iterator(folder)) EXPECT_TRUE(files.contains(entry.path().filename().string())) << entry.path() << " is of no loaded type";
}

}  // namespace
}  // namespace tessera
