// JSON as HF writes it: Python's json module admits bare Infinity, -Infinity and NaN, which no strict reader takes.
// In memory such a number is the object {"__float__": "Infinity"} when the file had that spelling, {"__bare__": "Infinity"} when it was bare.
#pragma once
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace tessera {

// Throws Error(kUsage) that names `place` on malformed JSON, a key given twice, or a text that is no object.
nlohmann::json parse_hf_json(std::string_view text, const std::string& place);
nlohmann::json read_hf_json(const std::filesystem::path& file);
// "file:line:col" of every key of the outermost object of a well-formed text.
std::map<std::string, std::string> hf_key_places(std::string_view text, const std::string& file);
// Two-space indentation, keys sorted, numbers in the spelling they were read in.
std::string hf_json_text(const nlohmann::json& json);

// The number that `json` stands for, infinities included; nullopt when it is none.
std::optional<double> hf_number(const nlohmann::json& json);
// A finite number as itself, an infinity bare.
nlohmann::json hf_json_number(double value);

}  // namespace tessera
