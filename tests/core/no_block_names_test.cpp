// The core knows blocks by their tables alone: no block or head type is named in it.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

namespace {

namespace fs = std::filesystem;

TEST(Core, NamesNoBlockType) {
  const fs::path root = TESSERA_SOURCE_DIR;
  std::vector<std::string> types;
  for (const auto& entry : fs::directory_iterator(root / "plugins"))
    if (entry.path().extension() == ".cpp") types.push_back(entry.path().stem().string());
  ASSERT_GE(types.size(), 6u);
  int files = 0;
  for (const auto& entry : fs::recursive_directory_iterator(root / "core")) {
    if (entry.path().extension() != ".cpp" && entry.path().extension() != ".hpp") continue;
    ++files;
    std::ostringstream text;
    text << std::ifstream(entry.path()).rdbuf();
    for (const std::string& type : types)
      EXPECT_EQ(text.str().find('"' + type + '"'), std::string::npos) << entry.path() << " names \"" << type << "\": make it a row of the block's tables";
  }
  EXPECT_GE(files, 50);
}

}  // namespace
