// A table of TOML into a struct by its schema, with every mistake told.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "config/toml_tree.hpp"

namespace tessera {

// Reads the keys of `node`, a table that issues call `path`, into `values`; `also` are keys that are read elsewhere. Integers are taken where numbers are wanted.
void read_fields(const std::string& path, const TomlNode& node, const Fields& fields, void* values, Issues& issues, const std::vector<std::string>& also = {});
// An issue for each required field that `node` (nullptr: no table) does not have, at `place`.
void require_fields(const std::string& path, const TomlNode* node, const Fields& fields, const std::string& place, Issues& issues);

// `a, b, c`, or `none`.
std::string join(const std::vector<std::string>& words);
// `did you mean 'steps'? keys: steps, seed`.
std::string did_you_mean(const std::string& word, const std::vector<std::string>& known, const char* kind);

// The text of a configuration file. Throws Error(kUsage) for what is no readable file.
std::string read_config_text(const std::filesystem::path& file);

}  // namespace tessera
