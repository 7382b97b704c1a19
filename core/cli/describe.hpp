// What a type or a core table is, made from its own declarations: for the terminal and for docs/reference/.
#pragma once
#include <map>
#include <string>

#include "plugin/registry.hpp"

namespace tessera {

// Source, letters, keys, and the rows of parameters, buffers and decode state. `name` is a block type, a head type or a core table.
// Throws Error(kUsage) with the nearest name when there is none.
std::string describe_text(const Registry& registry, const std::string& name);

// File name -> Markdown: one file for every loaded type, and configuration.md for the core's tables. The same on every machine.
std::map<std::string, std::string> reference_markdown(const Registry& registry);

}  // namespace tessera
