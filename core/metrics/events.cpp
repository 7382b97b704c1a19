#include "metrics/events.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstring>
#include <nlohmann/json.hpp>

#include "checkpoint/file.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace fs = std::filesystem;

namespace {

constexpr std::array<uint32_t, 256> crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = c & 1 ? (c >> 1) ^ 0x82f63b78 : c >> 1;
    table[i] = c;
  }
  return table;
}
constexpr auto kCrcTable = crc_table();

template <class T>
std::string raw(T value) {
  std::string bytes(sizeof(T), '\0');
  std::memcpy(bytes.data(), &value, sizeof(T));
  return bytes;
}

// Protocol buffers' wire format: a key of field number and type, then a varint (0), 8 bytes (1), length and bytes (2), or 4 bytes (5).
std::string varint(uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes += static_cast<char>(value | 0x80);
  return bytes + static_cast<char>(value);
}
std::string field(int number, uint64_t value) { return varint(static_cast<uint64_t>(number) << 3) + varint(value); }
std::string field(int number, double value) { return varint(static_cast<uint64_t>(number) << 3 | 1) + raw(value); }
std::string field(int number, float value) { return varint(static_cast<uint64_t>(number) << 3 | 5) + raw(value); }
std::string field(int number, std::string_view bytes) {
  return varint(static_cast<uint64_t>(number) << 3 | 2) + varint(bytes.size()) + std::string(bytes);
}

double wall_time() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

std::string event(int64_t step, const std::string& what) { return field(1, wall_time()) + field(2, static_cast<uint64_t>(step)) + what; }

}  // namespace

uint32_t crc32c(std::string_view bytes) {
  uint32_t c = 0xffffffff;
  for (const char byte : bytes) c = kCrcTable[(c ^ static_cast<unsigned char>(byte)) & 0xff] ^ (c >> 8);
  return ~c;
}

uint32_t masked_crc32c(std::string_view bytes) {
  const uint32_t c = crc32c(bytes);
  return ((c >> 15) | (c << 17)) + 0xa282ead8;
}

EventFile::EventFile(const fs::path& folder, int64_t last_step) {
  char host[256] = "localhost";
  ::gethostname(host, sizeof(host) - 1);
  const std::string name = fmt::format("events.out.tfevents.{}.{}", static_cast<int64_t>(wall_time()), host);
  // A run that begins in the same second gets a file of its own.
  for (int copy = 0; path_.empty() || fs::exists(path_); ++copy) path_ = folder / (copy == 0 ? name : fmt::format("{}.{}", name, copy));
  fd_ = open_append(path_);
  record(event(0, field(3, "brain.Event:2")));
  if (last_step > 0) record(event(last_step + 1, field(7, field(1, uint64_t{1}))));
}

EventFile::~EventFile() { close_file(fd_); }

void EventFile::scalar(std::string_view tag, int64_t step, double value) {
  const std::string entry = field(1, tag) + field(2, static_cast<float>(value));
  record(event(step, field(5, field(1, entry))));
}

void EventFile::line(const nlohmann::json& line) {
  constexpr std::string_view kBy = "_by";
  const auto step = line.at("step").get<int64_t>();
  for (const auto& [key, value] : line.items()) {
    if (value.is_number() && key != "step") scalar(key, step, value.get<double>());
    if (!value.is_object() || !key.ends_with(kBy)) continue;
    for (const auto& [group, part] : value.items())
      if (part.is_number()) scalar(fmt::format("{}/{}", key.substr(0, key.size() - kBy.size()), group), step, part.get<double>());
  }
}

void EventFile::record(const std::string& event) {
  const std::string length = raw<uint64_t>(event.size());
  append_to(fd_, length + raw(masked_crc32c(length)) + event + raw(masked_crc32c(event)), path_);
}

}  // namespace tessera
