#include "data/hash.hpp"

#include <fmt/format.h>

#include <bit>
#include <cstring>

namespace tessera {

namespace {

constexpr int kRounds = 8;

uint64_t finish(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

uint64_t mix(uint64_t a, uint64_t b, uint64_t c) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;
  return finish(finish(finish(a + kGolden) + b + kGolden) + c + kGolden);
}

int64_t scale_to(uint64_t bits, int64_t n) {
  return static_cast<int64_t>(static_cast<unsigned __int128>(bits) * static_cast<uint64_t>(n) >> 64);
}

Permutation::Permutation(int64_t n, uint64_t key) : n_(static_cast<uint64_t>(n)), key_(key) {
  const int bits = n <= 1 ? 0 : std::bit_width(n_ - 1);
  half_bits_ = std::max(1, (bits + 1) / 2);
  mask_ = (uint64_t{1} << half_bits_) - 1;
}

uint64_t Permutation::round(uint64_t right, int r) const { return mix(key_, static_cast<uint64_t>(r), right) & mask_; }

int64_t Permutation::operator()(int64_t i) const {
  uint64_t x = static_cast<uint64_t>(i);
  do {
    uint64_t left = x >> half_bits_, right = x & mask_;
    for (int r = 0; r < kRounds; ++r) {
      const uint64_t next = left ^ round(right, r);
      left = right;
      right = next;
    }
    x = left << half_bits_ | right;
  } while (x >= n_);
  return static_cast<int64_t>(x);
}

int64_t Permutation::inverse(int64_t i) const {
  uint64_t x = static_cast<uint64_t>(i);
  do {
    uint64_t left = x >> half_bits_, right = x & mask_;
    for (int r = kRounds - 1; r >= 0; --r) {
      const uint64_t previous = right ^ round(left, r);
      right = left;
      left = previous;
    }
    x = left << half_bits_ | right;
  } while (x >= n_);
  return static_cast<int64_t>(x);
}

void Fingerprint::add(uint64_t number) { value_ = mix(value_, number); }

void Fingerprint::add(std::string_view bytes) {
  add(bytes.size());
  size_t i = 0;
  for (; i + 8 <= bytes.size(); i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes.data() + i, 8);
    value_ = finish((value_ ^ word) * 0x9e3779b97f4a7c15 + 1);
  }
  uint64_t rest = 0;
  if (i < bytes.size()) std::memcpy(&rest, bytes.data() + i, bytes.size() - i);
  add(rest);
}

void Fingerprint::add_file(const std::string& name, const char* data, int64_t size) {
  constexpr int64_t kWhole = 1 << 20, kBlock = 4096, kBlocks = 64;
  add(name);
  add(static_cast<uint64_t>(size));
  if (size <= kWhole) {
    add(std::string_view(data, static_cast<size_t>(size)));
    return;
  }
  const int64_t room = size - kBlock;
  for (int64_t i = 0; i < kBlocks; ++i) {
    const int64_t at = room / (kBlocks - 1) * i + room % (kBlocks - 1) * i / (kBlocks - 1);
    add(std::string_view(data + at, kBlock));
  }
}

std::string Fingerprint::text() const { return fmt::format("{:016x}", value_); }

}  // namespace tessera
