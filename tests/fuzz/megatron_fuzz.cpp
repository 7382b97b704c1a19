// Megatron's index: two bytes with the length of the .bin, then the .idx.
#include <algorithm>
#include <vector>

#include "data/source.hpp"
#include "tests/fuzz/target.hpp"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tessera;
  fuzz::Bytes in(data, size);
  std::string tokens(in.take16() % 4096, '\0');
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<char>(i * 37);
  fuzz::folder().put("m.bin", tokens);
  fuzz::folder().put("m.idx", in.rest());
  fuzz::hold([&] {
    const auto source = open_megatron((fuzz::folder().path() / "m").string());
    std::vector<int64_t> ids(64);
    const int64_t documents = source->num_documents();
    for (int64_t d = 0; d < documents; ++d) {
      const int64_t length = source->document_len(d), part = std::min<int64_t>(length, 64);
      fuzz::must(length >= 0, "a document has no negative length");
      source->read(d, 0, std::span(ids).first(static_cast<size_t>(part)));
      source->read(d, length - part, std::span(ids).first(static_cast<size_t>(part)));
    }
  });
  return 0;
}
