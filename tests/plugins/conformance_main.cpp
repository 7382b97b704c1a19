// tessera test [FILTER] --plugin FILE: the conformance suite over the types that a plugin brings, told in lines that need no knowledge of the suite.
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <iostream>

#include "tests/support/conformance.hpp"

namespace tessera::conformance {
namespace {

constexpr size_t kMostMessages = 4;
char running[256];  // what a crash interrupts
int passed = 0, failed = 0;

// "NothingDependsOnLaterTokens" -> "nothing depends on later tokens".
std::string sentence(const std::string& name) {
  std::string out;
  for (const char c : name) {
    if (std::isupper(static_cast<unsigned char>(c)) && !out.empty()) out += ' ';
    out += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  return out;
}

void replace(std::string& text, const std::string& from, const std::string& to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) text.replace(at, from.size(), to);
}

// GoogleTest's frame around a message left out, later lines indented.
std::string plain(std::string text) {
  for (const char* frame : {"Failed\n", "C++ exception with description \"", "\" thrown in the test body."}) replace(text, frame, "");
  while (!text.empty() && text.back() == '\n') text.pop_back();
  replace(text, "\n", "\n            ");
  return text;
}

class Report : public testing::EmptyTestEventListener {
  static std::string label(const testing::TestInfo& test) {
    const std::string check = test.name();
    return fmt::format("{}: {}", check.substr(check.find('/') + 1), sentence(check.substr(0, check.find('/'))));
  }
  void OnTestStart(const testing::TestInfo& test) override { *fmt::format_to_n(running, sizeof running - 1, "{}", label(test)).out = 0; }
  void OnTestEnd(const testing::TestInfo& test) override {
    const testing::TestResult& result = *test.result();
    const bool skipped = result.Skipped();
    fmt::print("  {:<8}{}\n", skipped ? "skipped" : result.Passed() ? "ok" : "FAILED", label(test));
    size_t told = 0, more = 0;
    for (int i = 0; i < result.total_part_count(); ++i) {
      if (result.GetTestPartResult(i).passed()) continue;
      if (told == kMostMessages) ++more;
      else ++told, fmt::print("          - {}\n", plain(result.GetTestPartResult(i).message()));
    }
    if (more) fmt::print("          and {} more\n", more);
    std::fflush(stdout);
    passed += !skipped && result.Passed(), failed += result.Failed();
  }
};

// A block's crash is a failed check, not the end of the report. Nothing here allocates but the formatting of a few numbers into a buffer.
void crashed(int number) {
  char text[512];
  const auto end = fmt::format_to_n(text, sizeof text, "  CRASHED {} (signal {})\n{} passed, {} failed\n", running, number, passed, failed + 1);
  [[maybe_unused]] const auto written = write(STDOUT_FILENO, text, std::min(end.size, sizeof text));
  _exit(static_cast<int>(ExitCode::kComparison));
}

int run(int argc, char** argv) {
  std::vector<std::string> files, sizes;
  std::string filter;
  CLI::App app{"tessera test: holds the block and head types of a plugin to what every one must hold", "tessera test"};
  app.add_option("FILTER", filter, "a part of a check's name, or a pattern with * and :");
  app.add_option("--plugin", files, "the plugin; as often as wanted; default: every plugin that loads")->type_name("FILE.so")->allow_extra_args(false);
  app.add_option("--sizes", sizes, "a folder with <type>[.<variant>].toml: the sizes that a type is tested in; also looked for beside the plugin and one folder above")->type_name("FOLDER")->allow_extra_args(false);
  app.footer("Without such a file the sizes are those that the type's schema suggests: 8 or so for every required key.");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);
    throw Error(ExitCode::kUsage, fmt::format("test: {}", error.what()), "tessera test --help lists the options");
  }
  std::string path;
  for (const std::string& file : files) {
    if (!std::filesystem::is_regular_file(file)) throw Error(ExitCode::kUsage, fmt::format("--plugin: no file {}", to_toml(Value(file))), "name the .so that the build made");
    const std::string absolute = std::filesystem::absolute(file).string();
    if (absolute.find(':') != std::string::npos) throw Error(ExitCode::kUsage, fmt::format("--plugin: a path with ':' cannot be loaded, got {}", to_toml(Value(absolute))));
    path += absolute + ":";
    options().plugins.emplace_back(file);
  }
  for (const std::string& folder : sizes) {
    if (!std::filesystem::is_directory(folder)) throw Error(ExitCode::kUsage, fmt::format("--sizes: no folder {}", to_toml(Value(folder))));
    options().sizes.emplace_back(folder);
  }
  const char* more = std::getenv("TESSERA_PLUGIN_PATH");
  setenv("TESSERA_PLUGIN_PATH", (path + (more ? more : "")).c_str(), 1);

  std::vector<Case> all = block_cases(), heads = head_cases();
  all.insert(all.end(), heads.begin(), heads.end());
  for (const Case& c : all) {
    if (!c.given) throw Error(ExitCode::kUsage, how_to_add(c));
    fmt::print("{}: tested with {}\n", c.name(), c.from);
  }
  std::fflush(stdout);
  if (!filter.empty() && filter.find_first_of("*?:") == std::string::npos) filter = "*" + filter + "*";
  if (!filter.empty()) testing::GTEST_FLAG(filter) = filter;
  int one = 1;
  testing::InitGoogleTest(&one, argv);
  auto& listeners = testing::UnitTest::GetInstance()->listeners();
  delete listeners.Release(listeners.default_result_printer());
  listeners.Append(new Report);
  for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) std::signal(number, crashed);
  [[maybe_unused]] const int code = RUN_ALL_TESTS();
  if (!testing::UnitTest::GetInstance()->test_to_run_count()) throw Error(ExitCode::kUsage, fmt::format("test: no check matches {}", to_toml(Value(filter))));
  fmt::print("{} passed, {} failed\n", passed, failed);
  return static_cast<int>(failed ? ExitCode::kComparison : ExitCode::kDone);
}

}  // namespace
}  // namespace tessera::conformance

int main(int argc, char** argv) {
  try {
    return tessera::conformance::run(argc, argv);
  } catch (const tessera::Error& error) {
    std::cerr << error.what() << std::endl;
    return static_cast<int>(error.code());
  } catch (const std::exception& error) {
    std::cerr << "error: test: " << error.what() << std::endl;
    return static_cast<int>(tessera::ExitCode::kRuntime);
  }
}
