// The `tessera` script: set-up, build and test, each case of setup_cases.sh against tools that only pretend.
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <string>

namespace {

class Setup : public testing::TestWithParam<const char*> {};

TEST_P(Setup, Holds) {
  const std::string source = TESSERA_SOURCE_DIR;
  const std::string command = "bash '" + source + "/tests/cli/setup_cases.sh' '" + source + "/tessera' " + GetParam() + " 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  std::string output;
  std::array<char, 4096> part;
  while (const std::size_t got = std::fread(part.data(), 1, part.size(), pipe)) output.append(part.data(), got);
  EXPECT_EQ(pclose(pipe), 0) << output;
}

INSTANTIATE_TEST_SUITE_P(
    Script, Setup,
    testing::Values("becomes_the_command", "does_nothing_twice", "builds_what_changed", "many_at_once_build_once",
                    "one_failure_serves_all_that_wait",
                    "without_rights_says_what_to_install", "installs_as_root_or_with_sudo", "failed_fetch_leaves_nothing",
                    "interrupted_fetch_is_continued", "compile_error_is_shown", "old_compiler_is_refused",
                    "named_torch_is_checked", "device_is_checked", "cuda_fetches_dependencies",
                    "moved_folder_is_configured_afresh", "test_of_a_plugin_builds_its_checks", "test_counts_cases", "test_without_a_match"),
    [](const auto& info) { return std::string(info.param); });

}  // namespace
