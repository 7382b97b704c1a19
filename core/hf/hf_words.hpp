// What import and export have in common: HF's keys that belong to no block, and how a letter or word finds its block type.
#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "config/config.hpp"

namespace tessera::hf {

inline constexpr const char* kDialect = "nemotron";
inline constexpr const char* kModelType = "nemotron_h";
inline constexpr const char* kNumLayers = "num_hidden_layers";
inline constexpr const char* kNumHeadSets = "num_nextn_predict_layers";
inline constexpr const char* kDefaultHeadPattern = "*E";
// Spellings of a stack: a string of letters, or a list of words.
inline constexpr const char* kPatternKeys[] = {"hybrid_override_pattern", "layers_block_type", "layer_types"};
inline constexpr const char* kHeadPatternKeys[] = {"mtp_hybrid_override_pattern", "mtp_layers_block_type"};
// Kept as found.
inline constexpr const char* kKept[] = {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "use_mamba_kernels",
                                        "bos_token_id", "eos_token_id", "pad_token_id"};
// Of no block, and without effect on the mathematics; so is every key that begins with the prefix.
inline constexpr const char* kInert[] = {"max_position_embeddings", "num_logits_to_keep", "rescale_prenorm_residual"};
inline constexpr const char* kInertPrefix = "rope_";

// The fields of [model] that HF has a key for, with those keys.
const Fields& model_fields();
// Core keys that must hold this value, be null or be absent.
const std::vector<std::pair<std::string, Value>>& must_be();

// A key that is there and not null.
bool present(const nlohmann::json& json, const std::string& key);
// The type behind a letter of HF's dialect, or behind a word of its lists; nullptr when no loaded block claims it.
// Where several do, a type whose `Symbol::when` names a present key comes before the one without a condition.
const BlockType* type_of_letter(const Registry& registry, char letter, const nlohmann::json& json);
const BlockType* type_of_word(const Registry& registry, const std::string& word, const nlohmann::json& json);
// The type's letter in HF's dialect, 0 when it has none.
char letter_of(const BlockType& type);
// True when HF has no key for the field and does not miss it: its results do not depend on the value.
bool unsaid(const ElementType& type, const Field& field);

}  // namespace tessera::hf
