// The documents of a run: one source or a weighted mixture, split into training and held-out documents.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "data/config.hpp"
#include "data/source.hpp"

namespace tessera {

enum class Split { kTraining, kValidation };

struct Component {
  std::unique_ptr<Source> source;
  double weight = 1;
  int64_t num_held_out = 0;  // documents
};

// Which documents are held out depends on (seed, number of documents) only: round(fraction * n) of each source, at least one where the fraction is
// positive and the source has two, never all.
class Dataset {
 public:
  // Opens the sources of a checked configuration. `placeholders`: {"libtorch", <include folder>}. Throws as open_* do, and Error(kRuntime) when a
  // source has no documents.
  static std::shared_ptr<const Dataset> open(const DataConfig& config, int64_t vocab_size, const std::map<std::string, std::string>& placeholders = {});
  Dataset(std::vector<Component> components, int64_t vocab_size, double validation_fraction, int64_t seed);

  const std::vector<Component>& components() const { return components_; }
  int64_t num_documents(size_t component, Split split) const;
  // The document at place `ordinal` in the order of the held-out ones.
  int64_t held_out_document(size_t component, int64_t ordinal) const;
  // Reads tokens; an id outside [0, vocab_size) is Error(kRuntime) with source, document and position.
  void read(size_t component, int64_t document, int64_t begin, std::span<int64_t> out) const;

  bool has_targets(size_t component) const { return components_[component].source->has_targets(); }
  void read_targets(size_t component, int64_t document, int64_t begin, std::span<Target> out) const;

  int64_t vocab_size() const { return vocab_size_; }
  double validation_fraction() const { return validation_fraction_; }
  int64_t seed() const { return seed_; }
  // Changes with whatever the stream of tokens depends on.
  std::string hash() const;

 private:
  std::vector<Component> components_;
  int64_t vocab_size_;
  double validation_fraction_;
  int64_t seed_;
};

// Tokens [begin, begin + length) of a document.
struct Piece {
  int64_t document, begin, length;
};

// The training documents of a component, each cut from its start into pieces of seq_len tokens and a shorter last one. The order of an epoch is a
// permutation of all pieces by (seed, epoch), computed without a list, so that neighbours come from different documents. Memory: 8 bytes a document.
// An endless source's pieces are in order, and need no table.
class Pieces {
 public:
  // Asks for the length of every training document. Throws Error(kRuntime) when all are empty, or as the source does. The dataset must outlive this.
  Pieces(const Dataset& dataset, size_t component, int64_t seq_len);
  int64_t size() const { return size_; }
  // The piece at place `ordinal` in the order of `epoch`.
  Piece at(int64_t epoch, int64_t ordinal) const;

 private:
  const Source& source_;
  int64_t seq_len_, size_ = 0;
  uint64_t shuffle_key_;
  std::vector<int64_t> starts_;  // pieces before each document; a held-out document has none
};

}  // namespace tessera
