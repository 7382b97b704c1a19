#include "data/loader.hpp"

#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "data/hash.hpp"
#include "data/tasks/task.hpp"
#include "tessera/error.hpp"

namespace tessera {
using nlohmann::json;

namespace {

constexpr const char* kPlace = "data position";
constexpr uint64_t kBeyond = 4;  // a use of the seed, beside those of the dataset

template <class... T>
[[noreturn]] void fail(std::string help, fmt::format_string<T...> format, T&&... args) {
  throw Error(ExitCode::kRuntime, std::string(kPlace) + ": " + fmt::format(format, std::forward<T>(args)...), std::move(help));
}

int64_t integer(const json& object, const char* key, int64_t low, int64_t high) {
  const auto it = object.is_object() ? object.find(key) : object.end();
  if (it == object.end()) fail("", "has no '{}'", key);
  const bool fits = it->is_number_integer() && !(it->is_number_unsigned() && it->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX));
  if (!fits || it->get<int64_t>() < low || it->get<int64_t>() > high)
    fail("", "{} must be an integer in [{}, {}], got {}", key, low, high, it->dump());
  return it->get<int64_t>();
}

template <class T>
void expect_same(const json& object, const char* key, const T& now, const std::string& what) {
  const auto it = object.is_object() ? object.find(key) : object.end();
  if (it == object.end()) fail("", "has no '{}'", key);
  if (*it != json(now)) fail("resume with the value of the checkpoint", "{} was {}, now {}", what, it->dump(), json(now).dump());
}

}  // namespace

int64_t Row::num_targets() const {
  if (!targets.empty()) return std::count_if(targets.begin(), targets.end(), [](const Target& target) { return target.id >= 0; });
  int64_t count = 0;
  for (const int64_t length : lengths) count += length - 1;
  return count;
}

Batch assemble(std::span<const Row> rows) {
  std::vector<int64_t> lengths;
  int64_t num_tokens = 0;
  for (const Row& row : rows) {
    lengths.insert(lengths.end(), row.lengths.begin(), row.lengths.end());
    num_tokens += static_cast<int64_t>(row.ids.size());
  }
  Batch batch;
  batch.ids_n = at::empty({num_tokens}, at::kLong);
  batch.spans = Spans::documents(lengths);
  int64_t* out = batch.ids_n.mutable_data_ptr<int64_t>();
  for (const Row& row : rows) out = std::copy(row.ids.begin(), row.ids.end(), out);
  if (rows.empty() || rows[0].targets.empty()) return batch;
  batch.targets_n = at::empty({num_tokens}, at::kLong);
  out = batch.targets_n.mutable_data_ptr<int64_t>();
  for (const Row& row : rows) out = std::transform(row.targets.begin(), row.targets.end(), out, [](const Target& target) { return target.id; });
  return batch;
}

Loader::Loader(std::shared_ptr<const Dataset> dataset, int64_t seq_len) : Loader(std::move(dataset), seq_len, Split::kTraining) {}

Loader::Loader(std::shared_ptr<const Dataset> dataset, int64_t seq_len, Split split)
    : dataset_(std::move(dataset)), seq_len_(seq_len), cursors_(dataset_->components().size()) {
  for (size_t c = 0; c < cursors_.size() && split == Split::kTraining; ++c) pieces_.emplace_back(*dataset_, c, seq_len);
}

int64_t Loader::num_pieces(size_t component) const {
  return pieces_.empty() ? dataset_->num_documents(component, Split::kValidation) : pieces_[component].size();
}

Piece Loader::piece_at(size_t component, const Cursor& cursor) const {
  if (!pieces_.empty()) return pieces_[component].at(cursor.epoch, cursor.ordinal);
  const int64_t document = dataset_->held_out_document(component, cursor.ordinal);
  return {document, 0, dataset_->components()[component].source->document_len(document)};
}

