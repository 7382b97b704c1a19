// A trace of steps in Chrome's format (chrome://tracing, ui.perfetto.dev).
#pragma once
#include <filesystem>

namespace tessera {

// Records from construction to destruction.
class Profile {
 public:
  explicit Profile(std::filesystem::path file);
  ~Profile();
  Profile(const Profile&) = delete;

 private:
  std::filesystem::path file_;
};

}  // namespace tessera
