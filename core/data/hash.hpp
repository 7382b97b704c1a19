// Counter-based random numbers, permutations that need no memory, and fingerprints of files.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace tessera {

// A well mixed function of its arguments, the same everywhere. Source: SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195).
uint64_t mix(uint64_t a, uint64_t b = 0, uint64_t c = 0);
// Uniform in [0, n) from 64 random bits.
int64_t scale_to(uint64_t bits, int64_t n);

// A permutation of [0, n) chosen by a key: a Feistel network with cycle walking, O(1) memory and time.
// Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
class Permutation {
 public:
  Permutation(int64_t n, uint64_t key);
  int64_t operator()(int64_t i) const;
  int64_t inverse(int64_t i) const;

 private:
  uint64_t round(uint64_t right, int r) const;
  uint64_t n_, key_, mask_;
  int half_bits_;
};

// A 64-bit digest of what is added, as 16 hexadecimal digits. For noticing change, not for keeping secrets.
class Fingerprint {
 public:
  void add(std::string_view bytes);
  void add(uint64_t number);
  // Name, size and content; of files above 1 MiB 64 evenly spaced blocks of 4 KiB, the first and last among them.
  void add_file(const std::string& name, const char* data, int64_t size);
  std::string text() const;

 private:
  uint64_t value_ = 0xcbf29ce484222325;
};

}  // namespace tessera
