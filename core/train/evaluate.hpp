// Held-out loss, and accuracy where the data say what is to be predicted.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "data/loader.hpp"
#include "model/model.hpp"

namespace tessera {

struct PositionLoss {
  int64_t begin = 0, end = 0;  // positions [begin, end) of the predicting token
  double loss = 0;             // mean, nats
  int64_t targets = 0;
};
// A target is met when its logit is greater than every other word's.
struct GroupAccuracy {
  int64_t group = 0;     // Target::group
  int64_t targets = 0, hits = 0;
  bool trained = false;  // of a size that documents of training have
  double accuracy() const { return targets ? static_cast<double>(hits) / static_cast<double>(targets) : 0; }
};
struct Evaluation {
  double loss = 0;                        // mean next-token cross-entropy, nats, without statistics or auxiliary losses
  int64_t targets = 0;
  std::optional<double> accuracy;         // share of the targets that are met, where rows have targets of their own
  std::vector<PositionLoss> by_position;  // in powers of two
  std::vector<GroupAccuracy> by_group;    // in the order of their numbers; none where rows have no targets of their own
};

// Over all targets of `rows`, `batch_rows` rows at a time.
Evaluation evaluate(Model& model, const std::vector<Row>& rows, int64_t batch_rows);

// What a run is measured on.
struct Validation {
  std::vector<Row> rows;                 // held-out documents
  std::vector<std::vector<Row>> beyond;  // of a task: documents of sizes that training does not have
  std::string axis;                      // what the task's groups count: "pairs"
};
Validation open_validation(std::shared_ptr<const Dataset> dataset, const DataConfig& config, int64_t seq_len, int64_t tokens);
// Loss and accuracy of the held-out documents; their groups and those of the further documents.
Evaluation evaluate(Model& model, const Validation& validation, int64_t batch_rows);

}  // namespace tessera
