// What a type or a core table is, made from its own declarations: for the terminal and for docs/reference/.
#pragma once
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "plugin/registry.hpp"

namespace tessera {

// Source, letters, keys, and the rows of parameters, buffers and decode state. `name` is a block type, a head type, a core table, or "sweep" for the tables of
// a sweep's file.
// Throws Error(kUsage) with the nearest name when there is none.
std::string describe_text(const Registry& registry, const std::string& name);

// A small legal configuration: defaults, and one number for every required key; `given` gets those keys. Null where none of the numbers is legal.
ConfigPtr example_config(const ElementType& type, const Env& env, std::vector<std::pair<std::string, Value>>& given);

// File name -> Markdown: one file for every loaded type, configuration.md for the core's tables, and sweep.md for those of a sweep's file. The same on every machine.
std::map<std::string, std::string> reference_markdown(const Registry& registry);

}  // namespace tessera