// Opens the next piece that has a token. False at the end of the held-out documents; the training stream has no end.
bool Loader::open_piece() {
  std::vector<bool> exhausted(cursors_.size());
  for (;;) {
    int64_t best = -1;
    const auto tokens_per_weight = [&](int64_t c) {
      return static_cast<double>(cursors_[static_cast<size_t>(c)].tokens) / dataset_->components()[static_cast<size_t>(c)].weight;
    };
    for (int64_t c = 0; c < static_cast<int64_t>(cursors_.size()); ++c)
      if (!exhausted[static_cast<size_t>(c)] && (best < 0 || tokens_per_weight(c) < tokens_per_weight(best))) best = c;
    if (best < 0) return false;
    const auto c = static_cast<size_t>(best);
    Cursor& cursor = cursors_[c];
    const int64_t n = num_pieces(c);
    if (!pieces_.empty() && cursor.ordinal >= n) ++cursor.epoch, cursor.ordinal = 0;
    for (; cursor.ordinal < n; ++cursor.ordinal) {
      piece_ = piece_at(c, cursor);
      if (piece_.length == 0) continue;
      current_ = best;
      offset_ = 0;
      cursor.tokens += piece_.length;
      return true;
    }
    exhausted[c] = true;
  }
}

Row Loader::next_row(bool read) {
  Row row;
  if (read) row.ids.resize(static_cast<size_t>(seq_len_));
  int64_t filled = 0;
  while (filled < seq_len_) {
    if (current_ < 0 && !open_piece()) break;
    const int64_t count = std::min(seq_len_ - filled, piece_.length - offset_);
    const auto c = static_cast<size_t>(current_);
    if (read) {
      const auto out = std::span(row.ids).subspan(static_cast<size_t>(filled), static_cast<size_t>(count));
      dataset_->read(c, piece_.document, piece_.begin + offset_, out);
      if (dataset_->has_targets(c)) {
        row.targets.resize(static_cast<size_t>(filled + count));
        dataset_->read_targets(c, piece_.document, piece_.begin + offset_, std::span(row.targets).subspan(static_cast<size_t>(filled)));
      }
    }
    row.lengths.push_back(count);
    filled += count;
    offset_ += count;
    if (offset_ < piece_.length) continue;
    ++cursors_[c].ordinal;
    current_ = -1;
  }
  if (read) row.ids.resize(static_cast<size_t>(filled));
  return row;
}

std::vector<Row> Loader::next_rows(int64_t count, int64_t first, int64_t last) {
  std::vector<Row> rows;
  rows.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) rows.push_back(next_row(i >= first && i < last));
  return rows;
}

std::string Loader::hash() const {
  Fingerprint print;
  print.add(dataset_->hash());
  print.add(static_cast<uint64_t>(seq_len_));
  return print.text();
}

json Loader::state() const {
  json state{{"seed", dataset_->seed()}, {"validation_fraction", dataset_->validation_fraction()}, {"seq_len", seq_len_},
             {"current", current_}, {"offset", current_ < 0 ? 0 : offset_}, {"sources", json::array()}};
  for (size_t c = 0; c < cursors_.size(); ++c) {
    const Component& component = dataset_->components()[c];
    state["sources"].push_back({{"name", component.source->name()}, {"hash", component.source->hash()}, {"weight", component.weight},
                                {"documents", component.source->num_documents()}, {"epoch", cursors_[c].epoch},
                                {"ordinal", cursors_[c].ordinal}, {"tokens", cursors_[c].tokens}});
  }
  return state;
}

