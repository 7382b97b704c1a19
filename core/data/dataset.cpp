#include "data/dataset.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "data/glob.hpp"
#include "data/hash.hpp"
#include "data/tasks/task.hpp"
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
  if (const Task* task = find_task(config.source)) {
    components.push_back({open_task(*task, config.task, training_sizes(*task, config.task), key(config.seed, kTokens, 0))});
  } else if (config.source != "mixture") {
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

int64_t Dataset::held_out_document(size_t component, int64_t ordinal) const {
  const int64_t n = components_[component].source->num_documents();
  // Endless documents are all alike: the lower half is for training.
  if (n == Source::kEndless) return n - 1 - ordinal;
  // A permutation puts the held-out documents first.
  return Permutation(n, key(seed_, kSplit, component)).inverse(ordinal);
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

void Dataset::read_targets(size_t component, int64_t document, int64_t begin, std::span<Target> out) const {
  components_[component].source->read_targets(document, begin, out);
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

Pieces::Pieces(const Dataset& dataset, size_t component, int64_t seq_len)
    : source_(*dataset.components()[component].source), seq_len_(seq_len), shuffle_key_(key(dataset.seed(), kShuffle, component)) {
  const auto count = [&](int64_t document) {
    const int64_t length = source_.document_len(document);
    return length / seq_len + (length % seq_len != 0);
  };
  const int64_t n = source_.num_documents(), training = dataset.num_documents(component, Split::kTraining);
  if (n == Source::kEndless) {
    const int64_t each = count(0);
    size_ = training > Source::kEndless / each ? Source::kEndless : training * each;
    return;
  }
  std::vector<bool> held_out(static_cast<size_t>(n));
  for (int64_t i = 0; i < n - training; ++i) held_out[static_cast<size_t>(dataset.held_out_document(component, i))] = true;
  starts_.reserve(static_cast<size_t>(n) + 1);
  for (int64_t i = 0; i < n; ++i) {
    starts_.push_back(size_);
    if (!held_out[static_cast<size_t>(i)]) size_ += count(i);
  }
  starts_.push_back(size_);
  if (size_ == 0) throw Error(ExitCode::kRuntime, fmt::format("{}: all {} documents for training are empty", source_.name(), training));
}

Piece Pieces::at(int64_t epoch, int64_t ordinal) const {
  int64_t document, begin;
  if (starts_.empty()) {
    const int64_t length = source_.document_len(0), each = length / seq_len_ + (length % seq_len_ != 0);
    document = ordinal / each;
    begin = ordinal % each * seq_len_;
  } else {
    const int64_t piece = Permutation(size_, mix(shuffle_key_, static_cast<uint64_t>(epoch)))(ordinal);
    // The last document that starts at or before the piece: the ones without pieces start where the next one does.
    document = std::upper_bound(starts_.begin(), starts_.end(), piece) - starts_.begin() - 1;
    begin = (piece - starts_[static_cast<size_t>(document)]) * seq_len_;
  }
  return {document, begin, std::min(seq_len_, source_.document_len(document) - begin)};
}

}  // namespace tessera
