#include "plugin/program.hpp"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <string_view>

#include <dlfcn.h>

#include "tessera/error.hpp"

namespace tessera {

namespace fs = std::filesystem;

fs::path program_home() {
  std::error_code code;
  const fs::path program = fs::read_symlink("/proc/self/exe", code);
  if (code) throw Error(ExitCode::kRuntime, "/proc/self/exe cannot be read: " + code.message(), "plugins are looked for beside the program: /proc must be mounted");
  return program.parent_path().parent_path();
}

fs::path package_folder() {
  const fs::path home = program_home();
  for (const fs::path& folder : {home, home.parent_path() / "cmake/tessera"})
    if (fs::exists(folder / "tesseraConfig.cmake")) return folder;
  return {};
}

std::string command_name() {
  const std::string_view name = program_invocation_name;
  if (name.find('/') == std::string_view::npos) return std::string(name);
  return shell_word(fs::absolute(name).lexically_normal().string());
}

std::string shell_word(const std::string& text) {
  const bool plain = std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isalnum(c) || std::string_view("/._-+=:,@%").find(static_cast<char>(c)) != std::string_view::npos; });
  if (plain && !text.empty()) return text;
  std::string out = "'";
  for (const char c : text) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

fs::path libtorch_include() {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<const void*>(&at::get_num_threads), &info) || !info.dli_fname) throw Error(ExitCode::kRuntime, "the folder of libtorch is not known to the dynamic linker");
  return fs::path(info.dli_fname).parent_path().parent_path() / "include";
}

}  // namespace tessera
