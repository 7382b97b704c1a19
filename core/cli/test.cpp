// tessera test: starts the conformance program that lies beside this one.
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "cli/verbs.hpp"
#include "plugin/program.hpp"

namespace tessera {

void add_test(CLI::App& app, Run& run) {
  CLI::App* verb = app.add_subcommand("test", "holds the types of a plugin (--plugin FILE.so) to what every block must hold");
  verb->set_help_flag();
  verb->prefix_command();
  verb->callback([verb, &run] {
    run = [verb] {
      const std::filesystem::path program = program_home() / "bin/tessera_conformance";
      if (!std::filesystem::exists(program))
        throw Error(ExitCode::kUsage, fmt::format("test: {} has not been built", program.string()), "cmake --build BUILD --target tessera_conformance, in a build with TESSERA_TESTS on");
      std::vector<std::string> words = verb->remaining();
      words.insert(words.begin(), program.string());
      std::vector<char*> argv;
      for (std::string& word : words) argv.push_back(word.data());
      argv.push_back(nullptr);
      execv(argv[0], argv.data());
      throw Error(ExitCode::kRuntime, fmt::format("test: {} cannot be started: {}", program.string(), std::strerror(errno)));
      return 0;
    };
  });
}

}  // namespace tessera
