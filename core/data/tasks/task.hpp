// Tasks that tell architectures apart: what their documents are, exactly.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/source.hpp"
#include "data/tasks/config.hpp"
#include "tessera/error.hpp"

namespace tessera {

// Random numbers of one document, from a key.
class Dice {
 public:
  explicit Dice(uint64_t key) : key_(key) {}
  uint64_t bits();
  int64_t below(int64_t n);                                  // uniform in [0, n)
  double uniform();                                          // in (0, 1)
  std::vector<int64_t> distinct(int64_t count, int64_t n);   // of [0, n), in random order; count <= n

 private:
  uint64_t key_, drawn_ = 0;
};

// Of a document: its tokens, and how many pairs it has where the task counts them.
struct TaskSize {
  int64_t length = 0, num_pairs = 0;
};

struct TaskDocument {
  std::vector<int64_t> ids;     // as long as the size says, 0 at first
  std::vector<Target> targets;  // at the predicting positions
};

// One row of the table of tasks.
struct Task {
  std::string name, source;
  std::string axis;                // what a target's group counts: "pairs", "length", "distance"
  std::vector<std::string> keys;   // of [data.task], that have an effect
  int64_t pair_tokens = 0;         // tokens that a document beyond training has for each of its pairs, at least
  int64_t (*num_ids)(const TaskConfig& config);                  // ids lie in [0, num_ids)
  void (*check)(const TaskConfig& config, Issues& issues);       // issues are keyed by the key alone
  void (*write)(const TaskConfig& config, const TaskSize& size, Dice& dice, TaskDocument& document);
};

const std::vector<Task>& tasks();
const Task* find_task(const std::string& name);  // nullptr: none

// Sizes of the documents of training, and of those beyond it: one for each entry of the task's eval list.
std::vector<TaskSize> training_sizes(const Task& task, const TaskConfig& config);
std::vector<TaskSize> eval_sizes(const Task& task, const TaskConfig& config);

// Rules between the task's keys, of a configuration whose fields are sound.
void check_task(const Task& task, const TaskConfig& config, Issues& issues);

// Endless documents, each of a size drawn from `sizes`, which share their length. A document depends on (config, sizes, seed, document) only.
std::unique_ptr<Source> open_task(const Task& task, const TaskConfig& config, std::vector<TaskSize> sizes, uint64_t seed);

Task mqar();
Task induction();
Task selective_copying();
Task ngram();
Task fuzzy_recall();
Task parity();
Task permutations();
Task retrieval();

}  // namespace tessera
