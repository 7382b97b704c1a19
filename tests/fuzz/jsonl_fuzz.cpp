// Lines of JSON with the text of a document each.
#include <vector>

#include "data/source.hpp"
#include "tests/fuzz/target.hpp"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tessera;
  const auto path = fuzz::folder().put("a.jsonl", {reinterpret_cast<const char*>(data), size});
  fuzz::hold([&] {
    const auto source = open_jsonl(path.string(), "text");
    for (int64_t d = 0; d < source->num_documents(); ++d) {
      fuzz::hold([&] {
        std::vector<int64_t> ids(static_cast<size_t>(source->document_len(d)));
        source->read(d, 0, ids);
        fuzz::must(ids.size() <= size, "a text is no longer than its line");
      });
    }
  });
  return 0;
}
