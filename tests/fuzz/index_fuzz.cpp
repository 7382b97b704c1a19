// The index of a sharded checkpoint, beside two shards.
#include "checkpoint/safetensors.hpp"

#include "tests/fuzz/target.hpp"

namespace {
std::string shard(const std::string& name) {
  const std::string header = R"({")" + name + R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
  std::string bytes(8, '\0');
  bytes[0] = static_cast<char>(header.size());
  return bytes + header + '\0';
}
}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tessera;
  static const bool there = !fuzz::folder().put("a.safetensors", shard("a")).empty() && !fuzz::folder().put("b.safetensors", shard("b")).empty();
  fuzz::must(there, "shards are there");
  const auto path = fuzz::folder().put("model.safetensors.index.json", {reinterpret_cast<const char*>(data), size});
  fuzz::hold([&] {
    const SafetensorsFolder folder = SafetensorsFolder::open(path);
    for (const std::string& name : folder.names()) fuzz::must(folder.tensor(name).numel() == 1, "a tensor that is listed is there");
  });
  return 0;
}
