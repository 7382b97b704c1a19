#include "plugin/registry.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iostream>
#include <set>

#include <boost/dll/shared_library.hpp>
#include <dlfcn.h>
#include <fmt/format.h>
#include <unistd.h>

#include "plugin/elf.hpp"
#include "plugin/program.hpp"

namespace tessera {

namespace {
namespace fs = std::filesystem;

constexpr const char* kEntry = "tessera_plugin_" TESSERA_STR(TESSERA_ABI);
constexpr const char* kRebuild = "rebuild the plugin against this tessera's headers and libtorch";
constexpr const char* kSeeAbi = "a plugin ends with TESSERA_PLUGIN(Type) in one of its files";

[[noreturn]] void fail(const fs::path& file, const std::string& what, const std::string& help = {}) {
  throw Error(ExitCode::kPlugin, fmt::format("plugin {}: {}", file.string(), what), help);
}

// Every check that can be made on plain data. What follows the size is read only when the sizes agree.
void check_head(const fs::path& file, const PluginHead* head) {
  if (!head) fail(file, fmt::format("{}() returned null", kEntry), kSeeAbi);
  if (head->size != sizeof(PluginHead)) fail(file, fmt::format("its head has {} bytes, this tessera's has {}", head->size, sizeof(PluginHead)), kRebuild);
  if (head->abi != TESSERA_ABI) fail(file, fmt::format("ABI {}, this tessera has ABI {}", head->abi, TESSERA_ABI), kRebuild);
  const std::string theirs = head->build_key ? head->build_key : "";
  if (theirs != core_build_key()) fail(file, fmt::format("build key '{}', this tessera has '{}'", theirs, core_build_key()), kRebuild);
  const auto size = [&](const char* name, uint32_t theirs, size_t ours) {
    if (theirs != ours) fail(file, fmt::format("its {} has {} bytes, this tessera's has {}", name, theirs, ours), kRebuild);
  };
  size("BlockType", head->block_type_size, sizeof(BlockType));
  size("HeadType", head->head_type_size, sizeof(HeadType));
  size("Param", head->param_size, sizeof(Param));
  size("Field", head->field_size, sizeof(Field));
  if (!head->make) fail(file, "its head has no `make`", kSeeAbi);
}

bool is_bare_key(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isalnum(c) || c == '_' || c == '-'; });
}

void check_name(const fs::path& file, const char* name) {
  if (!name || !*name) fail(file, "a type without a name", "set `type` in its kInfo");
  if (!is_bare_key(name)) fail(file, fmt::format("type name '{}' must consist of letters, digits, '_' and '-'", name));
}

void check_fields(const fs::path& file, const ElementType& element) {
  std::set<std::string> seen;
  for (const Field& field : element.fields().list) {
    const std::string name = fmt::format("{}.{}", element.type(), field.key);
    if (!is_bare_key(field.key)) fail(file, fmt::format("field '{}': a key must consist of letters, digits, '_' and '-'", name));
    if (field.key == "type") fail(file, fmt::format("field '{}': `type` is taken: it names the block type of a table", name));
    if (!seen.insert(field.key).second) fail(file, fmt::format("field '{}' is declared twice", name));
    if (!field.get || !field.set) fail(file, fmt::format("field '{}' has no member", name));
    const std::string rule = field.required_ ? "" : broken_rule(field, field.default_value);
    if (!rule.empty()) fail(file, fmt::format("field '{}': the default breaks the field's own rule: {}", name, rule));
  }
}

void check_symbols(const fs::path& file, const BlockInfo& info) {
  for (const Symbol& s : info.symbols) {
    if (!s.dialect && !s.symbol) continue;
    if (!s.dialect || !*s.dialect) fail(file, fmt::format("{}: symbol '{}' names no dialect", info.type, s.symbol));
    if (s.symbol <= 0x20 || s.symbol >= 0x7f || s.symbol == '|' || s.symbol == '/')
      fail(file, fmt::format("{}: symbol 0x{:02x} of dialect '{}' cannot stand in a pattern", info.type, static_cast<unsigned char>(s.symbol), s.dialect),
           "a symbol is one printable ASCII character other than '|' and '/'");
  }
}

