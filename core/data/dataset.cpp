#include "data/dataset.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "data/glob.hpp"
#include "data/hash.hpp"
#include "tessera/error.hpp"

namespace tessera {

namespace {

enum Purpose : uint64_t { kSplit = 1, kShuffle = 2, kTokens = 3 };

uint64_t key(int64_t seed, Purpose purpose, size_t component) { return mix(static_cast<uint64_t>(seed), purpose, component); }

template <class Config>
std::unique_ptr<Source> open_source(const Config& config, int64_t vocab_size, uint64_t seed, const std::map<std::string, std::string>& placeholders) {
  if (config.source == "random") return open_random(vocab_size, config.document_len, seed);
  const std::string path = replace_placeholders(config.path, placeholders);
  if (config.source == "jsonl") return open_jsonl(path, config.text_field);
  if (config.source == "megatron") return open_megatron(path);
  return open_bytes(path);
}

}  // namespace

std::shared_ptr<const Dataset> Dataset::open(const DataConfig& config, int64_t vocab_size, const std::map<std::string, std::string>& placeholders) {
  std::vector<Component> components;
  if (config.source != "mixture") {
    components.push_back({open_source(config, vocab_size, key(config.seed, kTokens, 0), placeholders)});
  } else {
    for (size_t i = 0; i < config.mixture.size(); ++i)
      components.push_back({open_source(config.mixture[i], vocab_size, key(config.seed, kTokens, i), placeholders), config.mixture[i].weight});
  }
  return std::make_shared<const Dataset>(std::move(components), vocab_size, config.validation_fraction, config.seed);
}

Dataset::Dataset(std::vector<Component> components, int64_t vocab_size, double validation_fraction, int64_t seed)
    : components_(std::move(components)), vocab_size_(vocab_size), validation_fraction_(validation_fraction), seed_(seed) {
  for (Component& component : components_) {
    const int64_t n = component.source->num_documents();
    if (n == 0) throw Error(ExitCode::kRuntime, fmt::format("{}: has no documents", component.source->name()));
    if (validation_fraction_ > 0 && n == Source::kEndless) component.num_held_out = n / 2;
    else if (validation_fraction_ > 0 && n > 1)
      component.num_held_out = std::clamp<int64_t>(std::llround(validation_fraction_ * static_cast<double>(n)), 1, n - 1);
  }
}

int64_t Dataset::num_documents(size_t component, Split split) const {
  const int64_t held_out = components_[component].num_held_out;
  return split == Split::kValidation ? held_out : components_[component].source->num_documents() - held_out;
}

int64_t Dataset::document(size_t component, Split split, int64_t epoch, int64_t ordinal) const {
  const Component& c = components_[component];
  const int64_t n = c.source->num_documents();
  // Endless documents are all alike: the lower half is for training, in order.
  if (n == Source::kEndless) return split == Split::kTraining ? ordinal : n - 1 - ordinal;
  // A permutation puts the held-out documents first.
  const Permutation by_split(n, key(seed_, kSplit, component));
  if (split == Split::kValidation) return by_split.inverse(ordinal);
  const Permutation shuffle(n - c.num_held_out, mix(key(seed_, kShuffle, component), static_cast<uint64_t>(epoch)));
  return by_split.inverse(c.num_held_out + shuffle(ordinal));
}

void Dataset::read(size_t component, int64_t document, int64_t begin, std::span<int64_t> out) const {
  const Source& source = *components_[component].source;
  source.read(document, begin, out);
  const auto bad = std::find_if(out.begin(), out.end(), [this](int64_t id) { return id < 0 || id >= vocab_size_; });
  if (bad != out.end())
    throw Error(ExitCode::kRuntime,
                fmt::format("{}: token {} at position {} of {} must be in [0, {})", source.name(), *bad, begin + (bad - out.begin()),
                            source.document_name(document), vocab_size_),
                "model.vocab_size is the number of ids; bytes need 256");
}

std::string Dataset::hash() const {
  Fingerprint print;
  for (const Component& component : components_) {
    print.add(component.source->hash());
    print.add(std::bit_cast<uint64_t>(component.weight));
  }
  print.add(std::bit_cast<uint64_t>(validation_fraction_));
  print.add(static_cast<uint64_t>(seed_));
  return print.text();
}

}  // namespace tessera
