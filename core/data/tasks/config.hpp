// The [data.task] table.
#pragma once
#include <cstdint>
#include <vector>

#include "tessera/schema.hpp"

namespace tessera {

// Which keys a task reads is said by its row of the table of tasks; the others have no effect with it.
struct TaskConfig {
  int64_t length = 64;                       // tokens of a document
  std::vector<int64_t> eval_lengths;
  std::vector<int64_t> num_pairs{4, 8, 16};  // a document's is drawn from the list
  std::vector<int64_t> eval_num_pairs;
  int64_t vocab_size = 64;
  double power = 0.01;
  int64_t num_tokens = 8;
  int64_t num_needles = 4;
  int64_t motif_len = 3;
  int64_t order = 2;
  int64_t degree = 5;
};

Schema<TaskConfig> task_schema();

}  // namespace tessera
