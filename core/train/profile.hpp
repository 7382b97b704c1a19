// A trace of one step in Chrome's format (chrome://tracing, ui.perfetto.dev).
#pragma once
#include <filesystem>

namespace tessera {

// Records from construction to destruction when `on`.
class Profile {
 public:
  Profile(bool on, std::filesystem::path file);
  ~Profile();
  Profile(const Profile&) = delete;

 private:
  bool on_;
  std::filesystem::path file_;
};

}  // namespace tessera