void check_manifest(const fs::path& file, const Manifest& manifest) {
  if (manifest.blocks.empty() && manifest.heads.empty()) fail(file, "brings no block or head type", kSeeAbi);
  for (const auto& block : manifest.blocks) {
    if (!block) fail(file, "its manifest holds a null block type");
    check_name(file, block->info().type);
    check_symbols(file, block->info());
    check_fields(file, *block);
  }
  for (const auto& head : manifest.heads) {
    if (!head) fail(file, "its manifest holds a null head type");
    check_name(file, head->info().type);
    check_fields(file, *head);
  }
}

std::string current_error() {
  try {
    throw;
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "an exception that is no std::exception";
  }
}

std::unique_ptr<Manifest> make_manifest(const fs::path& file, const PluginHead& head) {
  try {
    return std::unique_ptr<Manifest>(head.make());
  } catch (...) {
    fail(file, fmt::format("its types cannot be made: {}", current_error()));
  }
}

// The *.so files of a folder in the order of their names, or the file itself.
std::vector<fs::path> files_of(const fs::path& path) {
  std::error_code code;
  if (!fs::exists(path, code)) fail(path, "no such file or folder", "plugins are looked for in the build's plugins/, in [plugins] paths and in TESSERA_PLUGIN_PATH");
  if (!fs::is_directory(path, code)) return {path};
  std::vector<fs::path> files;
  fs::directory_iterator entries(path, code);
  if (code) fail(path, fmt::format("the folder cannot be read: {}", code.message()));
  for (const auto& entry : entries)
    if (entry.path().extension() == ".so" && !entry.is_directory(code)) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  return files;
}

// An exception of a static initialiser leaves the system's loader locked, where it leaves it at all, so that the process cannot go on. This is how it ends
// as with any other plugin that is refused.
class InitialiserGuard {
 public:
  explicit InitialiserGuard(const fs::path& file) : old_(std::set_terminate(end)) { file_ = &file; }
  ~InitialiserGuard() { std::set_terminate(old_); }
  [[noreturn]] static void end() {
    const std::string what = std::current_exception() ? current_error() : "std::terminate was called";
    std::cerr << Error(ExitCode::kPlugin, fmt::format("plugin {}: its static initialisers failed: {}", file_->string(), what)).what() << std::endl;
    ::_exit(static_cast<int>(ExitCode::kPlugin));
  }

 private:
  static inline const fs::path* file_ = nullptr;
  std::terminate_handler old_;
};

void check_file(const fs::path& file) {
  std::string problem;
  try {
    problem = elf_problem(file);
  } catch (const Error& error) {
    throw Error(ExitCode::kPlugin, "plugin " + error.message());
  }
  if (!problem.empty()) fail(file, problem);
}

// A plugin with libtessera_core in it, or beside it under another name, has types of its own that this process takes for others.
void check_core(const fs::path& file, void* library) {
  Dl_info ours{};
  if (!dladdr(reinterpret_cast<void*>(&core_build_key), &ours) || !ours.dli_sname) return;
  void* const theirs = dlsym(library, ours.dli_sname);
  Dl_info where{};
  if (theirs && theirs != ours.dli_saddr && dladdr(theirs, &where))
    fail(file, fmt::format("uses a copy of libtessera_core of its own, {}, this tessera has {}", where.dli_fname, ours.dli_fname), "link tessera::core, as tessera_add_block does, and neither its sources nor an archive of them");
}

}  // namespace

