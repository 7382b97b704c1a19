#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "checkpoint/file.hpp"
#include "metrics/events.hpp"
#include "metrics/machine.hpp"
#include "metrics/metrics_file.hpp"
#include "metrics/progress.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {
namespace fs = std::filesystem;
using nlohmann::json;

std::string message(const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kRuntime);
    return error.message();
  }
  return "no error";
}

class Metrics : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "metrics-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    path_ = folder_ / "metrics.jsonl";
  }
  void TearDown() override { fs::remove_all(folder_); }
  void put(const std::string& text) { std::ofstream(path_, std::ios::binary) << text; }
  fs::path folder_, path_;
};

TEST_F(Metrics, NumbersRoundTripExactly) {
  const double values[] = {0.1, 1.0 / 3, 5e-324, std::numeric_limits<double>::max(), -0.0, 2.3456789012345678, static_cast<double>(1.1f)};
  {
    MetricsFile file(path_, 0);
    for (const double value : values) file.write({{"step", 1}, {"loss", value}});
    file.write({{"step", 2}, {"loss", std::nan("")}, {"grad_norm", std::numeric_limits<double>::infinity()}, {"name", "\xff"}});
  }
  std::ifstream lines(path_);
  std::string line;
  for (const double value : values) {
    ASSERT_TRUE(std::getline(lines, line));
    const double read = json::parse(line)["loss"].get<double>();
    EXPECT_EQ(std::memcmp(&read, &value, sizeof(double)), 0) << line;
  }
  ASSERT_TRUE(std::getline(lines, line));
  EXPECT_TRUE(json::parse(line)["loss"].is_null());
  EXPECT_TRUE(json::parse(line)["grad_norm"].is_null());
  EXPECT_FALSE(std::getline(lines, line));
}

TEST_F(Metrics, ResumingDropsWhatComesAfter) {
  put("{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"st");
  { MetricsFile file(path_, 2), other(folder_ / "new.jsonl", 2); file.write({{"step", 3}, {"loss", 1}}); }
  EXPECT_EQ(read_file(path_), "{\"step\":1}\n{\"step\":2}\n{\"loss\":1,\"step\":3}\n");
  { MetricsFile file(path_, 7); }
  EXPECT_EQ(read_file(path_), "{\"step\":1}\n{\"step\":2}\n{\"loss\":1,\"step\":3}\n");
  put("{\"step\":1}\n{\"step\":2}\n{\"step\":3");
  { MetricsFile file(path_, 3); }
  EXPECT_EQ(read_file(path_), "{\"step\":1}\n{\"step\":2}\n");
  { MetricsFile file(path_, 0); }
  EXPECT_EQ(read_file(path_), "");
}

TEST_F(Metrics, AFileOfAnotherKindIsRefused) {
  put("{\"step\":1}\nhello\n{\"step\":2}\n");
  EXPECT_EQ(message([&] { MetricsFile(path_, 2); }), path_.string() + ":2: not valid JSON at byte 0");
  put("{\"step\":1.5}\n");
  EXPECT_EQ(message([&] { MetricsFile(path_, 2); }), path_.string() + ":1: must be an object with an integer 'step'");
  put("[1]\n");
  EXPECT_EQ(message([&] { MetricsFile(path_, 2); }), path_.string() + ":1: must be an object with an integer 'step'");
  const fs::path none = folder_ / "none" / "m.jsonl";
  EXPECT_EQ(message([&] { MetricsFile(none, 0); }), none.string() + ": cannot be created: No such file or directory");
  const fs::path full = folder_ / "full.jsonl";
  fs::create_symlink("/dev/full", full);
  const int fd = open_append(full);
  EXPECT_EQ(message([&] { append_to(fd, "{}\n", full); }), full.string() + ": cannot be written: No space left on device");
  close_file(fd);
}

TEST_F(Metrics, Crc32cOfPublishedVectors) {
  // RFC 3720, B.4.
  EXPECT_EQ(crc32c("123456789"), 0xe3069283u);
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62a8ab43u);
  EXPECT_EQ(crc32c(""), 0u);
}

