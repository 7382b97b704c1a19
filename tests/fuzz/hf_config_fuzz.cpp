// HF's config.json, up to the names of the tensors that such a folder must hold, and back.
#include "hf/hf_config.hpp"

#include "hf/hf_json.hpp"
#include "hf/hf_names.hpp"
#include "tests/fuzz/target.hpp"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tessera;
  static const Registry registry = Registry::load({std::filesystem::path(TESSERA_BINARY_DIR) / "plugins"});
  const auto path = fuzz::folder().put("config.json", {reinterpret_cast<const char*>(data), size});
  fuzz::hold([&] {
    std::vector<std::string> notes;
    const Config config = import_hf_config(path, registry, {"waived"}, notes);
    for (const std::string& note : notes) fuzz::hold_text("error: " + note);
    const std::string resolved = to_toml(config);
    fuzz::must(to_toml(parse_config(resolved, path.string(), {}, registry)) == resolved, "what was imported is a configuration");
    const ModelPlan plan = make_plan(config);
    fuzz::must(totals(plan).elements > 0, "elements are counted");
    fuzz::must(!hub_tensors(plan).empty(), "tensors have names");
    const nlohmann::json source = read_hf_json(path);
    hf_json_text(export_hf_config(config, registry, &source, notes));
  });
  return 0;
}