void Registry::load_file(const fs::path& file) {
  check_file(file);
  // Never deleted: objects, autograd nodes and vtables of a plugin live until the process ends, and closing it would pull them away.
  static auto* const kept = new std::deque<boost::dll::shared_library>();
  boost::dll::shared_library* const library = &kept->emplace_back();
  boost::dll::fs::error_code code;
  try {
    const InitialiserGuard guard(file);
    library->load(boost::dll::fs::path(fs::absolute(file).string()), boost::dll::load_mode::rtld_now | boost::dll::load_mode::rtld_local, code);
  } catch (...) {
    InitialiserGuard::end();
  }
  if (code) {
    const char* why = dlerror();
    fail(file, fmt::format("cannot be loaded: {}", why ? why : "not a shared object"), kRebuild);
  }
  check_core(file, library->native());
  if (!library->has(kEntry)) fail(file, fmt::format("exports no entry `{}`", kEntry), fmt::format("{}; the number is the ABI it was built for", kSeeAbi));
  const PluginHead* head = nullptr;
  try {
    head = library->get<const PluginHead*()>(kEntry)();
  } catch (...) {
    fail(file, fmt::format("{}() failed: {}", kEntry, current_error()));
  }
  check_head(file, head);
  add(make_manifest(file, *head), file);
}

void Registry::add(std::unique_ptr<Manifest> manifest, const fs::path& file) {
  if (!manifest) fail(file, "its `make` returned null", kSeeAbi);
  try {
    check_manifest(file, *manifest);
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    fail(file, fmt::format("its manifest cannot be read: {}", error.what()));
  }
  Plugin plugin{.file = file};
  const auto add_type = [&](std::string_view type) {
    const fs::path& other = file_of(type);
    const bool here = std::find(plugin.types.begin(), plugin.types.end(), type) != plugin.types.end();
    if (!other.empty() || here)
      fail(file, fmt::format("type '{}' is already loaded from {}", type, here ? file.string() : other.string()), "leave one of the two out, or rename its type");
    plugin.types.emplace_back(type);
  };
  for (const auto& block : manifest->blocks) add_type(block->type());
  for (const auto& head : manifest->heads) add_type(head->type());
  for (const auto& block : manifest->blocks) blocks_.push_back(block.get());
  for (const auto& head : manifest->heads) heads_.push_back(head.get());
  const auto by_type = [](const ElementType* a, const ElementType* b) { return a->type() < b->type(); };
  std::sort(blocks_.begin(), blocks_.end(), by_type);
  std::sort(heads_.begin(), heads_.end(), by_type);
  plugins_.push_back(std::move(plugin));
  manifests_.push_back(std::move(manifest));
}

Registry Registry::load(const std::vector<fs::path>& paths) {
  Registry registry;
  std::set<fs::path> seen;
  for (const fs::path& path : paths) {
    for (const fs::path& file : files_of(path)) {
      std::error_code code;
      const fs::path same = fs::weakly_canonical(file, code);
      if (seen.insert(code ? file : same).second) registry.load_file(file);
    }
  }
  return registry;
}

Registry Registry::of(std::unique_ptr<Manifest> manifest, const fs::path& file) {
  Registry registry;
  registry.add(std::move(manifest), file);
  return registry;
}

std::vector<fs::path> Registry::search_paths(const std::vector<std::string>& extra) {
  std::vector<fs::path> paths{program_home() / "plugins"};
  paths.insert(paths.end(), extra.begin(), extra.end());
  if (const char* list = std::getenv("TESSERA_PLUGIN_PATH")) {
    std::string_view rest = list;
    while (!rest.empty()) {
      const auto end = std::min(rest.find(':'), rest.size());
      if (end > 0) paths.emplace_back(rest.substr(0, end));
      rest.remove_prefix(std::min(end + 1, rest.size()));
    }
  }
  return paths;
}

namespace {
template <class T>
const T* find_type(const std::vector<const T*>& list, std::string_view type) {
  const auto at = std::find_if(list.begin(), list.end(), [&](const T* t) { return t->type() == type; });
  return at == list.end() ? nullptr : *at;
}
}  // namespace

const BlockType* Registry::block(std::string_view type) const { return find_type(blocks_, type); }
const HeadType* Registry::head(std::string_view type) const { return find_type(heads_, type); }

const fs::path& Registry::file_of(std::string_view type) const {
  static const fs::path none;
  for (const Plugin& plugin : plugins_)
    if (std::find(plugin.types.begin(), plugin.types.end(), type) != plugin.types.end()) return plugin.file;
  return none;
}

}  // namespace tessera
