#include "data/glob.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <fnmatch.h>

#include <set>
#include <system_error>

#include "tessera/error.hpp"

namespace tessera {
namespace fs = std::filesystem;

namespace {

bool has_wildcard(const std::string& text) { return text.find_first_of("*?[") != std::string::npos; }

std::vector<fs::directory_entry> list(const fs::path& folder) {
  std::error_code code;
  std::vector<fs::directory_entry> entries;
  fs::directory_iterator it(folder.empty() ? "." : folder, code);
  for (; !code && it != fs::directory_iterator(); it.increment(code)) entries.push_back(*it);
  if (code) throw Error(ExitCode::kRuntime, fmt::format("{}: folder cannot be read: {}", folder.string(), code.message()));
  return entries;
}

void match(const fs::path& folder, const std::vector<std::string>& parts, size_t next, std::set<std::string>& found) {
  std::error_code code;
  if (next == parts.size()) {
    if (fs::is_regular_file(folder, code)) found.insert(folder.native());
    return;
  }
  const std::string& part = parts[next];
  if (!has_wildcard(part)) {
    if (fs::exists(folder / part, code)) match(folder / part, parts, next + 1, found);
    return;
  }
  if (!folder.empty() && !fs::is_directory(folder, code)) return;
  if (part == "**") {
    match(folder, parts, next + 1, found);
    for (const fs::directory_entry& entry : list(folder)) {
      const std::string name = entry.path().filename().string();
      if (name[0] == '.' || entry.is_symlink(code) || !entry.is_directory(code)) continue;
      match(folder / name, parts, next, found);
    }
    return;
  }
  for (const fs::directory_entry& entry : list(folder)) {
    const std::string name = entry.path().filename().string();
    if (::fnmatch(part.c_str(), name.c_str(), FNM_PERIOD) == 0) match(folder / name, parts, next + 1, found);
  }
}

}  // namespace

std::vector<fs::path> glob(const std::string& pattern) {
  std::vector<std::string> parts;
  const fs::path path(pattern);
  for (const fs::path& part : path.relative_path())
    if (!part.empty() && !(part == "**" && !parts.empty() && parts.back() == "**")) parts.push_back(part.string());  // two say what one says, in many more ways
  // A final ** means the files in all those folders.
  if (!parts.empty() && parts.back() == "**") parts.push_back("*");
  std::set<std::string> found;  // by bytes: paths compare by components
  match(path.root_path(), parts, 0, found);
  return {found.begin(), found.end()};
}

fs::path glob_root(const std::string& pattern) {
  fs::path root;
  for (const fs::path& part : fs::path(pattern)) {
    if (has_wildcard(part.string())) return root;
    root /= part;
  }
  return root.parent_path();
}

std::string replace_placeholders(const std::string& text, const std::map<std::string, std::string>& values) {
  std::string result;
  for (size_t i = 0; i < text.size();) {
    const size_t open = text.find('{', i), close = open == std::string::npos ? open : text.find('}', open);
    if (close == std::string::npos) return result + text.substr(i);
    const std::string name = text.substr(open + 1, close - open - 1);
    const auto it = values.find(name);
    if (it == values.end()) {
      std::vector<std::string> names;
      for (const auto& [known, unused] : values) names.push_back("{" + known + "}");
      throw Error(ExitCode::kUsage, fmt::format("data.path: unknown placeholder '{{{}}}' in '{}'", name, text),
                  fmt::format("placeholders: {}", fmt::join(names, ", ")));
    }
    result += text.substr(i, open - i) + it->second;
    i = close + 1;
  }
  return result;
}

}  // namespace tessera
