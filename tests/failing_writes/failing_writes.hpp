// The system's calls that open, write, flush and rename, made to fail one at a time below a folder. In a program that links failing_writes.cpp they
// are told so by plan_failure(); in another that preloads libfailing_writes.so by FAILING_WRITES_* of its environment, see plan_of_environment.
#pragma once
#include <cstdint>
#include <string>

namespace tessera {

struct FailurePlan {
  std::string below;     // absolute; calls on other files are neither counted nor touched. "": none are
  int64_t at = 0;        // the call that fails, counted from 1; 0: none
  int error = 0;         // errno
  bool stays = false;    // so do all later ones, but those that read or close, as on a disk that is full
  bool halves = false;   // a write at `at` writes half of its bytes, and the next call fails
  bool flushes = true;   // false: fsync returns at once
  int delay_us = 0;      // before each call
  std::string log;       // a file that gets a line for each call: "3 pwrite /folder/file", the failed with a '!' behind the number
};
struct FailureReport {
  int64_t calls = 0;           // counted
  std::string failed, path;    // the first call that failed ("mkdir", "open", "open folder", "open to read", "write", ...), and its file as given
};

void plan_failure(const FailurePlan& plan);
FailureReport end_of_failures();  // and no call fails any more

}  // namespace tessera