void Loader::restore(const json& state) {
  expect_same(state, "seed", dataset_->seed(), "data.seed");
  expect_same(state, "validation_fraction", dataset_->validation_fraction(), "data.validation_fraction");
  expect_same(state, "seq_len", seq_len_, "training.seq_len");
  const auto sources = state.find("sources");
  if (sources == state.end() || !sources->is_array()) fail("", "has no list 'sources'");
  if (sources->size() != cursors_.size()) fail("resume with the data of the checkpoint", "it was in {} sources, now there are {}", sources->size(), cursors_.size());
  std::vector<Cursor> cursors(cursors_.size());
  for (size_t c = 0; c < cursors.size(); ++c) {
    const json& saved = (*sources)[c];
    const Component& component = dataset_->components()[c];
    const auto text = [&](const char* key) {
      const auto it = saved.is_object() ? saved.find(key) : saved.end();
      if (it == saved.end() || !it->is_string()) fail("", "source {} has no text '{}'", c, key);
      return it->get<std::string>();
    };
    const int64_t documents = integer(saved, "documents", 1, Source::kEndless);
    if (text("hash") != component.source->hash() || documents != component.source->num_documents())
      fail("resume with the data of the checkpoint", "source {} changed: it was {} with {} documents (hash {}), now {} with {} documents (hash {})", c,
           text("name"), documents, text("hash"), component.source->name(), component.source->num_documents(), component.source->hash());
    expect_same(saved, "weight", component.weight, fmt::format("weight of source {}", c));
    cursors[c] = {integer(saved, "epoch", 0, INT64_MAX - 1), integer(saved, "ordinal", 0, num_pieces(c)),
                  integer(saved, "tokens", 0, INT64_MAX)};
  }
  const int64_t current = integer(state, "current", -1, static_cast<int64_t>(cursors.size()) - 1);
  Piece piece{};
  int64_t offset = 0;
  if (current >= 0) {
    const auto c = static_cast<size_t>(current);
    integer((*sources)[c], "ordinal", 0, num_pieces(c) - 1);
    piece = piece_at(c, cursors[c]);
    offset = integer(state, "offset", 1, piece.length - 1);
  }
  cursors_ = std::move(cursors);
  current_ = current, piece_ = piece, offset_ = offset;
}

std::vector<std::vector<Row>> beyond_rows(const DataConfig& config, int64_t tokens) {
  std::vector<std::vector<Row>> all;
  const Task* task = find_task(config.source);
  for (const TaskSize& size : task ? eval_sizes(*task, config.task) : std::vector<TaskSize>{}) {
    const auto source = open_task(*task, config.task, {size}, mix(static_cast<uint64_t>(config.seed), kBeyond));
    const auto length = static_cast<size_t>(size.length);
    std::vector<Row>& rows = all.emplace_back();
    for (int64_t document = 0; document * size.length < tokens; ++document) {
      Row& row = rows.emplace_back(Row{.ids = std::vector<int64_t>(length), .lengths = {size.length}, .targets = std::vector<Target>(length)});
      source->read(document, 0, row.ids);
      source->read_targets(document, 0, row.targets);
    }
  }
  return all;
}

std::vector<Row> validation_rows(std::shared_ptr<const Dataset> dataset, int64_t seq_len, int64_t tokens) {
  bool held_out = false;
  for (const Component& component : dataset->components()) held_out |= component.num_held_out > 0;
  if (!held_out && dataset->validation_fraction() > 0)
    throw Error(ExitCode::kRuntime, fmt::format("{}: has 1 document, so none can be held out for validation", dataset->components()[0].source->name()),
                "give more documents, or turn validation off with validation.interval = 0");
  if (!held_out)
    throw Error(ExitCode::kRuntime, "data.validation_fraction = 0 holds no document out for validation", "turn validation off with validation.interval = 0");
  Loader loader(dataset, seq_len, Split::kValidation);
  std::vector<Row> rows;
  const int64_t count = std::max<int64_t>(1, tokens / seq_len);
  while (static_cast<int64_t>(rows.size()) < count) {
    Row row = loader.next_row(true);
    if (row.ids.empty() || (static_cast<int64_t>(row.ids.size()) < seq_len && !rows.empty())) break;
    const bool last = static_cast<int64_t>(row.ids.size()) < seq_len;
    rows.push_back(std::move(row));
    if (last) break;
  }
  if (rows.empty()) throw Error(ExitCode::kRuntime, fmt::format("{}: all documents held out for validation are empty", dataset->components()[0].source->name()));
  return rows;
}

}  // namespace tessera
