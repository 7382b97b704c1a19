// state.json of a checkpoint, with the data position in it.
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint.hpp"
#include "data/loader.hpp"
#include "tests/fuzz/target.hpp"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tessera;
  static const bool there = !fuzz::folder().put("model.safetensors", std::string("\2\0\0\0\0\0\0\0{}", 10)).empty();
  fuzz::must(there, "tensors are there");
  fuzz::folder().put("state.json", {reinterpret_cast<const char*>(data), size});
  fuzz::hold([&] {
    const OpenCheckpoint checkpoint = open_checkpoint(fuzz::folder().path());
    DataConfig config;
    config.source = "random";
    config.document_len = 9;
    Loader loader(Dataset::open(config, 256), 8);
    loader.restore(checkpoint.state.data);
    for (const Row& row : loader.next_rows(2)) fuzz::must(row.ids.size() == 8, "rows are full");
  });
  return 0;
}
