// Held-out loss.
#pragma once
#include <vector>

#include "data/loader.hpp"
#include "model/model.hpp"

namespace tessera {

// Mean next-token cross-entropy (nats) over all targets of `rows`, `batch_rows` rows at a time, without statistics or auxiliary losses.
double validation_loss(Model& model, const std::vector<Row>& rows, int64_t batch_rows);

// The same with sums by position in the document.
struct PositionLoss {
  int64_t begin = 0, end = 0;  // positions [begin, end) of the predicting token
  double loss = 0;             // mean, nats
  int64_t targets = 0;
};
struct Evaluation {
  double loss = 0;
  int64_t targets = 0;
  std::vector<PositionLoss> by_position;  // in powers of two
};
Evaluation evaluate(Model& model, const std::vector<Row>& rows, int64_t batch_rows);

}  // namespace tessera
