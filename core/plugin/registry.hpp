// The plugins of one process: loaded once, then immutable and passed down.
#pragma once
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/plugin.hpp"

namespace tessera {

class Registry {
 public:
  // One loaded shared object and the types it brought.
  struct Plugin {
    std::filesystem::path file;
    std::vector<std::string> types;
  };

  // Loads every *.so of the given folders and every given file, in order. A plugin is never unloaded.
  // Throws Error(kPlugin) that names the file and the check that failed: not a shared object, no entry, ABI, build key, struct sizes,
  // throwing constructor, a broken manifest (no type name, a field twice, a symbol that is no pattern letter), or two plugins of one type name (naming both files).
  // A folder that does not exist is an error; a folder without plugins is not. A file that is named twice is loaded once.
  static Registry load(const std::vector<std::filesystem::path>& paths);

  // The types of a manifest made in this process, under the same checks; `file` stands for its shared object in messages. For tests.
  static Registry of(std::unique_ptr<Manifest> manifest, const std::filesystem::path& file = "built-in");

  // plugins/ of this program's build folder or installation, then `extra`, then the colon-separated TESSERA_PLUGIN_PATH.
  static std::vector<std::filesystem::path> search_paths(const std::vector<std::string>& extra);

  const BlockType* block(std::string_view type) const;  // nullptr when there is none
  const HeadType* head(std::string_view type) const;
  const std::vector<const BlockType*>& blocks() const { return blocks_; }  // in the order of their type names
  const std::vector<const HeadType*>& heads() const { return heads_; }
  const std::vector<Plugin>& plugins() const { return plugins_; }
  // The file that brought a type; empty when there is no such type.
  const std::filesystem::path& file_of(std::string_view type) const;

 private:
  void load_file(const std::filesystem::path& file);
  void add(std::unique_ptr<Manifest> manifest, const std::filesystem::path& file);

  std::vector<Plugin> plugins_;
  std::vector<const BlockType*> blocks_;
  std::vector<const HeadType*> heads_;
  std::vector<std::shared_ptr<Manifest>> manifests_;
};

}  // namespace tessera
