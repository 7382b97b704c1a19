// A dataset of Megatron-LM: `.idx` = magic, u64 version, u8 dtype, u64 sequences, u64 documents, i32 lengths[sequences],
// i64 byte offsets[sequences], i64 document index[documents]: document d is the sequences [index[d], index[d + 1]).
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "checkpoint/file.hpp"
#include "data/hash.hpp"
#include "data/source.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace fs = std::filesystem;

namespace {

constexpr int64_t kItem[] = {0, 1, 1, 2, 4, 8, 8, 4, 2};  // bytes by dtype code: -, u8, i8, i16, i32, i64, f64, f32, u16
constexpr int64_t kHeader = 9 + 8 + 1 + 8 + 8;

template <class T>
T load(const char* data) {
  T value;
  std::memcpy(&value, data, sizeof(T));
  return value;
}

template <class T>
void widen(const char* data, std::span<int64_t> out) {
  for (size_t i = 0; i < out.size(); ++i) {
    const T value = load<T>(data + i * sizeof(T));
    if constexpr (std::is_floating_point_v<T>) {
      // An id that no integer equals becomes -1, which the caller's check refuses.
      out[i] = std::isfinite(value) && value == std::trunc(value) && std::abs(value) < T(1LL << 53) ? static_cast<int64_t>(value) : -1;
    } else {
      out[i] = static_cast<int64_t>(value);
    }
  }
}

class MegatronSource final : public Source {
 public:
  explicit MegatronSource(const std::string& prefix)
      : index_(prefix + ".idx"), tokens_(prefix + ".bin"), name_(fmt::format("megatron '{}'", prefix)) {
    read_header();
    check_sequences();
    check_documents();
    Fingerprint print;
    print.add_file("idx", index_.data(), index_.size());
    print.add_file("bin", tokens_.data(), tokens_.size());
    hash_ = print.text();
  }
  int64_t num_documents() const override { return num_documents_; }
  int64_t document_len(int64_t document) const override { return starts_[static_cast<size_t>(document) + 1] - starts_[static_cast<size_t>(document)]; }
  std::string document_name(int64_t document) const override { return fmt::format("{} document {}", tokens_.path().string(), document); }
  const std::string& name() const override { return name_; }
  const std::string& hash() const override { return hash_; }

  void read(int64_t document, int64_t begin, std::span<int64_t> out) const override {
    for (int64_t sequence = boundary(document); sequence < boundary(document + 1) && !out.empty(); ++sequence) {
      const int64_t length = sequence_len(sequence);
      if (begin >= length) {
        begin -= length;
        continue;
      }
      const size_t count = std::min(out.size(), static_cast<size_t>(length - begin));
      copy(tokens_.data() + sequence_at(sequence) + begin * kItem[code_], out.first(count));
      out = out.subspan(count);
      begin = 0;
    }
  }

 private:
  template <class... T>
  [[noreturn]] void fail(fmt::format_string<T...> format, T&&... args) const {
    throw Error(ExitCode::kRuntime, index_.path().string() + ": " + fmt::format(format, std::forward<T>(args)...));
  }
  int64_t sequence_len(int64_t i) const { return load<int32_t>(index_.data() + kHeader + 4 * i); }
  int64_t sequence_at(int64_t i) const { return load<int64_t>(index_.data() + kHeader + 4 * num_sequences_ + 8 * i); }
  int64_t boundary(int64_t i) const { return load<int64_t>(index_.data() + kHeader + 12 * num_sequences_ + 8 * i); }

  void copy(const char* data, std::span<int64_t> out) const {
    switch (code_) {
      case 1: return widen<uint8_t>(data, out);
      case 2: return widen<int8_t>(data, out);
      case 3: return widen<int16_t>(data, out);
      case 4: return widen<int32_t>(data, out);
      case 5: return widen<int64_t>(data, out);
      case 6: return widen<double>(data, out);
      case 7: return widen<float>(data, out);
      default: return widen<uint16_t>(data, out);
    }
  }

  void read_header() {
    const char* data = index_.data();
    if (index_.size() < kHeader) fail("must have a header of {} bytes, but the file has {}", kHeader, index_.size());
    if (std::memcmp(data, "MMIDIDX\0\0", 9) != 0) fail("must begin with the magic 'MMIDIDX'");
    const auto version = load<uint64_t>(data + 9);
    if (version != 1) fail("version must be 1, got {}", version);
    code_ = static_cast<unsigned char>(data[17]);
    if (code_ < 1 || code_ > 8) fail("dtype code must be in [1, 8], got {}", code_);
    const auto sequences = load<uint64_t>(data + 18), documents = load<uint64_t>(data + 26);
    // Counts are compared before they are multiplied: a claim near 2^64 must not wrap around.
    const auto room = static_cast<uint64_t>(index_.size() - kHeader);
    if (sequences > room / 12 || documents > (room - 12 * sequences) / 8 || 12 * sequences + 8 * documents != room)
      fail("{} sequences and {} document boundaries take {} bytes after the header, but the file has {}", sequences, documents,
           static_cast<double>(sequences) * 12 + static_cast<double>(documents) * 8, room);
    if (documents < 1) fail("must have at least 1 document boundary, got 0");
    num_sequences_ = static_cast<int64_t>(sequences);
    num_documents_ = static_cast<int64_t>(documents) - 1;
  }

  void check_sequences() const {
    const int64_t item = kItem[code_];
    for (int64_t i = 0; i < num_sequences_; ++i) {
      const int64_t length = sequence_len(i), at = sequence_at(i);
      if (length < 0) fail("length of sequence {} must not be negative, got {}", i, length);
      if (at < 0 || at > tokens_.size() || length > (tokens_.size() - at) / item)
        fail("sequence {}: {} tokens of {} bytes at byte {} lie outside {}, which has {} bytes", i, length, item, at,
             tokens_.path().filename().string(), tokens_.size());
    }
  }

  void check_documents() {
    if (boundary(0) != 0) fail("document boundary 0 must be 0, got {}", boundary(0));
    starts_.reserve(static_cast<size_t>(num_documents_) + 1);
    starts_.push_back(0);
    for (int64_t i = 1; i <= num_documents_; ++i) {
      const int64_t from = boundary(i - 1), to = boundary(i);
      if (to < from || to > num_sequences_)
        fail("document boundary {} must be in [{}, {}], the boundary before it and the number of sequences, got {}", i, from, num_sequences_, to);
      int64_t length = 0;
      for (int64_t s = from; s < to; ++s) length += sequence_len(s);
      starts_.push_back(starts_.back() + length);
    }
    if (boundary(num_documents_) != num_sequences_)
      fail("the last document boundary must be the number of sequences, {}, got {}", num_sequences_, boundary(num_documents_));
  }

  MappedFile index_, tokens_;
  std::string name_, hash_;
  int code_ = 0;
  int64_t num_sequences_ = 0, num_documents_ = 0;
  std::vector<int64_t> starts_;  // tokens before each document
};

}  // namespace

std::unique_ptr<Source> open_megatron(const std::string& prefix) { return std::make_unique<MegatronSource>(prefix); }

}  // namespace tessera
