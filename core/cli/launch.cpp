// tessera launch -n N VERB ...
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "cli/verbs.hpp"
#include "parallel/launcher.hpp"
#include "tessera/error.hpp"

namespace tessera {

namespace {
constexpr int64_t kMostRanks = 256;
}

void add_launch(CLI::App& app, Run& run) {
  auto size = std::make_shared<int64_t>(0);
  CLI::App* verb = app.add_subcommand("launch", "runs a verb on several ranks on this machine: launch -n N VERB ...");
  verb->add_option("-n", *size, "ranks: processes of this command, each with its share of the cores unless OMP_NUM_THREADS is set")->required()->type_name("N");
  verb->prefix_command();
  verb->footer("Rank 0's output is this command's; the others' messages come with their rank in front. The exit code is that of the first rank that fails.");
  verb->callback([&app, verb, size, &run] {
    run = [&app, verb, size] {
      const std::vector<std::string> words = verb->remaining();
      std::vector<std::string> verbs;
      for (const CLI::App* each : app.get_subcommands([](const CLI::App*) { return true; }))
        if (each != verb) verbs.push_back(each->get_name());
      const std::string help = fmt::format("tessera launch -n {} train CONFIG; verbs: {}", std::max<int64_t>(1, std::min(*size, kMostRanks)), fmt::join(verbs, ", "));
      if (*size < 1 || *size > kMostRanks) throw Error(ExitCode::kUsage, fmt::format("launch: -n must be an integer in [1, {}], got {}", kMostRanks, *size), help);
      if (words.empty()) throw Error(ExitCode::kUsage, "launch: no verb to run", help);
      if (std::find(verbs.begin(), verbs.end(), words[0]) == verbs.end())
        throw Error(ExitCode::kUsage, fmt::format("launch: {}", words[0] == "launch" ? "'launch' cannot run itself" : words[0].starts_with('-') ? fmt::format("unknown option '{}' before the verb", words[0]) : fmt::format("no verb '{}'", words[0])), help);
      return launch_ranks(*size, words);
    };
  });
}

}  // namespace tessera
