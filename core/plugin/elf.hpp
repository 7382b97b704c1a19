// What the system's loader does not check of a shared object before it maps it: of a file that was cut short it makes a crash.
#pragma once
#include <filesystem>
#include <string>

namespace tessera {

// Why `file` cannot be a shared object of this program's kind ("is cut short: ..."), or "". Reads its headers alone. Source: System V ABI, chapter 4 and 5.
std::string elf_problem(const std::filesystem::path& file);

}  // namespace tessera
