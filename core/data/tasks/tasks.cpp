// The table of tasks, and what is common to them.
#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "data/hash.hpp"
#include "data/tasks/task.hpp"

namespace tessera {

namespace {

bool reads(const Task& task, const std::string& key) { return std::find(task.keys.begin(), task.keys.end(), key) != task.keys.end(); }

class TaskSource final : public Source {
 public:
  TaskSource(const Task& task, const TaskConfig& config, std::vector<TaskSize> sizes, uint64_t seed)
      : task_(task), config_(config), sizes_(std::move(sizes)), seed_(seed), name_(fmt::format("task '{}' in documents of {} tokens", task.name, sizes_[0].length)) {
    Fingerprint print;
    print.add(name_);
    print.add(seed);
    const auto fields = task_schema();
    for (const std::string& key : task.keys)
      if (!key.starts_with("eval_")) print.add(key + to_toml(fields.find(key)->get(&config_)));
    for (const TaskSize& size : sizes_) print.add(static_cast<uint64_t>(size.length)), print.add(static_cast<uint64_t>(size.num_pairs));
    hash_ = print.text();
  }
  int64_t num_documents() const override { return kEndless; }
  int64_t document_len(int64_t) const override { return sizes_[0].length; }
  std::string document_name(int64_t document) const override { return fmt::format("{} document {}", task_.name, document); }
  const std::string& name() const override { return name_; }
  const std::string& hash() const override { return hash_; }
  bool has_targets() const override { return true; }

  void read(int64_t document, int64_t begin, std::span<int64_t> out) const override { std::copy_n(open(document).ids.begin() + begin, out.size(), out.begin()); }
  void read_targets(int64_t document, int64_t begin, std::span<Target> out) const override {
    std::copy_n(open(document).targets.begin() + begin, out.size(), out.begin());
  }

 private:
  const TaskDocument& open(int64_t document) const {
    if (document == opened_) return document_;
    Dice dice(mix(seed_, static_cast<uint64_t>(document)));
    const TaskSize& size = sizes_[static_cast<size_t>(dice.below(static_cast<int64_t>(sizes_.size())))];
    document_.ids.assign(static_cast<size_t>(size.length), 0);
    document_.targets.assign(static_cast<size_t>(size.length), {});
    task_.write(config_, size, dice, document_);
    opened_ = document;
    return document_;
  }

  const Task& task_;
  TaskConfig config_;
  std::vector<TaskSize> sizes_;
  uint64_t seed_;
  std::string name_, hash_;
  mutable int64_t opened_ = -1;
  mutable TaskDocument document_;
};

}  // namespace

uint64_t Dice::bits() { return mix(key_, drawn_++); }

int64_t Dice::below(int64_t n) { return scale_to(bits(), n); }

double Dice::uniform() { return (static_cast<double>(bits() >> 11) + 0.5) * 0x1p-53; }

std::vector<int64_t> Dice::distinct(int64_t count, int64_t n) {
  std::vector<int64_t> all(static_cast<size_t>(n));
  std::iota(all.begin(), all.end(), 0);
  for (int64_t i = 0; i < count; ++i) std::swap(all[static_cast<size_t>(i)], all[static_cast<size_t>(i + below(n - i))]);
  all.resize(static_cast<size_t>(count));
  return all;
}

const std::vector<Task>& tasks() {
  static const std::vector<Task> all{mqar(), induction(), selective_copying(), ngram(), fuzzy_recall(), parity(), permutations(), retrieval()};
  return all;
}

const Task* find_task(const std::string& name) {
  const auto at = std::find_if(tasks().begin(), tasks().end(), [&](const Task& task) { return task.name == name; });
  return at == tasks().end() ? nullptr : &*at;
}

Schema<TaskConfig> task_schema() {
  using C = TaskConfig;
  constexpr double kLong = 1 << 20;
  Schema<C> s;
  s.field("length", &C::length, "length of a document").unit("tokens").range(4, kLong);
  s.field("eval_lengths", &C::eval_lengths, "lengths of further documents that validation measures").unit("tokens").range(4, kLong);
  s.field("num_pairs", &C::num_pairs, "pairs of key and value in a document, drawn from this list").range(1, kLong / 8);
  s.field("eval_num_pairs", &C::eval_num_pairs, "pairs of further documents that validation measures, as long as a multiple of length that holds them").range(1, kLong / 8);
  s.field("vocab_size", &C::vocab_size, "ids that documents are written in").range(4, 1 << 24);
  s.field("power", &C::power, "odds of a query at the n-th place after the pairs: n^(power - 1)").above(0);
  s.field("num_tokens", &C::num_tokens, "tokens to copy").unit("tokens").range(1, kLong);
  s.field("num_needles", &C::num_needles, "keys with a value among the noise").range(1, kLong);
  s.field("motif_len", &C::motif_len, "keys and values have one token up to this many").unit("tokens").range(1, 16);
  s.field("order", &C::order, "tokens that the next one follows from").unit("tokens").range(1, 16);
  s.field("degree", &C::degree, "the permutations are all of this many things").range(2, 6);
  for (Field& field : s.list) {
    std::string readers;
    for (const Task& task : tasks())
      if (reads(task, field.key)) readers += (readers.empty() ? "" : ", ") + task.name;
    field.doc = readers + ": " + field.doc;
  }
  return s;
}

std::vector<TaskSize> training_sizes(const Task& task, const TaskConfig& config) {
  if (!reads(task, "num_pairs")) return {{.length = config.length}};
  std::vector<TaskSize> sizes;
  for (const int64_t pairs : config.num_pairs) sizes.push_back({.length = config.length, .num_pairs = pairs});
  return sizes;
}

std::vector<TaskSize> eval_sizes(const Task& task, const TaskConfig& config) {
  std::vector<TaskSize> sizes;
  if (reads(task, "eval_lengths"))
    for (const int64_t length : config.eval_lengths) sizes.push_back({.length = length});
  if (reads(task, "eval_num_pairs"))
    for (const int64_t pairs : config.eval_num_pairs) sizes.push_back({.length = (task.pair_tokens * pairs + config.length - 1) / config.length * config.length, .num_pairs = pairs});
  return sizes;
}

void check_task(const Task& task, const TaskConfig& config, Issues& issues) {
  if (reads(task, "num_pairs") && config.num_pairs.empty()) return issues.add("num_pairs", "must name at least one number of pairs, got []");
  task.check(config, issues);
}

std::unique_ptr<Source> open_task(const Task& task, const TaskConfig& config, std::vector<TaskSize> sizes, uint64_t seed) {
  return std::make_unique<TaskSource>(task, config, std::move(sizes), seed);
}

}  // namespace tessera
