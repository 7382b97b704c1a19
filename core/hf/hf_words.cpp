#include "hf/hf_words.hpp"

#include <algorithm>

namespace tessera::hf {

const Fields& model_fields() {
  static const Fields fields = [] {
    Schema<ModelConfig> s;
    s.field("vocab_size", &ModelConfig::vocab_size, "").range(1).required().hf({"vocab_size"});
    s.field("hidden_size", &ModelConfig::hidden_size, "").range(1).required().hf({"hidden_size"});
    s.field("norm_eps", &ModelConfig::norm_eps, "").above(0).hf({"layer_norm_epsilon"});
    s.field("tie_embeddings", &ModelConfig::tie_embeddings, "").hf({"tie_word_embeddings"});
    s.field("init_std", &ModelConfig::init_std, "").range(0).hf({"initializer_range"});
    s.field("residual_in_fp32", &ModelConfig::residual_in_fp32, "").hf({"residual_in_fp32"});
    return Fields(s);
  }();
  return fields;
}

const std::vector<std::pair<std::string, Value>>& must_be() {
  static const std::vector<std::pair<std::string, Value>> list{{"model_type", std::string(kModelType)}, {"hidden_dropout", 0.0}};
  return list;
}

bool present(const nlohmann::json& json, const std::string& key) {
  const auto found = json.find(key);
  return found != json.end() && !found->is_null();
}

namespace {
const Symbol* symbol_of(const BlockType& type) {
  for (const Symbol& symbol : type.info().symbols)
    if (symbol.dialect && std::string_view(symbol.dialect) == kDialect) return &symbol;
  return nullptr;
}

template <class Claims>
const BlockType* pick(const Registry& registry, const nlohmann::json& json, Claims claims) {
  const BlockType* plain = nullptr;
  for (const BlockType* type : registry.blocks()) {
    const Symbol* symbol = symbol_of(*type);
    if (!symbol || !claims(*type, *symbol)) continue;
    if (symbol->when && present(json, symbol->when)) return type;
    if (!symbol->when && !plain) plain = type;
  }
  return plain;
}
}  // namespace

const BlockType* type_of_letter(const Registry& registry, char letter, const nlohmann::json& json) {
  return pick(registry, json, [&](const BlockType&, const Symbol& symbol) { return symbol.symbol == letter; });
}

const BlockType* type_of_word(const Registry& registry, const std::string& word, const nlohmann::json& json) {
  return pick(registry, json, [&](const BlockType& type, const Symbol&) {
    const auto& words = type.hf().layer_words;
    return std::find(words.begin(), words.end(), word) != words.end();
  });
}

char letter_of(const BlockType& type) {
  const Symbol* symbol = symbol_of(type);
  return symbol ? symbol->symbol : '\0';
}

bool unsaid(const ElementType& type, const Field& field) {
  const auto& keys = type.hf().unsaid;
  return field.hf_keys_.empty() && std::find(keys.begin(), keys.end(), field.key) != keys.end();
}

}  // namespace tessera::hf
