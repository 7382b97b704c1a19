// tessera new-plugin: a block that builds, passes its tests and trains as it is, to be changed into another one.
#include <fmt/format.h>
#include <unistd.h>

#include <cctype>
#include <filesystem>
#include <string_view>

#include "checkpoint/file.hpp"
#include "cli/describe.hpp"
#include "cli/new_plugin_files.hpp"
#include "cli/verbs.hpp"
#include "plugin/program.hpp"

namespace tessera {

namespace {

namespace fs = std::filesystem;

// "gated_mlp" -> "GatedMlpBlock": the ending keeps it apart from the names of the contract.
std::string class_name(const std::string& name) {
  std::string out;
  bool upper = true;
  for (const char c : name) {
    if (c != '_') out += upper ? static_cast<char>(std::toupper(static_cast<unsigned char>(c))) : c;
    upper = c == '_';
  }
  return out + "Block";
}

void replace_all(std::string& text, const std::string& from, const std::string& to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) text.replace(at, from.size(), to);
}

// What `symbol` is in the card dialect, or "".
std::string holder(const Registry& registry, char symbol) {
  for (const BlockType* type : registry.blocks())
    for (const Symbol& used : type->info().symbols)
      if (used.dialect && used.symbol == symbol && std::string_view(used.dialect) == "card") return std::string(type->type());
  return {};
}

std::string free_letters(const Registry& registry) {
  std::string letters;
  for (char c = 'A'; c <= 'Z'; ++c)
    if (holder(registry, c).empty()) letters += fmt::format("{}{}", letters.empty() ? "" : " ", c);
  return letters;
}

struct Options {
  std::string name, symbol, folder;
  bool in_tree = false;
};

// Refuses what could not be built or loaded, before anything is written.
void check_options(const Options& o, const Registry& registry) {
  const auto lower = [](unsigned char c) { return c >= 'a' && c <= 'z'; };
  bool good = !o.name.empty() && lower(o.name[0]);
  for (unsigned char c : o.name) good = good && (lower(c) || (c >= '0' && c <= '9') || c == '_');
  if (!good) throw Error(ExitCode::kUsage, fmt::format("NAME: must be lower case letters, digits and '_', beginning with a letter, got {}", to_toml(Value(o.name))));
  const bool printable = o.symbol.size() == 1 && o.symbol[0] > 0x20 && o.symbol[0] < 0x7f;
  if (!printable || std::string_view("|/'\\").find(o.symbol[0]) != std::string_view::npos)
    throw Error(ExitCode::kUsage, fmt::format("--symbol: must be one printable ASCII character other than | / ' and \\, got {}", to_toml(Value(o.symbol))));
  if (!fs::is_directory(o.folder))
    throw Error(ExitCode::kUsage, fmt::format("--folder: no folder {}", to_toml(Value(o.folder))), o.in_tree ? "run it where plugins/ is, or name a folder that exists" : "name a folder that exists");
  if (const fs::path& other = registry.file_of(o.name); !other.empty())
    throw Error(ExitCode::kUsage, fmt::format("NAME: type '{}' is there already, from {}", o.name, other.string()), "choose another NAME");
  if (const std::string type = holder(registry, o.symbol[0]); !type.empty())
    throw Error(ExitCode::kUsage, fmt::format("--symbol: '{}' is {} in the card dialect", o.symbol, type),
                fmt::format("free: {}; [symbols] of a configuration can bind any letter to any block", free_letters(registry)));
}

std::string filled(std::string text, const std::vector<std::pair<std::string, std::string>>& values) {
  for (const auto& [name, value] : values) replace_all(text, "@" + name + "@", value);
  return text;
}

std::string block_file(const Options& o) { return filled(kBlockFile, {{"CLASS", class_name(o.name)}, {"NAME", o.name}, {"SYMBOL", o.symbol}}); }

int write_in_tree(const Options& o) {
  const fs::path file = fs::path(o.folder) / (o.name + ".cpp");
  if (fs::exists(file)) throw Error(ExitCode::kUsage, fmt::format("{}: exists already", file.string()), "choose another NAME");
  write_file(file, block_file(o));
  fmt::print("{}: written, a gated feed-forward block to change into yours. The next ./tessera command builds it:\n"
             "  ./tessera describe {}\n"
             "  ./tessera train configs/debug_model.toml --set 'model.hybrid_override_pattern=M{}*{}' --set blocks.{}.intermediate_size=256 --set run.name={}\n"
             "docs/adding_a_block.md explains each part.\n",
             file.string(), o.name, o.symbol, o.symbol, o.name, o.name);
  return 0;
}

// A pattern in which the new block, which mixes no tokens, stands behind each of up to two loaded blocks that do, and the tables of those.
std::pair<std::string, std::string> pattern_and_tables(const Registry& registry, const std::string& symbol) {
  const Env env{.hidden_size = 64, .vocab_size = 256, .num_layers = 4};
  std::string pattern, tables;
  for (const BlockType* type : registry.blocks()) {
    std::vector<std::pair<std::string, Value>> given;
    const ConfigPtr config = example_config(*type, env, given);
    if (!config || type->state(config, env).empty() || pattern.size() == 4) continue;
    for (const Symbol& own : type->info().symbols) {
      if (!own.dialect || std::string_view(own.dialect) != "card") continue;
      pattern += own.symbol + symbol;
      tables += fmt::format("\n[blocks.{}]\n", type->type());
      for (const auto& [key, value] : given) tables += fmt::format("{} = {}\n", key, to_toml(value));
      break;
    }
  }
  return {pattern.empty() ? symbol + symbol : pattern, tables};
}

int write_folder(const Options& o, const Registry& registry) {
  const fs::path folder = fs::absolute(fs::path(o.folder) / o.name).lexically_normal(), aside = fs::path(o.folder) / ("." + o.name + ".tmp-" + std::to_string(getpid()));
  if (fs::exists(folder)) throw Error(ExitCode::kUsage, fmt::format("{}: exists already", folder.string()), "choose another NAME or --folder");
  const fs::path package = package_folder();
  if (package.empty())
    throw Error(ExitCode::kRuntime, fmt::format("{} has no tesseraConfig.cmake, which a block outside the tree is built with", program_home().string()), "build tessera with its own CMakeLists.txt, or install it");
  const std::string tessera = command_name();
  const std::string build = fmt::format("cmake -G Ninja -B build -Dtessera_DIR={} && cmake --build build", shell_word(package.string()));
  const std::string test = fmt::format("{} test --plugin build/{}.so", tessera, o.name), train = fmt::format("{} train train-{}.toml", tessera, o.name);
  const auto [pattern, tables] = pattern_and_tables(registry, o.symbol);
  const std::vector<std::pair<std::string, std::string>> values{
      {"NAME", o.name}, {"VERSION", TESSERA_VERSION}, {"TESSERA", tessera}, {"BUILD", build}, {"TEST", test}, {"TRAIN", train}, {"OTHERS", tables}, {"PATTERN", to_toml(Value(pattern))}};
  try {
    make_folder(aside);
    write_file(aside / (o.name + ".cpp"), block_file(o));
    write_file(aside / "CMakeLists.txt", filled(kCMakeFile, values));
    write_file(aside / "README.md", filled(kReadmeFile, values));
    write_file(aside / (o.name + ".toml"), "intermediate_size = 24\n");
    write_file(aside / ("train-" + o.name + ".toml"), filled(kTrainFile, values));
    rename_into_place(aside, folder);
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(aside, ignored);
    throw;
  }
  fmt::print("{}: written, a gated feed-forward block to change into yours. To build it, test it and train a small model of it:\n"
             "  cd {}\n  {}\n  {}\n  {}\n"
             "README.md there says more, docs/adding_a_block.md explains each part.\n",
             folder.string(), shell_word(folder.string()), build, test, train);
  return 0;
}

}  // namespace

void add_new_plugin(CLI::App& app, Run& run) {
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("new-plugin", "writes a new block, which builds, passes its tests and trains as it is");
  verb->add_option("NAME", o->name, "the block type")->required();
  verb->add_option("--symbol", o->symbol, "its letter in the card dialect")->required();
  verb->add_option("--folder", o->folder, "where the folder NAME is made; default: here; with --in-tree: where NAME.cpp is written; default: plugins");
  verb->add_flag("--in-tree", o->in_tree, "NAME.cpp alone, into plugins/ of the source tree, which builds what lies there");
  verb->callback([o, &run] {
    run = [o] {
      if (o->folder.empty()) o->folder = o->in_tree ? "plugins" : ".";
      const Registry registry = load_registry();
      check_options(*o, registry);
      return o->in_tree ? write_in_tree(*o) : write_folder(*o, registry);
    };
  });
}

}  // namespace tessera
