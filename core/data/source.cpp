#include "data/source.hpp"

#include <fmt/format.h>

#include "data/hash.hpp"

namespace tessera {

Source::~Source() = default;

namespace {

class RandomSource final : public Source {
 public:
  RandomSource(int64_t vocab_size, int64_t document_len, uint64_t seed)
      : vocab_size_(vocab_size), document_len_(document_len), seed_(seed),
        name_(fmt::format("random ids below {} in documents of {} tokens", vocab_size, document_len)) {
    Fingerprint print;
    print.add(name_);
    print.add(seed);
    hash_ = print.text();
  }
  int64_t num_documents() const override { return kEndless; }
  int64_t document_len(int64_t) const override { return document_len_; }
  std::string document_name(int64_t document) const override { return fmt::format("random document {}", document); }
  const std::string& name() const override { return name_; }
  const std::string& hash() const override { return hash_; }

  void read(int64_t document, int64_t begin, std::span<int64_t> out) const override {
    const uint64_t key = mix(seed_, static_cast<uint64_t>(document));
    for (size_t i = 0; i < out.size(); ++i) out[i] = scale_to(mix(key, static_cast<uint64_t>(begin) + i), vocab_size_);
  }

 private:
  int64_t vocab_size_, document_len_;
  uint64_t seed_;
  std::string name_, hash_;
};

}  // namespace

std::unique_ptr<Source> open_random(int64_t vocab_size, int64_t document_len, uint64_t seed) {
  return std::make_unique<RandomSource>(vocab_size, document_len, seed);
}

}  // namespace tessera
