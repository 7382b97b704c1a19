// Rows of exactly seq_len tokens, packed from documents end to end with the boundaries kept.
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

// One row of a global batch. A document that the row's end cuts goes on in the next row as a document of its own.
struct Row {
  std::vector<int64_t> ids;      // empty where the row was passed over
  std::vector<int64_t> lengths;  // of its documents' pieces, each at least 1; they sum to seq_len
  // Tokens whose successor lies in the same piece: the targets of the next-token loss.
  int64_t num_targets() const;
};

// The rows end to end, on the CPU; every piece is a whole document.
Batch assemble(std::span<const Row> rows);

// The training stream. It does not depend on ranks, micro-batches or seq_len's multiples: a rank asks for all rows of a global batch and reads its own.
// Over a mixture, the next document comes from the source with the least tokens per weight so far, so shares of tokens follow the weights to
// within a document.
class Loader {
 public:
  Loader(std::shared_ptr<const Dataset> dataset, int64_t seq_len);

  // The next `count` rows. Tokens are read for rows [first, last) only; `lengths` are there for all, so that global counts need no exchange.
  std::vector<Row> next_rows(int64_t count, int64_t first, int64_t last);
  std::vector<Row> next_rows(int64_t count) { return next_rows(count, 0, count); }

  // The position, and what the stream depends on. Restoring it continues with the same rows, for any seq_len.
  nlohmann::json state() const;
  // Throws Error(kRuntime) that says what changed where the data are not those of the state, and where the state is damaged.
  void restore(const nlohmann::json& state);
  std::string hash() const { return dataset_->hash(); }
  const Dataset& dataset() const { return *dataset_; }

 private:
  friend std::vector<Row> validation_rows(std::shared_ptr<const Dataset>, int64_t, int64_t);
  struct Cursor {
    int64_t epoch = 0, ordinal = 0;
    int64_t tokens = 0;  // begun documents count whole
  };
  Row next_row(bool read);
  bool open_document();

  std::shared_ptr<const Dataset> dataset_;
  int64_t seq_len_;
  Split split_ = Split::kTraining;
  std::vector<Cursor> cursors_;
  int64_t current_ = -1;  // component of the document being read
  int64_t document_ = 0, length_ = 0, offset_ = 0;
};

// Rows of held-out documents, the same every time: as many full rows as fit into `tokens` (at least one), each document at most once. Where the
// held-out documents do not fill one row, a single shorter row. Throws Error(kRuntime) when no document can be held out.
std::vector<Row> validation_rows(std::shared_ptr<const Dataset> dataset, int64_t seq_len, int64_t tokens);

}  // namespace tessera
