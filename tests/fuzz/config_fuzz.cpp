// A configuration file with the loaded blocks, `--set` lines (`# --set a.b=c` at its top), and what `plan` computes from it.
#include "config/config.hpp"

#include <sstream>

#include "plan/memory.hpp"
#include "tests/fuzz/target.hpp"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tessera;
  static const Registry registry = Registry::load({std::filesystem::path(TESSERA_BINARY_DIR) / "plugins"});
  const std::string text(reinterpret_cast<const char*>(data), size);
  std::vector<std::string> sets;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line) && line.starts_with("# --set");) sets.push_back(line.size() > 8 ? line.substr(8) : "");
  fuzz::hold([&] {
    const Config config = parse_config(text, "fuzz.toml", sets, registry);
    const std::string resolved = to_toml(config);
    std::string again;
    try {
      again = to_toml(parse_config(resolved, "fuzz.toml", {}, registry));
    } catch (const Error& error) {
      fuzz::must(false, error.what());
    }
    fuzz::must(again == resolved, "the resolved configuration reproduces itself");
    const Mesh mesh = make_mesh(config.parallelism);
    const ModelPlan plan = make_plan(config, mesh);
    const Documents documents{{.length = config.training.seq_len, .count = config.training.local_batch_size}};
    fuzz::must(totals(plan).elements > 0, "elements are counted");
    fuzz::must(plan_memory(plan, config, mesh).total() > 0, "memory is counted");
    cost_rows(plan, documents);
  });
  return 0;
}
