// Where this program lies and what lies beside it. Nothing of it is compiled in, so that an installation can be moved.
#pragma once
#include <filesystem>
#include <string>

namespace tessera {

// The folder with bin/ and plugins/: a build folder, or lib/tessera of an installation.
std::filesystem::path program_home();

// What `find_package(tessera)` takes as tessera_DIR: the build folder, or lib/cmake/tessera of the installation. Empty where neither has tesseraConfig.cmake.
std::filesystem::path package_folder();

// How a user calls this program: the name if it was found through PATH, else an absolute path, quoted where a shell needs it.
std::string command_name();

// `text` as one word of a shell.
std::string shell_word(const std::string& text);

// include/ of the libtorch that this process runs on.
std::filesystem::path libtorch_include();

}  // namespace tessera
