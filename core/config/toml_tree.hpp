// TOML text as a plain tree with places. The only user of toml++.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "tessera/error.hpp"
#include "tessera/schema.hpp"

namespace tessera {

struct TomlEntry;

struct TomlNode {
  enum class Kind { kTable, kTables, kValue, kOther };  // kTables: an array of tables; kOther: dates, and arrays that no Value can hold
  Kind kind = Kind::kTable;
  Value value;             // of kValue; an empty array is an empty list of integers
  std::string text;        // of kOther: `the date 2026-01-01`
  std::string place;       // of the value or of the table's header: `file:line:col`, or `--set a.b=c`
  std::string key_place;   // of its key
  std::vector<TomlEntry> entries;  // of a table, in the order of the keys; of an array, under "0", "1", ...

  const TomlNode* find(std::string_view key) const;
  // The node nearest to `path` ("data.mixture[1].path"): itself, or the table it would be in.
  const TomlNode& at(std::string_view path) const;
  // What it is, for messages: `the string "a"`, `a table`.
  std::string describe() const;
};

struct TomlEntry {
  std::string key;
  TomlNode node;
};

// Throws Error(kUsage) `name:line:col: error: ...` on malformed TOML, on more than 1 MiB, and on nesting that no configuration has.
TomlNode parse_toml(std::string_view text, const std::string& name);

// Inserts `a.b=c` into the tree: c as TOML, or a bare word as a string. Key parts may be quoted. What is wrong with it goes to `issues`.
void apply_set(TomlNode& root, const std::string& set, Issues& issues);

// `key` as TOML writes it: bare or quoted.
std::string toml_key(std::string_view key);

}  // namespace tessera
