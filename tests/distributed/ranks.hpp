// Ranks as processes of rank_program.
#pragma once
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "parallel/rendezvous.hpp"
#include "tests/support/process.hpp"

namespace tessera {

using Words = std::vector<std::string>;
using Settings = std::map<std::string, std::string>;

// Every variable that a launcher may have left in this process's environment.
inline void clear_launchers() {
  for (char** at = environ; *at;) {
    const std::string entry = *at, name = entry.substr(0, entry.find('='));
    bool ours = false;
    for (const char* prefix : {"SLURM_", "OMPI_", "PMIX_", "TORCHELASTIC_", "MASTER_", "LOCAL_"}) ours |= name.starts_with(prefix);
    if (ours || name == "RANK" || name == "WORLD_SIZE" || name == "ENVIRONMENT" || name == "GLOO_SOCKET_IFNAME") unsetenv(name.c_str());
    else ++at;
  }
}

inline int free_port() {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  socklen_t length = sizeof address;
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), length) == 0) getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length);
  close(fd);
  return ntohs(address.sin_port);
}

class Ranks : public FolderTest {
 protected:
  void SetUp() override {
    FolderTest::SetUp();
    folder_ = std::filesystem::canonical(folder_);
  }
  void TearDown() override {
    ranks_.clear();
    EXPECT_EQ(alive(), 0) << "processes are left";
  }
  // Processes that work in this test's folder.
  int alive() const {
    int count = 0;
    std::error_code gone;
    for (const auto& entry : std::filesystem::directory_iterator("/proc"))
      count += std::filesystem::read_symlink(entry.path() / "cwd", gone) == folder_ && !is_zombie(entry.path());
    return count;
  }
  static bool is_zombie(const std::filesystem::path& process) {
    const std::string stat = file_text(process / "stat");
    const size_t after = stat.rfind(") ");
    return after == std::string::npos || stat[after + 2] == 'Z' || stat[after + 2] == 'X';
  }
  void start(const Settings& variables, const Words& words) {
    ranks_.push_back(std::make_unique<Process>(folder_, words, [variables] {
      clear_launchers();
      setenv("OMP_NUM_THREADS", "1", 1);
      for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
    }, "rank_program"));
  }
  // As an agent of torchrun does: it serves the store, all ranks are clients.
  void start_all(int64_t size, const Words& words) {
    uint16_t port = 0;
    store_ = serve_store(port, true, std::chrono::seconds(60));
    for (int64_t rank = 0; rank < size; ++rank)
      start({{"RANK", std::to_string(rank)}, {"WORLD_SIZE", std::to_string(size)}, {"LOCAL_RANK", std::to_string(rank)}, {"LOCAL_WORLD_SIZE", std::to_string(size)}, {"MASTER_ADDR", "127.0.0.1"},
             {"MASTER_PORT", std::to_string(port)}, {"TORCHELASTIC_USE_AGENT_STORE", "True"}, {"TORCHELASTIC_RESTART_COUNT", "0"}, {"TORCHELASTIC_RUN_ID", "none"}},
            words);
  }
  // By hand: rank 0 serves.
  void start_by_hand(int64_t size, const Words& words) {
    const std::string port = std::to_string(free_port());
    for (int64_t rank = size - 1; rank >= 0; --rank)
      start({{"RANK", std::to_string(rank)}, {"WORLD_SIZE", std::to_string(size)}, {"MASTER_ADDR", "localhost"}, {"MASTER_PORT", port}}, words);
    std::reverse(ranks_.begin(), ranks_.end());
  }
  // All ends; those in `left` are killed and not waited for. Generous: a busy machine, and ten seconds until silence counts.
  std::vector<Finished> finish(int64_t left = -1) {
    const auto began = std::chrono::steady_clock::now();
    std::vector<Finished> ends;
    for (size_t i = 0; i < ranks_.size(); ++i) {
      while (static_cast<int64_t>(i) != left && ranks_[i]->running() && std::chrono::steady_clock::now() - began < std::chrono::seconds(60)) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      if (ranks_[i]->running()) {
        EXPECT_EQ(static_cast<int64_t>(i), left) << "rank " << i << " did not end; it said " << ranks_[i]->err();
        ranks_[i]->signal(SIGKILL);
      }
      ends.push_back(ranks_[i]->wait());
    }
    return ends;
  }

  c10::intrusive_ptr<c10d::Store> store_;
  std::vector<std::unique_ptr<Process>> ranks_;
};

inline bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// How many ranks told an error.
inline int errors(const std::vector<Finished>& ends) {
  int count = 0;
  for (const Finished& end : ends) count += has(end.err, "error: ");
  return count;
}

inline void expect_sums(const std::vector<Finished>& ends) {
  const auto size = static_cast<int64_t>(ends.size());
  for (int64_t rank = 0; rank < size; ++rank) {
    const Finished& end = ends[static_cast<size_t>(rank)];
    EXPECT_EQ(end.code, 0) << end.err;
    EXPECT_EQ(end.out, fmt::format("rank {} of {} local {} of {}: {}\n", rank, size, rank, size, static_cast<double>(size - 1) / 2));
    EXPECT_EQ(end.err, fmt::format("rank {} runs\n", rank));
  }
}

}  // namespace tessera