// A reader of protocol buffers that knows nothing of the writer: field number to values.
struct Message {
  std::map<int, uint64_t> numbers;
  std::map<int, std::string> bytes;
  explicit Message(const std::string& text) {
    size_t at = 0;
    const auto varint = [&] {
      uint64_t value = 0;
      for (int shift = 0;; shift += 7) {
        const auto byte = static_cast<unsigned char>(text.at(at++));
        value |= static_cast<uint64_t>(byte & 0x7f) << shift;
        if (byte < 0x80) return value;
      }
    };
    while (at < text.size()) {
      const uint64_t key = varint();
      const int number = static_cast<int>(key >> 3);
      if ((key & 7) == 0) {
        numbers[number] = varint();
      } else {
        const size_t size = (key & 7) == 1 ? 8 : (key & 7) == 5 ? 4 : varint();
        bytes[number] = text.substr(at, size);
        EXPECT_EQ(bytes[number].size(), size);
        at += size;
      }
    }
  }
};

template <class T>
T load(const std::string& bytes) {
  T value;
  EXPECT_EQ(bytes.size(), sizeof(T));
  std::memcpy(&value, bytes.data(), sizeof(T));
  return value;
}

std::vector<Message> read_events(const fs::path& path) {
  const std::string text = read_file(path);
  std::vector<Message> events;
  const auto unmasked = [](uint32_t masked) {
    const uint32_t rotated = masked - 0xa282ead8u;
    return rotated >> 17 | rotated << 15;
  };
  for (size_t at = 0; at < text.size();) {
    const std::string length = text.substr(at, 8);
    EXPECT_EQ(unmasked(load<uint32_t>(text.substr(at + 8, 4))), crc32c(length));
    const std::string event = text.substr(at + 12, load<uint64_t>(length));
    EXPECT_EQ(unmasked(load<uint32_t>(text.substr(at + 12 + event.size(), 4))), crc32c(event));
    events.emplace_back(event);
    at += 16 + event.size();
  }
  return events;
}

TEST_F(Metrics, EventsDecodeToWhatWasWritten) {
  EventFile file(folder_);
  file.scalar("loss", 3, 2.5);
  file.scalar(std::string(200, 'x'), int64_t{1} << 40, std::nan(""));
  const std::vector<Message> events = read_events(file.path());
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(events[0].bytes.at(3), "brain.Event:2");
  EXPECT_NEAR(load<double>(events[0].bytes.at(1)), static_cast<double>(::time(nullptr)), 60);
  const Message value(Message(events[1].bytes.at(5)).bytes.at(1));
  EXPECT_EQ(events[1].numbers.at(2), 3u);
  EXPECT_EQ(value.bytes.at(1), "loss");
  EXPECT_EQ(load<float>(value.bytes.at(2)), 2.5f);
  EXPECT_EQ(events[2].numbers.at(2), uint64_t{1} << 40);
  const Message other(Message(events[2].bytes.at(5)).bytes.at(1));
  EXPECT_EQ(other.bytes.at(1), std::string(200, 'x'));
  EXPECT_TRUE(std::isnan(load<float>(other.bytes.at(2))));

  const EventFile resumed(folder_, 7);
  EXPECT_NE(resumed.path(), file.path());
  EXPECT_EQ(resumed.path().filename().string().rfind("events.out.tfevents.", 0), 0u);
  const std::vector<Message> start = read_events(resumed.path());
  ASSERT_EQ(start.size(), 2u);
  EXPECT_EQ(start[1].numbers.at(2), 8u);
  EXPECT_EQ(Message(start[1].bytes.at(7)).numbers.at(1), 1u);
}

