#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>

#include "data/loader.hpp"
#include "data/tasks/task.hpp"
#include "layers/cross_entropy.hpp"
#include "tests/support/model.hpp"
#include "tests/support/ranks.hpp"
#include "train/evaluate.hpp"
#include "train/step.hpp"

namespace tessera {
namespace {

using Ids = std::vector<int64_t>;

struct Document {
  Ids ids;
  std::vector<Target> targets;
};

Document read_document(const Source& source, int64_t number) {
  const auto n = static_cast<size_t>(source.document_len(number));
  Document document{.ids = Ids(n), .targets = std::vector<Target>(n)};
  source.read(number, 0, document.ids);
  source.read_targets(number, 0, document.targets);
  return document;
}

// A legal configuration of each task, with documents beyond training.
TaskConfig config_of(const std::string& task) {
  TaskConfig c;
  c.num_pairs = {2, 5};
  c.eval_num_pairs = {9};
  c.eval_lengths = {100};
  c.vocab_size = 41;
  if (task == "ngram") c.vocab_size = 8;
  c.degree = task == "permutations" ? 4 : 5;
  return c;
}

// Checks a document of the given length by the words of its definition alone.
using Check = void (*)(const TaskConfig& c, const Document& d);

int64_t num_targets(const Document& d) {
  return std::count_if(d.targets.begin(), d.targets.end(), [](const Target& t) { return t.id >= 0; });
}

// What followed each key where it stood with its value.
void check_mqar(const TaskConfig& c, const Document& d) {
  const int64_t pairs = num_targets(d);
  std::map<int64_t, int64_t> value_of;
  std::set<int64_t> values, asked;
  for (int64_t p = 0; p < pairs; ++p) {
    const int64_t key = d.ids[static_cast<size_t>(2 * p)], value = d.ids[static_cast<size_t>(2 * p + 1)];
    EXPECT_TRUE(key >= 1 && key < c.vocab_size / 2 && value >= c.vocab_size / 2 && value < c.vocab_size);
    EXPECT_TRUE(value_of.emplace(key, value).second && values.insert(value).second);
  }
  for (size_t i = 0; i < d.ids.size(); ++i) {
    const bool query = i >= static_cast<size_t>(2 * pairs) && d.ids[i] != 0;
    EXPECT_EQ(d.targets[i].id, query ? value_of.at(d.ids[i]) : -1) << i;
    if (!query) continue;
    EXPECT_EQ(d.targets[i].group, pairs);
    EXPECT_TRUE(asked.insert(d.ids[i]).second);
  }
  EXPECT_EQ(asked.size(), value_of.size());
}

void check_induction(const TaskConfig& c, const Document& d) {
  Ids places;
  for (size_t i = 0; i < d.ids.size(); ++i) {
    EXPECT_LT(d.ids[i], c.vocab_size);
    if (d.ids[i] == 0) places.push_back(static_cast<int64_t>(i));
  }
  ASSERT_EQ(places.size(), 2u);
  EXPECT_EQ(places[1], static_cast<int64_t>(d.ids.size()) - 1);
  EXPECT_EQ(num_targets(d), 1);
  EXPECT_EQ(d.targets.back().id, d.ids[static_cast<size_t>(places[0] + 1)]);
  EXPECT_EQ(d.targets.back().group, static_cast<int64_t>(d.ids.size()));
}

void check_selective_copying(const TaskConfig& c, const Document& d) {
  Ids content, asked;
  for (size_t i = 0; i < d.ids.size(); ++i) {
    if (d.ids[i] > 1) content.push_back(d.ids[i]);
    EXPECT_EQ(d.ids[i] == 1, i >= d.ids.size() - static_cast<size_t>(c.num_tokens));
    if (d.targets[i].id >= 0) asked.push_back(d.targets[i].id);
    EXPECT_EQ(d.targets[i].id >= 0, d.ids[i] == 1);
  }
  EXPECT_EQ(static_cast<int64_t>(content.size()), c.num_tokens);
  EXPECT_EQ(asked, content);
}

void check_ngram(const TaskConfig& c, const Document& d) {
  const auto n = static_cast<size_t>(c.order);
  for (size_t i = 0; i < d.ids.size(); ++i) {
    EXPECT_TRUE(d.ids[i] >= 0 && d.ids[i] < c.vocab_size);
    if (d.targets[i].id < 0) continue;
    ASSERT_GE(i + 1, n);
    EXPECT_EQ(d.ids[i + 1], d.targets[i].id);
    size_t first = n;  // where what followed the first occurrence of the n tokens up to i stands
    while (!std::equal(d.ids.begin() + static_cast<std::ptrdiff_t>(first - n), d.ids.begin() + static_cast<std::ptrdiff_t>(first), d.ids.begin() + static_cast<std::ptrdiff_t>(i + 1 - n))) ++first;
    EXPECT_LT(first, i + 1);
    EXPECT_EQ(d.ids[first], d.targets[i].id);
  }
}

// Spells the document into keys and values again: runs of key letters and of value letters.
void check_fuzzy_recall(const TaskConfig& c, const Document& d) {
  const int64_t half = c.vocab_size / 2;
  std::map<Ids, Ids> value_of;
  Ids key, value;
  size_t value_at = 0;
  int64_t expected = 0;
  const auto close = [&](bool whole) {
    const auto known = value_of.find(key);
    for (size_t i = 0; i < value.size(); ++i) EXPECT_EQ(d.targets[value_at + i - 1].id, known == value_of.end() ? -1 : value[i]);
    if (known != value_of.end()) expected += static_cast<int64_t>(value.size());
    if (known != value_of.end() && whole) {
      EXPECT_EQ(known->second, value);
    }
    if (known == value_of.end() && whole) value_of.emplace(key, value);
    key.clear(), value.clear();
  };
  for (size_t i = 0; i < d.ids.size(); ++i) {
    if (d.ids[i] < half) {
      if (!value.empty()) close(true);
      key.push_back(d.ids[i]);
    } else {
      if (value.empty()) value_at = i;
      value.push_back(d.ids[i]);
    }
    EXPECT_LE(key.size(), static_cast<size_t>(c.motif_len));
    EXPECT_LE(value.size(), static_cast<size_t>(c.motif_len));
  }
  close(false);
  for (const auto& [a, of_a] : value_of)
    for (const auto& [b, of_b] : value_of)
      EXPECT_FALSE(a != b && a.size() <= b.size() && std::equal(a.begin(), a.end(), b.begin()));
  EXPECT_EQ(num_targets(d), expected);
}

void check_parity(const TaskConfig& c, const Document& d) {
  for (size_t i = 0; i < d.ids.size(); ++i) {
    EXPECT_EQ(d.targets[i].id, std::count(d.ids.begin(), d.ids.begin() + static_cast<std::ptrdiff_t>(i) + 1, 1) % 2);
    EXPECT_EQ(d.targets[i].group, i < static_cast<size_t>(c.length) ? c.length : c.eval_lengths[0]);
  }
}

// The id of a permutation by its Lehmer code, and products as matrices of zeros and ones.
void check_permutations(const TaskConfig& c, const Document& d) {
  const auto n = static_cast<size_t>(c.degree);
  const auto things = [&](int64_t id) {
    Ids left, out;
    for (size_t i = 0; i < n; ++i) left.push_back(static_cast<int64_t>(i));
    int64_t block = 1;
    for (size_t i = 2; i < n; ++i) block *= static_cast<int64_t>(i);
    for (size_t i = n - 1;; --i) {
      const auto at = left.begin() + id / block;
      out.push_back(*at);
      left.erase(at);
      id %= block;
      if (i == 0) return out;
      block /= static_cast<int64_t>(i);
    }
  };
  std::vector<Ids> product(n, Ids(n));
  for (size_t i = 0; i < n; ++i) product[i][i] = 1;
  for (size_t t = 0; t < d.ids.size(); ++t) {
    const Ids step = things(d.ids[t]), answer = things(d.targets[t].id);
    std::vector<Ids> next(n, Ids(n));
    for (size_t from = 0; from < n; ++from)
      for (size_t by = 0; by < n; ++by) next[from][static_cast<size_t>(step[by])] += product[from][by];
    product = next;
    for (size_t from = 0; from < n; ++from) EXPECT_EQ(product[from][static_cast<size_t>(answer[from])], 1) << t;
  }
}

void check_retrieval(const TaskConfig& c, const Document& d) {
  const int64_t third = c.vocab_size / 3;
  const size_t n = static_cast<size_t>(c.num_needles), first = d.ids.size() - n;
  size_t needles = 0;
  for (size_t i = 0; i < first; ++i) {
    EXPECT_EQ(d.targets[i].id, -1);
    needles += d.ids[i] < third;
    EXPECT_EQ(d.ids[i] >= third && d.ids[i] < 2 * third, i > 0 && d.ids[i - 1] < third);
  }
  EXPECT_EQ(needles, n);
  std::set<int64_t> asked;
  for (size_t q = first; q < d.ids.size(); ++q) {
    const auto key = static_cast<size_t>(std::find(d.ids.begin(), d.ids.end(), d.ids[q]) - d.ids.begin());
    ASSERT_LT(key, first);
    EXPECT_TRUE(asked.insert(d.ids[q]).second);
    EXPECT_EQ(d.targets[q].id, d.ids[key + 1]);
    const auto distance = static_cast<int64_t>(q - key - 1);
    EXPECT_TRUE(distance <= d.targets[q].group && 2 * distance > d.targets[q].group) << distance << " in " << d.targets[q].group;
  }
}

const std::map<std::string, Check> kChecks{{"mqar", check_mqar}, {"induction", check_induction}, {"selective_copying", check_selective_copying}, {"ngram", check_ngram},
                                           {"fuzzy_recall", check_fuzzy_recall}, {"parity", check_parity}, {"permutations", check_permutations}, {"retrieval", check_retrieval}};

class Tasks : public testing::TestWithParam<std::string> {
 protected:
  const Task& task() const { return *find_task(GetParam()); }
  TaskConfig config() const { return config_of(GetParam()); }
  DataConfig data() const {
    DataConfig data;
    data.source = GetParam();
    data.task = config();
    return data;
  }
};

INSTANTIATE_TEST_SUITE_P(All, Tasks, testing::ValuesIn([] {
                           std::vector<std::string> names;
                           for (const Task& task : tasks()) names.push_back(task.name);
                           return names;
                         }()));

TEST_P(Tasks, DocumentsAreWhatTheDefinitionSays) {
  Issues issues;
  check_task(task(), config(), issues);
  ASSERT_TRUE(issues.empty()) << issues.list()[0].rule;
  std::vector<std::vector<TaskSize>> all{training_sizes(task(), config())};
  for (const TaskSize& size : eval_sizes(task(), config())) all.push_back({size});
  EXPECT_EQ(all.size(), 2u);
  for (const auto& sizes : all) {
    const auto source = open_task(task(), config(), sizes, 7);
    int64_t targets = 0;
    for (int64_t n = 0; n < 100; ++n) {
      const Document document = read_document(*source, n);
      EXPECT_EQ(static_cast<int64_t>(document.ids.size()), sizes[0].length);
      targets += num_targets(document);
      kChecks.at(GetParam())(config(), document);
      for (const int64_t id : document.ids) EXPECT_TRUE(id >= 0 && id < task().num_ids(config()));
      for (const Target& target : document.targets) EXPECT_TRUE(target.id >= -1 && target.id < task().num_ids(config()));
      ASSERT_FALSE(HasFailure()) << "document " << n << " of " << sizes[0].length << " tokens";
    }
    EXPECT_GE(targets, 100);
  }
}

TEST_P(Tasks, ADocumentDependsOnSeedAndNumberAlone) {
  const auto sizes = training_sizes(task(), config());
  const auto a = open_task(task(), config(), sizes, 7), b = open_task(task(), config(), sizes, 7), other = open_task(task(), config(), sizes, 8);
  EXPECT_EQ(a->hash(), b->hash());
  EXPECT_NE(a->hash(), other->hash());
  EXPECT_EQ(a->num_documents(), Source::kEndless);
  const Ids third = read_document(*a, 3).ids, far = read_document(*a, Source::kEndless - 2).ids;
  EXPECT_EQ(read_document(*b, 3).ids, third);
  EXPECT_NE(third, far);
  EXPECT_NE(third, read_document(*other, 3).ids);
  Ids part(5);
  std::vector<Target> targets(5);
  b->read(3, 20, part);
  b->read_targets(3, 59, targets);
  EXPECT_TRUE(std::equal(part.begin(), part.end(), third.begin() + 20));
  const Document whole = read_document(*a, 3);
  for (size_t i = 0; i < 5; ++i) EXPECT_EQ(targets[i].id, whole.targets[59 + i].id);
}

// Whole documents where they fit into rows, and what is to be predicted goes along where they do not.
TEST_P(Tasks, TargetsSurvivePacking) {
  const auto dataset = Dataset::open(data(), 256);
  const Source& source = *dataset->components()[0].source;
  for (const int64_t seq_len : {64, 24}) {
    Loader loader(dataset, seq_len);
    const std::vector<Row> rows = loader.next_rows(16);
    const Batch batch = assemble(rows);
    const Ids targets(batch.targets_n.const_data_ptr<int64_t>(), batch.targets_n.const_data_ptr<int64_t>() + batch.targets_n.numel());
    size_t row_token = 0;
    int64_t counted = 0, expected = 0;
    for (int64_t n = 0; (n + 1) * 64 <= 16 * seq_len; ++n) {
      const Document document = read_document(source, n);
      for (size_t i = 0; i < 64; ++i, ++row_token) {
        EXPECT_EQ(batch.ids_n.const_data_ptr<int64_t>()[row_token], document.ids[i]);
        EXPECT_EQ(targets[row_token], document.targets[i].id);
        expected += document.targets[i].id >= 0;
      }
    }
    for (const Row& row : rows) {
      EXPECT_EQ(row.lengths == Ids{64}, seq_len == 64);
      counted += row.num_targets();
    }
    EXPECT_GE(counted, expected);
    EXPECT_EQ(counted, std::count_if(targets.begin(), targets.end(), [](int64_t id) { return id >= 0; }));
  }
}

TEST_P(Tasks, HeldOutAndFurtherDocumentsAreNotTrainedOn) {
  const auto dataset = Dataset::open(data(), 256);
  std::set<Ids> trained;
  Loader loader(dataset, 64);
  for (const Row& row : loader.next_rows(50)) trained.insert(row.ids);
  const std::vector<Row> held_out = validation_rows(dataset, 64, 50 * 64);
  EXPECT_EQ(held_out.size(), 50u);
  for (const Row& row : held_out) EXPECT_FALSE(trained.contains(row.ids));
  const auto beyond = beyond_rows(data(), 1000);
  ASSERT_EQ(beyond.size(), 1u);
  EXPECT_EQ(beyond[0][0].ids, beyond_rows(data(), 500)[0][0].ids);
  for (const Row& row : beyond[0]) {
    EXPECT_EQ(row.ids.size(), row.targets.size());
    EXPECT_GT(row.ids.size(), 64u - 1);
  }
  EXPECT_GE(beyond[0].size() * beyond[0][0].ids.size(), 1000u);
}

TEST_P(Tasks, APositionIsRestoredAndOtherKeysAreRefused) {
  Loader through(Dataset::open(data(), 256), 64);
  through.next_rows(3);
  const nlohmann::json state = through.state();
  Loader resumed(Dataset::open(data(), 256), 64);
  resumed.restore(state);
  const Row a = through.next_rows(1)[0], b = resumed.next_rows(1)[0];
  EXPECT_EQ(a.ids, b.ids);
  for (size_t i = 0; i < a.targets.size(); ++i) EXPECT_EQ(a.targets[i].id, b.targets[i].id);
  DataConfig changed = data();
  changed.task.length = 128;
  EXPECT_NE(Dataset::open(changed, 256)->hash(), Dataset::open(data(), 256)->hash());
  Loader other(Dataset::open(changed, 256), 64);
  EXPECT_THROW(other.restore(state), Error);
  // What a run is measured on does not change what it is trained on.
  DataConfig measured = data();
  measured.task.eval_lengths = {256}, measured.task.eval_num_pairs = {3};
  EXPECT_EQ(Dataset::open(measured, 256)->hash(), Dataset::open(data(), 256)->hash());
}

constexpr const char* kModel = R"([model]
hybrid_override_pattern = "M*"
hidden_size = 32
vocab_size = 64
[blocks.mamba2]
num_heads = 4
head_dim = 8
state_size = 8
num_groups = 2
chunk = 16
[blocks.gqa]
num_heads = 4
num_kv_heads = 2
head_dim = 8
[training]
seq_len = 64
local_batch_size = 4
)";

Validation mqar_validation(int64_t tokens) {
  DataConfig data;
  data.source = "mqar";
  data.task.eval_num_pairs = {20};
  return open_validation(Dataset::open(data, 64), data, 64, tokens);
}

TEST(TaskAccuracy, OfAnUntrainedModelIsThatOfAGuess) {
  Built built(kModel);
  const Evaluation result = evaluate(built.model, mqar_validation(1 << 15), 16);
  ASSERT_TRUE(result.accuracy.has_value());
  ASSERT_EQ(result.by_group.size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(result.by_group[i].group, (std::vector<int64_t>{4, 8, 16, 20}[i]));
    EXPECT_EQ(result.by_group[i].trained, i < 3);
    EXPECT_GT(result.by_group[i].targets, 400);
    EXPECT_LT(result.by_group[i].accuracy(), 3.0 / 64 + 0.02);
  }
  EXPECT_GT(result.by_group[2].hits + result.by_group[3].hits, 0);
  EXPECT_NEAR(result.loss, std::log(64), 0.3);
  int64_t targets = 0, hits = 0;
  for (size_t i = 0; i < 3; ++i) targets += result.by_group[i].targets, hits += result.by_group[i].hits;
  EXPECT_EQ(result.targets, targets);
  EXPECT_EQ(*result.accuracy, static_cast<double>(hits) / static_cast<double>(targets));
}

// Against the greatest of the model's logits.
TEST(TaskAccuracy, IsTheShareOfGreatestLogits) {
  Built built(kModel);
  const at::NoGradGuard no_grad;
  const Validation validation = mqar_validation(1024);
  const Evaluation result = evaluate(built.model, validation.rows, 3);
  int64_t hits = 0, targets = 0;
  for (const Row& row : validation.rows) {
    const Batch batch = assemble(std::span(&row, 1));
    const at::Tensor best_n = built.model.logits(built.model.hidden(batch)).argmax(1);
    for (size_t i = 0; i < row.targets.size(); ++i) {
      targets += row.targets[i].id >= 0;
      hits += row.targets[i].id >= 0 && best_n[static_cast<int64_t>(i)].item<int64_t>() == row.targets[i].id;
    }
  }
  EXPECT_EQ(result.targets, targets);
  EXPECT_EQ(*result.accuracy, static_cast<double>(hits) / static_cast<double>(targets));
}

TEST(TaskAccuracy, AWordAsGreatIsNoHit) {
  const at::Tensor lm_head_vd = at::tensor(std::vector<float>{1, 2, 2, 0}).reshape({4, 1}), h_nd = at::tensor(std::vector<float>{1, -1, 1, 1}).reshape({4, 1});
  const at::Tensor targets_n = at::tensor(std::vector<int64_t>{1, 3, -1, 0});
  const at::Tensor hits_n = top_word_is(h_nd, lm_head_vd, targets_n, nullptr, /*chunk_tokens=*/2);
  EXPECT_TRUE(at::equal(hits_n, at::tensor(std::vector<int64_t>{0, 1, 0, 0}).to(at::kBool)));
}

// The loss of training counts what is asked for and nothing else.
TEST(TaskLoss, CountsTargetsAlone) {
  Built built(kModel);
  const Validation validation = mqar_validation(512);
  const std::vector<Batch> batches = micro_batches(validation.rows, 2, 0);
  const StepResult step = accumulate(built.model, batches);
  EXPECT_NEAR(step.loss, evaluate(built.model, validation.rows, 8).loss, 1e-5);
  int64_t targets = 0;
  for (const Row& row : validation.rows) targets += row.num_targets();
  Denominators over;
  for (const Batch& batch : batches) over += denominators(built.plan, batch);
  EXPECT_EQ(over.targets, std::vector<double>{static_cast<double>(targets)});
}

class TaskLayouts : public testing::TestWithParam<Mesh> {};

TEST_P(TaskLayouts, MeasureWhatOneProcessMeasures) {
  const Mesh mesh = GetParam();
  const Config config = parse_config(kModel, "test.toml", {}, plugins());
  const auto measure = [&](const MeshGroups* groups) {
    const ModelPlan plan = make_plan(config, groups ? groups->mesh() : Mesh{});
    Store store(plan, at::kCPU, at::kFloat, {}, groups);
    store.initialise(3);
    Model model(plan, store);
    return evaluate(model, mqar_validation(2000), 3);
  };
  at::set_num_threads(1);
  const Evaluation one = measure(nullptr);
  std::mutex mutex;
  run_ranks(mesh, [&](MeshGroups& groups) {
    const Evaluation many = measure(&groups);
    const std::lock_guard lock(mutex);
    EXPECT_NEAR(many.loss, one.loss, 1e-5);
    EXPECT_EQ(many.targets, one.targets);
    ASSERT_EQ(many.by_group.size(), one.by_group.size());
    for (size_t i = 0; i < one.by_group.size(); ++i) {
      EXPECT_EQ(many.by_group[i].targets, one.by_group[i].targets);
      EXPECT_EQ(many.by_group[i].hits, one.by_group[i].hits);
    }
  });
}
INSTANTIATE_TEST_SUITE_P(All, TaskLayouts, testing::Values(Mesh{.tp = 2}, Mesh{.pp = 2}, Mesh{.dp_shard = 2}, Mesh{.cp = 2}, Mesh{.dp_replicate = 2, .tp = 2}),
                         [](const auto& info) { return fmt::format("Mesh{}", info.index); });

std::string refusal(const std::string& toml, const std::vector<std::string>& sets = {}) {
  try {
    parse_config(toml, "test.toml", sets, plugins());
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(TaskConfiguration, IsReadWrittenAndRefused) {
  const std::string mqar = std::string(kModel) + "[data]\nsource = \"mqar\"\n[data.task]\nnum_pairs = [4, 8]\n";
  EXPECT_EQ(refusal(mqar), "no error");
  const Config config = parse_config(mqar, "test.toml", {"data.task.eval_num_pairs=[31]"}, plugins());
  EXPECT_EQ(config.data.task.num_pairs, (Ids{4, 8}));
  const std::string text = to_toml(config);
  EXPECT_NE(text.find("\n[data.task]\nlength = 64\nnum_pairs = [4, 8]\neval_num_pairs = [31]\nvocab_size = 64\n"), std::string::npos) << text;
  EXPECT_EQ(to_toml(parse_config(text, "again.toml", {}, plugins())), text);
  EXPECT_EQ(to_toml(parse_config(kModel, "test.toml", {}, plugins())).find("data.task"), std::string::npos);

  EXPECT_EQ(refusal(mqar, {"data.task.degree=3"}), "--set data.task.degree=3: error: data.task.degree: has no effect with data.source = \"mqar\"\nhelp: remove it");
  EXPECT_NE(refusal(mqar, {"data.task.pairs=3"}).find("data.task.pairs: unknown key"), std::string::npos);
  EXPECT_EQ(refusal(mqar, {"data.task.num_pairs=[]"}), "--set data.task.num_pairs=[]: error: data.task.num_pairs: must name at least one number of pairs, got []");
  EXPECT_EQ(refusal(mqar, {"data.task.num_pairs=[4, 17]"}),
            "test.toml:20:1: error: data.task.length: must hold every pair and its query, got 64 < 4 x 17 pairs = 68\nhelp: nearest: 68");
  EXPECT_EQ(refusal(mqar, {"data.task.eval_num_pairs=[32]"}),
            "test.toml:20:1: error: data.task.vocab_size: must give every pair of eval_num_pairs a key, got 64 / 2 - 1 = 31 keys for 32 pairs\nhelp: nearest: 66");
  EXPECT_EQ(refusal(mqar, {"model.vocab_size=63"}), "--set model.vocab_size=63: error: model.vocab_size: must hold the 64 ids of data.source = \"mqar\", got 63\nhelp: nearest: 64");
  EXPECT_EQ(refusal(mqar, {"training.seq_len=100"}),
            "--set training.seq_len=100: error: training.seq_len: rows must hold whole documents of data.task.length tokens, got 100 % 64 = 36\nhelp: nearest: 64, 128");
  EXPECT_EQ(refusal(std::string(kModel) + "[data]\nsource = \"permutations\"\n"),
            "test.toml:4:14: error: model.vocab_size: must hold the 120 ids of data.source = \"permutations\", got 64\nhelp: nearest: 120");
  EXPECT_NE(refusal(std::string(kModel) + "[data]\nsource = \"bytes\"\npath = \"x\"\n[data.task]\nlength = 8\n").find("data.task.length: has no effect with data.source = \"bytes\""), std::string::npos);
  EXPECT_NE(refusal(std::string(kModel) + "[data]\nsource = \"mqar\"\ntask = 3\n").find("data.task: must be a table, got the integer 3"), std::string::npos);
  EXPECT_NE(refusal(std::string(kModel) + "[data]\nsource = \"ngram\"\n").find("data.task.length: must be at least vocab_size^order"), std::string::npos);
  EXPECT_NE(refusal(std::string(kModel) + "[data]\nsource = \"selective_copying\"\n[data.task]\nnum_tokens = 33\n").find("must hold the tokens and their copies, got 64 < 2 x 33 = 66"), std::string::npos);
  EXPECT_NE(refusal(std::string(kModel) + "[data]\nsource = \"retrieval\"\n[data.task]\nnum_needles = 22\n").find("must hold every needle and its query, got 64 < 3 x 22 = 66"), std::string::npos);
  EXPECT_NE(refusal(std::string(kModel) + "[data]\nsource = \"fuzzy_recall\"\n[data.task]\nnum_pairs = [17]\n").find("got 64 / 4 = 16 for 17 pairs"), std::string::npos);
}

}  // namespace
}  // namespace tessera
