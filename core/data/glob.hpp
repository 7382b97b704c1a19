// File name patterns.
#pragma once
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace tessera {

// The regular files that a pattern names, sorted by their bytes. `*`, `?` and `[a-z]` stand within one name, as in a shell (a leading dot must be
// written); `**` as a whole component stands for any number of folders, links to folders left out. A pattern without these is one file.
// Throws Error(kRuntime) when a folder cannot be read. No file is an empty list.
std::vector<std::filesystem::path> glob(const std::string& pattern);

// The components of `pattern` before its first wildcard: "a/b" of "a/b/**/*.txt".
std::filesystem::path glob_root(const std::string& pattern);

// Replaces every `{name}`. Throws Error(kUsage) that lists the known names for another one.
std::string replace_placeholders(const std::string& text, const std::map<std::string, std::string>& values);

}  // namespace tessera
