// The command: parses the line, runs the verb, turns errors into text and exit codes.
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <new>
#include <system_error>

#include "cli/verbs.hpp"

namespace {

int usage(const CLI::App& app, const CLI::ParseError& error, const std::string& first) {
  if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
  if (!first.empty() && first[0] != '-' && app.get_subcommands().empty()) {
    std::vector<std::string> verbs;
    for (const CLI::App* verb : app.get_subcommands([](const CLI::App*) { return true; })) verbs.push_back(verb->get_name());
    const std::string near = tessera::nearest(first, verbs);
    std::cerr << "error: no verb '" << first << "'\nhelp: " << (near.empty() ? "" : "did you mean '" + near + "'? ") << "verbs: " << fmt::format("{}", fmt::join(verbs, ", ")) << "\n";
    return static_cast<int>(tessera::ExitCode::kUsage);
  }
  std::cerr << "error: " << error.what() << "\nhelp: tessera --help lists the verbs, tessera VERB --help their options\n";
  return static_cast<int>(tessera::ExitCode::kUsage);
}

// Output that nobody got is no success. One more write gives the reason, which the first to fail may have left anywhere.
int flush_output(int code) {
  if (std::fflush(stdout) == 0 && !std::ferror(stdout)) return code;
  const bool again = ::write(STDOUT_FILENO, "\n", 1) < 0;
  std::cerr << "error: standard output: cannot be written" << (again ? ": " + std::generic_category().message(errno) : "") << std::endl;
  return static_cast<int>(tessera::ExitCode::kRuntime);
}

int command(int argc, char** argv) {
  using namespace tessera;
  CLI::App app{"tessera: hybrid sequence models from a pattern string", "tessera"};
  app.set_version_flag("--version", TESSERA_VERSION);
  app.require_subcommand(1);
  Run run;
  for (auto add : {add_train, add_generate, add_eval, add_inspect, add_convert, add_verify, add_plan, add_bench, add_sweep, add_report, add_launch, add_plugins, add_new_plugin, add_test}) add(app, run);
  app.footer("In the source tree, `./tessera setup` and `./tessera test [FILTER] [--all]` set up, build and run the tests.");
  try {
    app.parse(argc, argv);
    return run();
  } catch (const CLI::ParseError& error) {
    return usage(app, error, argc > 1 ? argv[1] : "");
  } catch (const Error& error) {
    if (!error.message().empty()) std::cerr << error.what() << std::endl;  // else another rank tells it
    return static_cast<int>(error.code());
  } catch (const c10::Error& error) {
    std::cerr << "error: libtorch: " << error.what_without_backtrace() << std::endl;
  } catch (const std::bad_alloc&) {
    std::cerr << "error: out of memory\nhelp: lower training.local_batch_size or training.seq_len; `tessera plan` says what a model needs" << std::endl;
  } catch (const std::exception& error) {
    if (!std::ferror(stdout)) std::cerr << "error: " << error.what() << std::endl;  // else flush_output() says it
  }
  return static_cast<int>(ExitCode::kRuntime);
}

}  // namespace

int main(int argc, char** argv) {
  // A file must not be opened as standard output or error because that was closed: what is printed would go into it.
  for (int fd = 0; fd <= 2; ++fd)
    if (::fcntl(fd, F_GETFD) == -1) ::open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY);
  // A write beyond a limit on file sizes is an error that names the file, as on a full disk.
  std::signal(SIGXFSZ, SIG_IGN);
  return flush_output(command(argc, argv));
}