TEST_F(Metrics, EventsHaveTheNumbersOfALineAndThoseByGroup) {
  EventFile file(folder_);
  file.line(json{{"step", 5}, {"loss", 2.5}, {"val_accuracy", 0.75}, {"val_accuracy_by", {{"pairs 16", 0.5}, {"pairs 4", 1.0}, {"pairs 32", nullptr}}},
                 {"layers.1.expert_load", {3, 1}}, {"sent_bytes", {{"tp", 7}}}, {"skipped", true}});
  std::map<std::string, float> scalars;
  for (const Message& event : read_events(file.path())) {
    if (!event.bytes.contains(5)) continue;
    EXPECT_EQ(event.numbers.at(2), 5u);
    const Message value(Message(event.bytes.at(5)).bytes.at(1));
    scalars[value.bytes.at(1)] = load<float>(value.bytes.at(2));
  }
  EXPECT_EQ(scalars, (std::map<std::string, float>{{"loss", 2.5f}, {"val_accuracy", 0.75f}, {"val_accuracy/pairs 16", 0.5f}, {"val_accuracy/pairs 4", 1.0f}}));
}

TEST(ProgressLine, Text) {
  Progress p{.step = 12, .steps = 1000, .loss = 2.34561, .val_loss = {}, .grad_norm = 1.234, .tokens_per_s = 12345, .flops_per_s = 1.2e11,
             .peak_share = 0.453, .memory_bytes = 1610612736, .seconds_left = 200};
  EXPECT_EQ(progress_line(p), "step   12/1000  loss 2.3456  norm 1.23  12.3 ktok/s  120 GFLOP/s (45 %)  1.50 GiB  3m20s left");
  p.val_loss = 2.5;
  p.peak_share = 0;
  EXPECT_EQ(progress_line(p), "step   12/1000  loss 2.3456  val 2.5000  norm 1.23  12.3 ktok/s  120 GFLOP/s  1.50 GiB  3m20s left");
  EXPECT_EQ(progress_text(p, true, false), "\r\033[K" + progress_line(p));
  EXPECT_EQ(progress_text(p, true, true), "\r\033[K" + progress_line(p) + "\n");
  EXPECT_EQ(progress_text(p, false, false), progress_line(p) + "\n");
}

TEST(ProgressLine, Units) {
  EXPECT_EQ(format_si(0), "0.000 ");
  EXPECT_EQ(format_si(0.5), "0.500 ");
  EXPECT_EQ(format_si(999.4), "999 ");
  EXPECT_EQ(format_si(999.6), "1.00 k");
  EXPECT_EQ(format_si(99.96e9), "100 G");
  EXPECT_EQ(format_si(1e12), "1.00 T");
  EXPECT_EQ(format_si(std::numeric_limits<double>::infinity()), "inf ");
  EXPECT_EQ(format_bytes(512), "512 B");
  EXPECT_EQ(format_bytes(1536), "1.50 KiB");
  EXPECT_EQ(format_duration(0.4), "0s");
  EXPECT_EQ(format_duration(59.6), "1m00s");
  EXPECT_EQ(format_duration(3900), "1h05m");
  EXPECT_EQ(format_duration(183600), "2d03h");
  EXPECT_EQ(format_duration(std::nan("")), "?");
}

TEST(Machine, MeasuresSomethingPlausible) {
  const double peak = measure_matrix_peak(at::kFloat, at::kCPU), bandwidth = measure_memory_peak(at::kCPU);
  EXPECT_GT(peak, 1e7);
  EXPECT_LT(peak, 1e15);
  EXPECT_GT(bandwidth, 1e7);
  EXPECT_LT(bandwidth, 1e14);
  const int64_t before = current_memory_bytes();
  const std::vector<char> block(size_t{64} << 20, 1);
  EXPECT_GT(current_memory_bytes() + block[5], before + (int64_t{32} << 20));
  EXPECT_GE(peak_memory_bytes(), current_memory_bytes() - (1 << 20));
  const bool fast = supports_fast_bf16();
  RecordProperty("bf16_is_fast", fast);
  const double bf16 = measure_matrix_peak(at::kBFloat16, at::kCPU);
  EXPECT_GT(bf16, 0);
  fmt::print("fp32 {}FLOP/s, bf16 {}FLOP/s, memory {}B/s, fast bf16 {}\n", format_si(peak), format_si(bf16), format_si(bandwidth), fast);
}

}  // namespace
}  // namespace tessera
