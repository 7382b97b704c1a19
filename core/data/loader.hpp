// Rows of exactly seq_len tokens, packed from pieces of documents end to end with the boundaries kept.
#pragma once
#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <vector>

#include "data/batch.hpp"
#include "data/dataset.hpp"

namespace tessera {

// One row of a global batch. A piece that the row's end cuts goes on in the next row as a document of its own.
struct Row {
  std::vector<int64_t> ids;      // empty where the row was passed over
  std::vector<int64_t> lengths;  // of its parts, each a stretch of one document of at least 1 token; they sum to seq_len
  std::vector<Target> targets;   // as many as ids, where a source says what they are; else empty
  // What is to be predicted: where no source says it, tokens whose successor lies in the same part.
  int64_t num_targets() const;
};

// The rows end to end, on the host; every part is a document of the spans.
Batch assemble(std::span<const Row> rows);

// The training stream: the pieces of the training documents (see Pieces) in the shuffled order of each epoch, end to end. It depends on the dataset and
// on seq_len, not on ranks or micro-batches: a rank asks for all rows of a global batch and reads its own. Over a mixture, the next piece comes from
// the source with the least tokens per weight so far, so shares of tokens follow the weights to within a piece.
class Loader {
 public:
  // Cuts the documents into pieces, which throws Error(kRuntime) where a source has none or a line cannot be parsed.
  Loader(std::shared_ptr<const Dataset> dataset, int64_t seq_len);

  // The next `count` rows. Tokens are read for rows [first, last) only; `lengths` are there for all, so that global counts need no exchange.
  std::vector<Row> next_rows(int64_t count, int64_t first, int64_t last);
  std::vector<Row> next_rows(int64_t count) { return next_rows(count, 0, count); }

  // The position, and what the stream depends on, seq_len included. Restoring it continues with the same rows.
  nlohmann::json state() const;
  // Throws Error(kRuntime) that says what changed where the data or seq_len are not those of the state, and where the state is damaged.
  void restore(const nlohmann::json& state);
  // Changes with whatever the rows depend on.
  std::string hash() const;
  const Dataset& dataset() const { return *dataset_; }

 private:
  friend std::vector<Row> validation_rows(std::shared_ptr<const Dataset>, int64_t, int64_t);
  struct Cursor {
    int64_t epoch = 0, ordinal = 0;  // of the next piece, or of the current one
    int64_t tokens = 0;              // begun pieces count whole
  };
  Loader(std::shared_ptr<const Dataset> dataset, int64_t seq_len, Split split);
  int64_t num_pieces(size_t component) const;
  Piece piece_at(size_t component, const Cursor& cursor) const;
  Row next_row(bool read);
  bool open_piece();

  std::shared_ptr<const Dataset> dataset_;
  int64_t seq_len_;
  std::vector<Pieces> pieces_;  // none for held-out documents, which are not cut
  std::vector<Cursor> cursors_;
  int64_t current_ = -1;  // component of the piece being read
  Piece piece_{};
  int64_t offset_ = 0;  // tokens of the piece that are in rows already
};

// For each size of a task's documents beyond those of training (see eval_sizes): documents of it, a row each, of at least `tokens` tokens together.
// None where the source is no task.
std::vector<std::vector<Row>> beyond_rows(const DataConfig& config, int64_t tokens);

// Rows of held-out documents, the same every time: as many full rows as fit into `tokens` (at least one), each document at most once. Where the
// held-out documents do not fill one row, a single shorter row. Throws Error(kRuntime) when no document can be held out.
std::vector<Row> validation_rows(std::shared_ptr<const Dataset> dataset, int64_t seq_len, int64_t tokens);

}  // namespace tessera
