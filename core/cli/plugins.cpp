// tessera plugins, tessera describe.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <filesystem>
#include <iostream>

#include "checkpoint/file.hpp"
#include "cli/describe.hpp"
#include "cli/verbs.hpp"

namespace tessera {

void add_plugins(CLI::App& app, Run& run) {
  struct Options {
    std::string type, markdown;
  };
  auto o = std::make_shared<Options>();
  CLI::App* plugins = app.add_subcommand("plugins", "the plugins that load, and the types each brings");
  plugins->callback([&run] {
    run = [] {
      const Registry registry = load_registry();
      for (const Registry::Plugin& plugin : registry.plugins()) fmt::print("{:<14} {}\n", fmt::format("{}", fmt::join(plugin.types, ", ")), plugin.file.string());
      return 0;
    };
  });
  CLI::App* describe = app.add_subcommand("describe", "keys, parameters, state and sources of a block or head type");
  auto* type = describe->add_option("TYPE", o->type, "a block or head type, as `tessera plugins` lists them, a table of the configuration, or sweep");
  describe->add_option("--markdown", o->markdown, "writes the whole reference into this folder instead")->excludes(type);
  describe->callback([o, &run] {
    run = [o] {
      const Registry registry = load_registry();
      if (o->markdown.empty()) {
        if (o->type.empty()) throw Error(ExitCode::kUsage, "describe: give a TYPE or --markdown FOLDER", "`tessera plugins` lists the types");
        std::cout << describe_text(registry, o->type);
        return 0;
      }
      make_folder(o->markdown);
      for (const auto& [name, text] : reference_markdown(registry)) write_file(std::filesystem::path(o->markdown) / name, text);
      return 0;
    };
  });
}

}  // namespace tessera
