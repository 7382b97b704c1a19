// What the value of an option may be; the message is for people: "--steps: must be an integer in [1, 9223372036854775807], got 0".
#pragma once
#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

namespace tessera {

inline CLI::Validator whole(int64_t low, int64_t high = std::numeric_limits<int64_t>::max()) {
  return {[=](std::string& text) -> std::string {
            int64_t value = 0;
            const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
            if (error == std::errc() && end == text.data() + text.size() && value >= low && value <= high) return {};
            return fmt::format("must be an integer in [{}, {}], got {}", low, high, text);
          },
          ""};
}

// A finite number.
inline CLI::Validator number(double low, double high = std::numeric_limits<double>::max()) {
  return {[=](std::string& text) -> std::string {
            double value = NAN;
            const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
            if (error == std::errc() && end == text.data() + text.size() && value >= low && value <= high) return {};
            const bool open = high == std::numeric_limits<double>::max();
            return fmt::format("must be a number in [{}, {}, got {}", low, open ? "inf)" : fmt::format("{}]", high), text);
          },
          ""};
}

}  // namespace tessera
