// HF's config.json to a Config and back. What a key means is read from the tables of the loaded blocks and heads.
#pragma once
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "config/config.hpp"

namespace tessera {

// Reads a `nemotron_h` config.json. Every key is one that sets a field, one that changes nothing (inert, or of a block that the pattern
// lacks), or one of `waived`; the others are an error, as are values that no loaded block supports.
// `notes` gets lines for the user: keys without effect, keys waived, values that the file does not say.
// Throws one Error(kUsage) with every mistake, each with its place in the file.
Config import_hf_config(const std::filesystem::path& config_json, const Registry& registry, const std::vector<std::string>& waived,
                        std::vector<std::string>& notes);

// The config.json that means the same. `source` is the one that the model was imported from, or nullptr: its keys, spellings and inert values
// are kept. Throws one Error(kUsage) that names everything that HF cannot say.
// `notes` gets what is left out because it matters in training alone.
nlohmann::json export_hf_config(const Config& config, const Registry& registry, const nlohmann::json* source, std::vector<std::string>& notes);

}  // namespace tessera
