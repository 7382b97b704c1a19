// Errors as values that a user can act on: what, where, why with the numbers, what to do.
#pragma once
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

namespace tessera {

// Exit codes of the command; every Error carries the one it ends the process with.
enum class ExitCode : int {
  kDone = 0,
  kComparison = 1,  // a comparison failed (verify, test)
  kUsage = 2,       // usage or configuration
  kPlugin = 3,
  kRuntime = 4,     // I/O, checkpoint, numerics
  kCollective = 5,  // collective or time-out
};

// A failure with a message for the user: `message` says what, where and why with the numbers; `help`, which may be empty, what to do.
class Error : public std::exception {
 public:
  Error(ExitCode code, std::string message, std::string help = {});
  Error(const Error&);
  ~Error() override;  // out of line: one type_info for every shared object
  ExitCode code() const { return code_; }
  const std::string& message() const { return message_; }
  const std::string& help() const { return help_; }
  // `error: <message>\nhelp: <help>`; a message that begins with a place (`file:line:col: error:`) keeps it.
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  ExitCode code_;
  std::string message_, help_, what_;
};

// One broken rule of a configuration. `key` is the field's own name where a block reports it; the core adds table and place.
struct Issue {
  std::string key;    // "num_heads", or a full path "training.seq_len"
  std::string rule;   // "must be a multiple of num_groups, got 10 % 4 = 2"
  std::string help;   // "nearest: 8, 12"; may be empty
  std::string place;  // "file:line:col"; empty until known
};

// Collects every broken rule of a configuration, so that all are reported at once. Never throws while collecting.
class Issues {
 public:
  void add(std::string key, std::string rule, std::string help = {});
  void add(Issue issue);
  bool empty() const { return list_.empty(); }
  const std::vector<Issue>& list() const { return list_; }
  std::vector<Issue>& list() { return list_; }
  // Throws one Error(kUsage) that holds all issues, in the order of their places. Does nothing when there are none.
  void raise() const;

 private:
  std::vector<Issue> list_;
};

// The candidate nearest to `word` by edit distance, or "" when none is near (more than a third of the letters differ).
std::string nearest(const std::string& word, const std::vector<std::string>& candidates);

}  // namespace tessera
