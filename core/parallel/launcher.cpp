#include "parallel/launcher.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <pty.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <set>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "parallel/rendezvous.hpp"
#include "parallel/watch.hpp"
#include "tessera/error.hpp"

extern char** environ;

namespace tessera {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::seconds;

// After a rank failed: for the others to end by themselves (their watch takes two seconds), and then for a handler of SIGTERM.
constexpr seconds kGrace{15}, kHandler{10};

bool begins_error(const std::string& line) { return line.starts_with("error: ") || line.find(": error: ") != std::string::npos; }

// One rank's process, and what it writes to stderr.
struct Rank {
  int64_t number = 0;
  pid_t pid = -1;
  int errors = -1;  // the reading end
  int code = -1;    // -1: runs
  bool ordered = false;  // to end by the launcher, for another's failure
  std::string line, block;

  // Rank 0's words are the launcher's, as they come. Of the others, each line is told with its rank, but an error is kept back: it is their last word,
  // and the same as another rank's where all fail alike.
  void take(const char* bytes, size_t count) {
    if (number == 0) write_all(std::string(bytes, count));
    for (size_t i = 0; i < count; ++i) {
      if (bytes[i] != '\n') {
        line += bytes[i];
        continue;
      }
      end_line();
    }
  }
  void end_line() {
    if (number == 0) line.erase(0, line.find_last_of("\r") + 1), line.erase(0, line.starts_with("\033[K") ? 3 : 0);
    if (!block.empty() || begins_error(line)) block += line + "\n";
    else if (number != 0) write_all(fmt::format("{}[rank {}] {}\n", isatty(STDERR_FILENO) ? "\r\033[K" : "", number, line));
    line.clear();
  }
  static void write_all(const std::string& text) {
    for (size_t done = 0; done < text.size();) {
      const ssize_t wrote = ::write(STDERR_FILENO, text.data() + done, text.size() - done);
      if (wrote < 0 && errno != EINTR) return;  // nobody reads any more
      done += wrote > 0 ? static_cast<size_t>(wrote) : 0;
    }
  }
  // Reads what is there. False at the end.
  bool read() {
    char bytes[4096];
    while (true) {
      const ssize_t count = ::read(errors, bytes, sizeof bytes);
      if (count > 0) take(bytes, static_cast<size_t>(count));
      else if (count < 0 && errno == EINTR) continue;
      else return count < 0 && errno == EAGAIN;
    }
  }
};

class Launcher {
 public:
  Launcher(int64_t size, std::vector<std::string> words) : words_(std::move(words)), ranks_(static_cast<size_t>(size)) {
    // Signals are read, not handled: each goes to every rank once. One that is ignored stays so. Before the store's thread begins: it must not take them.
    sigset_t own;
    sigemptyset(&own);
    for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP, SIGCHLD}) sigaddset(&own, signal);
    sigprocmask(SIG_BLOCK, &own, &before_);
    signals_ = ::signalfd(-1, &own, SFD_CLOEXEC | SFD_NONBLOCK);
    uint16_t port = 0;
    server_ = serve_store(port, /*loopback=*/true, seconds(300));
    for (size_t i = 0; i < ranks_.size(); ++i) start(static_cast<int64_t>(i), port);
  }
  ~Launcher() {
    for (const Rank& rank : ranks_)
      if (rank.pid > 0 && rank.code < 0) ::kill(rank.pid, SIGKILL), ::waitpid(rank.pid, nullptr, 0);
    for (const Rank& rank : ranks_)
      if (rank.errors >= 0) ::close(rank.errors);
    if (signals_ >= 0) ::close(signals_);
    sigprocmask(SIG_SETMASK, &before_, nullptr);
  }

  int wait() {
    while (running()) {
      std::vector<pollfd> ready{{.fd = signals_, .events = POLLIN, .revents = 0}};
      for (const Rank& rank : ranks_) ready.push_back({.fd = rank.errors, .events = POLLIN, .revents = 0});  // -1 is passed over
      ::poll(ready.data(), ready.size(), 1000);
      for (size_t i = 0; i < ranks_.size(); ++i)
        if (ready[i + 1].revents && !ranks_[i].read()) ::close(ranks_[i].errors), ranks_[i].errors = -1;
      take_signals();
      collect();
      hurry();
    }
    return report();
  }

 private:
  void start(int64_t number, uint16_t port) {
    Rank& rank = ranks_[static_cast<size_t>(number)];
    rank.number = number;
    const std::vector<std::pair<std::string, std::string>> own{
        {"RANK", std::to_string(number)}, {"LOCAL_RANK", std::to_string(number)}, {"WORLD_SIZE", std::to_string(ranks_.size())}, {"LOCAL_WORLD_SIZE", std::to_string(ranks_.size())},
        {"MASTER_ADDR", "127.0.0.1"}, {"MASTER_PORT", std::to_string(port)}, {"TORCHELASTIC_USE_AGENT_STORE", "True"}, {"TORCHELASTIC_RUN_ID", ""}, {"TORCHELASTIC_RESTART_COUNT", ""}};
    std::vector<std::string> variables;
    bool threads = false;
    for (char** at = environ; *at; ++at) {
      const std::string entry = *at, name = entry.substr(0, entry.find('='));
      threads |= name == "OMP_NUM_THREADS";
      if (std::none_of(own.begin(), own.end(), [&](const auto& mine) { return mine.first == name; })) variables.push_back(entry);
    }
    for (const auto& [name, value] : own) variables.push_back(name + "=" + value);
    cpu_set_t cores;
    const int64_t num_cores = ::sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
    if (!threads) variables.push_back(fmt::format("OMP_NUM_THREADS={}", std::max<int64_t>(1, num_cores / static_cast<int64_t>(ranks_.size()))));
    std::vector<char*> envp, argv{const_cast<char*>("tessera")};
    for (std::string& entry : variables) envp.push_back(entry.data());
    for (std::string& word : words_) argv.push_back(word.data());
    envp.push_back(nullptr), argv.push_back(nullptr);

    // Rank 0 draws its progress line where the launcher's stderr is a terminal.
    int ends[2];
    termios raw{};
    winsize window{};
    const bool terminal = number == 0 && ::isatty(STDERR_FILENO) && ::ioctl(STDERR_FILENO, TIOCGWINSZ, &window) == 0;
    ::cfmakeraw(&raw);
    if ((terminal ? ::openpty(&ends[0], &ends[1], nullptr, &raw, &window) : ::pipe2(ends, O_CLOEXEC)) != 0)
      throw Error(ExitCode::kRuntime, fmt::format("launch: no pipe to rank {}: {}", number, std::strerror(errno)));
    for (const int end : ends) ::fcntl(end, F_SETFD, FD_CLOEXEC);
    rank.errors = ends[0];
    ::fcntl(ends[0], F_SETFL, O_NONBLOCK);
    const pid_t launcher = ::getpid();
    rank.pid = ::fork();
    if (rank.pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != launcher) ::_exit(127);
      ::setpgid(0, 0);  // a terminal's signals reach the launcher alone
      ::signal(SIGTTOU, SIG_IGN);  // though in the background, rank 0 writes
      ::dup2(ends[1], STDERR_FILENO);
      if (number != 0) {
        const int null = ::open("/dev/null", O_RDWR);
        ::dup2(null, STDIN_FILENO), ::dup2(null, STDOUT_FILENO);
      }
      ::sigprocmask(SIG_SETMASK, &before_, nullptr);
      ::execve("/proc/self/exe", argv.data(), envp.data());
      ::_exit(127);
    }
    ::close(ends[1]);
    if (rank.pid < 0) throw Error(ExitCode::kRuntime, fmt::format("launch: rank {} cannot be started: {}", number, std::strerror(errno)), "a limit on processes may be reached: ulimit -u");
  }

  bool running() const {
    return std::any_of(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return rank.code < 0; });
  }
  void send(int signal) const {
    for (const Rank& rank : ranks_)
      if (rank.code < 0) ::kill(rank.pid, signal);
  }

  void take_signals() {
    signalfd_siginfo info;
    while (::read(signals_, &info, sizeof info) == sizeof info) {
      const auto signal = static_cast<int>(info.ssi_signo);
      if (signal == SIGCHLD) continue;
      if (signal == SIGTSTP) {
        send(SIGSTOP);
        ::raise(SIGSTOP);
        send(SIGCONT);
        continue;
      }
      forwarded_ = signal;
      send(signal);
    }
  }

  void collect() {
    for (Rank& rank : ranks_) {
      int status = 0;
      if (rank.code >= 0 || ::waitpid(rank.pid, &status, WNOHANG) != rank.pid) continue;
      const bool killed = WIFSIGNALED(status);
      rank.code = killed ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
      ended_.push_back(rank.number);
      // A stop that was asked for is no failure: the others are saving too.
      if (rank.code == 0 || rank.ordered || (forwarded_ && rank.code == 128 + forwarded_)) continue;
      if (failed_at_ == Clock::time_point()) failed_at_ = Clock::now();
      try {
        Watch::tell(run_store(server_, "run/0"), rank.number, killed ? "was ended by " + signal_text(rank.code - 128) : fmt::format("ended with exit code {}", rank.code));
      } catch (const std::exception&) {  // SIGTERM will do it
      }
    }
  }

  // After a failure, ends those that did not end by themselves.
  void hurry() {
    if (failed_at_ == Clock::time_point()) return;
    const auto since = Clock::now() - failed_at_;
    const int next = since > kGrace + kHandler ? SIGKILL : since > kGrace ? SIGTERM : 0;
    if (next == sent_) return;
    for (Rank& rank : ranks_) rank.ordered |= rank.code < 0;
    send(sent_ = next);
  }

  static std::string signal_text(int signal) { return fmt::format("signal {} ({})", signal, ::strsignal(signal)); }

  // Every error once, in the order in which the ranks ended. The exit code of the first that failed on its own account.
  int report() {
    for (Rank& rank : ranks_) {
      if (rank.errors >= 0) rank.read();
      if (!rank.line.empty() && rank.number != 0) rank.end_line();
    }
    std::set<std::string> told{ranks_[0].block};
    int first = 0;
    const auto weight = [](const Rank& rank) { return rank.code == 0 ? 0 : rank.ordered ? 1 : rank.code == static_cast<int>(ExitCode::kCollective) ? 2 : 3; };
    int heaviest = 0;
    for (const int64_t number : ended_) {
      const Rank& rank = ranks_[static_cast<size_t>(number)];
      if (weight(rank) > heaviest) heaviest = weight(rank), first = rank.code;
      if (rank.code > 128 && !rank.ordered && rank.code - 128 != forwarded_)
        Rank::write_all(fmt::format("error: rank {} was ended by {}\n{}", number, signal_text(rank.code - 128), rank.code == 137 ? "help: the machine may have run out of memory: `dmesg` tells\n" : ""));
      if (number == 0 || rank.block.empty() || !told.insert(rank.block).second) continue;
      std::string block = fmt::format("[rank {}] ", number);
      for (const char c : rank.block.substr(0, rank.block.size() - 1)) block += c == '\n' ? fmt::format("\n[rank {}] ", number) : std::string(1, c);
      Rank::write_all(block + "\n");
    }
    return first;
  }

  std::vector<std::string> words_;
  std::vector<Rank> ranks_;
  c10::intrusive_ptr<c10d::Store> server_;
  sigset_t before_{};
  int signals_ = -1, forwarded_ = 0, sent_ = 0;
  Clock::time_point failed_at_{};
  std::vector<int64_t> ended_;  // in the order in which they did
};

}  // namespace

int launch_ranks(int64_t size, const std::vector<std::string>& words) { return Launcher(size, words).wait(); }

}  // namespace tessera
