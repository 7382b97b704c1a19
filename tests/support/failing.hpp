// A child process in which calls that write fail, or take their time; see tests/failing_writes.
#pragma once
#include <cstdlib>
#include <functional>
#include <string>

#include "tests/failing_writes/failing_writes.hpp"

namespace tessera {

// For Process(): the plan is that of the program which it starts.
inline std::function<void()> failing(const FailurePlan& plan) {
  return [plan] {
    const auto set = [](const char* name, const std::string& value) {
      if (!value.empty()) setenv((std::string("FAILING_WRITES_") + name).c_str(), value.c_str(), 1);
    };
    const char* asan = std::getenv("ASAN_OPTIONS");
    setenv("ASAN_OPTIONS", (std::string(asan ? asan : "") + ":verify_asan_link_order=0").c_str(), 1);
    setenv("LD_PRELOAD", TESSERA_BINARY_DIR "/lib/libfailing_writes.so", 1);
    set("BELOW", plan.below);
    set("AT", std::to_string(plan.at));
    set("ERROR", std::to_string(plan.error));
    set("STAYS", plan.stays ? "1" : "");
    set("HALVES", plan.halves ? "1" : "");
    set("DELAY_US", std::to_string(plan.delay_us));
    set("LOG", plan.log);
  };
}

}  // namespace tessera
