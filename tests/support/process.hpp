// The command as a child process: exit code, what it wrote, signals to it.
#pragma once
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/folder.hpp"

namespace tessera {

struct Finished {
  int code = -1;  // exit status; 128 + signal where a signal killed it
  std::string out, err;
};

// One run of the built binary with both outputs in files.
class Process {
 public:
  // `prepare` runs in the child before the program starts: limits, environment.
  Process(const std::filesystem::path& folder, const std::vector<std::string>& args, const std::function<void()>& prepare = {}, const std::string& program = "tessera") {
    static int number = 0;
    ++number;
    out_ = folder / ("out-" + std::to_string(number)), err_ = folder / ("err-" + std::to_string(number));
    std::vector<std::string> words{std::string(TESSERA_BINARY_DIR) + "/bin/" + program};
    words.insert(words.end(), args.begin(), args.end());
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    pid_ = fork();
    if (pid_ != 0) return;
    const int in = open("/dev/null", O_RDONLY);
    const int out = open(out_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), err = open(err_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    dup2(in, 0), dup2(out, 1), dup2(err, 2);
    if (chdir(folder.c_str()) != 0) _exit(126);
    setenv("OMP_WAIT_POLICY", "passive", 1);  // idle threads that spin take minutes on a busy machine
    if (prepare) prepare();
    execv(argv[0], argv.data());
    _exit(127);
  }
  ~Process() {
    if (pid_ > 0) kill(pid_, SIGKILL), waitpid(pid_, nullptr, 0);
  }
  Process(const Process&) = delete;

  pid_t pid() const { return pid_; }
  std::string err() const { return file_text(err_); }  // so far
  void signal(int number) const { kill(pid_, number); }
  bool running() {
    if (pid_ > 0 && waitpid(pid_, &status_, WNOHANG) == pid_) pid_ = -1;
    return pid_ > 0;
  }
  // Waits until `holds`, or the end of the process. False when neither came within a minute.
  bool wait_until(const std::function<bool()>& holds) {
    for (int i = 0; i < 12000; ++i) {
      if (holds()) return true;
      if (!running()) return holds();
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return false;
  }
  Finished wait() {
    if (pid_ > 0) waitpid(pid_, &status_, 0), pid_ = -1;
    return {.code = WIFEXITED(status_) ? WEXITSTATUS(status_) : 128 + WTERMSIG(status_), .out = file_text(out_), .err = file_text(err_)};
  }

 private:
  std::filesystem::path out_, err_;
  pid_t pid_ = -1;
  int status_ = 0;
};

inline Finished run_tessera(const std::filesystem::path& folder, const std::vector<std::string>& args, const std::function<void()>& prepare = {}) {
  return Process(folder, args, prepare).wait();
}

}  // namespace tessera
