#include "hf/verify.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "hf/convert.hpp"
#include "hf/hf_config.hpp"
#include "hf/hf_names.hpp"
#include "infer/generate.hpp"
#include "model/model.hpp"
#include "train/optimizer.hpp"
#include "train/pipeline.hpp"
#include "train/setup.hpp"
#include "train/step.hpp"

namespace tessera {

namespace fs = std::filesystem;

namespace {

// The training run that reference files hold.
constexpr int64_t kSteps = 5, kNewTokens = 24, kPromptLen = 9;
constexpr double kLr = 1e-3, kMaxNorm = 1.0;
const OptimizerConfig kOptimizer{.lr = kLr, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};

constexpr const char* kAxes[] = {"dp_replicate", "dp_shard", "pp", "cp", "tp", "ep"};
const std::set<std::string> kInputs{"input_ids", "document_lengths", "generate.prompt"};

struct Inputs {
  at::Tensor ids_bt, lengths_bn, prompt_1p;  // int64, CPU
  std::vector<std::vector<int64_t>> documents;  // lengths by row; a row's rest is padding
};

at::Tensor integers(const SafetensorsFile& file, const char* name, int64_t low, int64_t high) {
  at::Tensor t = file.tensor(name);
  if (t.dim() != 2 || t.numel() == 0 || (t.scalar_type() != at::kLong && t.scalar_type() != at::kInt))
    throw Error(ExitCode::kRuntime, fmt::format("{}: {} must be a matrix of integers, got {} [{}]", file.path().string(), name, safetensors_dtype(t.scalar_type()),
                                                fmt::join(t.sizes(), ", ")));
  t = t.to(at::kLong).contiguous();
  const int64_t least = t.min().item<int64_t>(), most = t.max().item<int64_t>();
  if (least < low || most > high)
    throw Error(ExitCode::kRuntime, fmt::format("{}: {} must lie in [{}, {}], got {} to {}", file.path().string(), name, low, high, least, most));
  return t;
}

Inputs read_inputs(const SafetensorsFile& file, int64_t vocab_size) {
  if (!file.find("input_ids")) throw Error(ExitCode::kRuntime, fmt::format("{}: holds no input_ids [rows, tokens]", file.path().string()));
  Inputs in{.ids_bt = integers(file, "input_ids", 0, vocab_size - 1)};
  const int64_t B = in.ids_bt.size(0), T = in.ids_bt.size(1);
  if (file.find("document_lengths")) {
    in.lengths_bn = integers(file, "document_lengths", 0, T);
    if (in.lengths_bn.size(0) != B)
      throw Error(ExitCode::kRuntime, fmt::format("{}: document_lengths must have {} rows, as input_ids, got {}", file.path().string(), B, in.lengths_bn.size(0)));
  }
  for (int64_t b = 0; b < B; ++b) {
    std::vector<int64_t> lengths;
    int64_t sum = 0;
    if (!in.lengths_bn.defined()) lengths.push_back(T), sum = T;
    else
      for (int64_t i = 0; i < in.lengths_bn.size(1); ++i)
        if (const int64_t n = in.lengths_bn[b][i].item<int64_t>(); n > 0) lengths.push_back(n), sum += n;
    if (sum > T || sum == 0) throw Error(ExitCode::kRuntime, fmt::format("{}: document_lengths of row {} must sum to 1..{}, got {}", file.path().string(), b, T, sum));
    in.documents.push_back(std::move(lengths));
  }
  in.prompt_1p = file.find("generate.prompt") ? integers(file, "generate.prompt", 0, vocab_size - 1).narrow(0, 0, 1)
                                              : in.ids_bt.narrow(0, 0, 1).narrow(1, 0, std::min(kPromptLen, in.documents[0][0])).contiguous();
  return in;
}

Batch make_batch(const Inputs& in, int64_t begin, int64_t end, at::Device device) {
  const int64_t T = in.ids_bt.size(1);
  std::vector<int64_t> lengths;
  at::Tensor valid_n = at::zeros({(end - begin) * T}, at::kBool);
  bool padded = false;
  for (int64_t b = begin; b < end; ++b) {
    int64_t sum = 0;
    for (int64_t n : in.documents[static_cast<size_t>(b)]) lengths.push_back(n), sum += n;
    valid_n.narrow(0, (b - begin) * T, sum).fill_(true);
    if (sum < T) lengths.push_back(T - sum), padded = true;
  }
  Batch batch;
  batch.ids_n = in.ids_bt.narrow(0, begin, end - begin).flatten().to(device);
  batch.spans = Spans::documents(lengths);
  if (padded) batch.valid_n = valid_n.to(device);
  return batch;
}

// The axis of the mesh that a group's traffic counts for: the first of these along which its members differ, "ep" for the experts' groups. nullptr where
// it only adds up counts and losses, which flow whatever the layout.
const char* axis_of(const Group& group, const MeshGroups& ranks) {
  if (&group == ranks.all() || &group == ranks.stage() || &group == ranks.data()) return nullptr;
  if (group.name().starts_with("ep") || group.name().starts_with("etp")) return "ep";
  const Place a = place_of(ranks.mesh(), group.ranks()[0]), b = place_of(ranks.mesh(), group.ranks().back());
  return a.dp_replicate != b.dp_replicate ? "dp_replicate" : a.dp_shard != b.dp_shard ? "dp_shard" : a.pp != b.pp ? "pp" : a.cp != b.cp ? "cp" : "tp";
}

class Verifier {
 public:
  Verifier(const Config& config, const Inputs& inputs, const fs::path& folder, const MeshGroups* ranks)
      : config_(config), in_(inputs), ranks_(ranks), mesh_(ranks ? ranks->mesh() : Mesh{}), plan_(make_plan(config, mesh_)), device_(choose_device(config.training.device, ranks)),
        store_(plan_, device_, choose_dtype(config.training.dtype, device_, ranks), config.training.freeze, ranks),
        model_(plan_, store_, recomputed_bindings(config.activation_checkpoint)) {
    load_hf(folder, plan_, store_);
    const int64_t B = in_.ids_bt.size(0), data_ranks = mesh_.dp_replicate * mesh_.dp_shard, rows = config_.training.local_batch_size;
    const Range mine = rows_of(B, data_rank(ranks), data_ranks);
    // Every data rank takes as many micro-batches, some of them empty.
    for (int64_t first = 0; first < (B + data_ranks - 1) / data_ranks; first += rows) {
      rows_.push_back({std::min(mine.end, mine.begin + first), std::min(mine.end, mine.begin + first + rows)});
      batches_.push_back(make_batch(in_, rows_.back().begin, rows_.back().end, device_));
    }
  }

  VerifyReport run() {
    report_.pattern = config_.model.hybrid_override_pattern;
    add("input_ids", "", in_.ids_bt);
    if (in_.lengths_bn.defined()) add("document_lengths", "", in_.lengths_bn);
    forward();
    generate();
    const auto before = sent();
    gradients();
    train();
    count_ranks(before);
    return std::move(report_);
  }

 private:
  void add(const std::string& name, const std::string& where, const at::Tensor& value) {
    report_.tensors.push_back({.name = name, .where = where, .value = value.detach().to(at::kCPU).contiguous()});
  }
  void add(const std::string& name, const std::string& where, const std::vector<double>& values, bool scalar = false) {
    const at::Tensor t = at::tensor(values).to(at::kFloat);
    add(name, where, scalar ? t.reshape({}) : t);
  }

  std::string layer_name(const LayerPlan& layer) const {
    const bool main = layer.prefix.starts_with("layers.");
    return fmt::format("{} {} ({})", main ? "layer" : "head's layer", layer.index, layer.binding);
  }

  void forward() {
    at::NoGradGuard no_grad;
    const int64_t B = in_.ids_bt.size(0), T = in_.ids_bt.size(1), D = plan_.env.hidden_size, V = plan_.env.vocab_size;
    std::vector<std::pair<std::string, std::string>> names{{"hidden.0", "embedding"}};
    for (const LayerPlan& layer : plan_.layers) names.emplace_back(fmt::format("hidden.{}", layer.index + 1), layer_name(layer));
    names.emplace_back("logits", "final norm and lm_head");
    if (plan_.head)
      for (const HeadPass& pass : plan_.head->passes) names.emplace_back(pass.name + ".logits", "head " + pass.name);
    std::map<std::string, at::Tensor> wholes;
    for (const auto& [name, where] : names) wholes[name] = at::zeros({B, T, name.starts_with("hidden.") ? D : V}, at::TensorOptions(at::kFloat).device(device_));
    // Of what several ranks hold alike, the first one's.
    const bool shows = !ranks_ || (ranks_->place().tp == 0 && ranks_->place().cp == 0);
    for (size_t i = 0; i < batches_.size(); ++i) {
      const Range rows = rows_[i];
      const auto show = [&](const std::string& name, const at::Tensor& x) {
        if (shows) wholes.at(name).narrow(0, rows.begin, rows.end - rows.begin).view({-1, x.size(-1)}).copy_(x);
      };
      const at::Tensor hidden = hidden_by_stage(model_, batches_[i], nullptr, [&](int64_t layer, const at::Tensor& x) { show(fmt::format("hidden.{}", layer + 1), x); });
      if (!hidden.defined()) continue;
      show("logits", model_.logits(hidden));
      const auto head = model_.head_logits(batches_[i], hidden);
      for (size_t p = 0; p < head.size(); ++p) show(plan_.head->passes[p].name + ".logits", head[p]);
    }
    for (const auto& [name, where] : names) {
      if (ranks_ && ranks_->all()) {
        ranks_->whereabouts().place = "showing " + name;
        ranks_->all()->all_reduce(wholes[name]);
      }
      add(name, where, wholes[name]);
    }
  }

  void generate() {
    const std::vector<int64_t> prompt(in_.prompt_1p.const_data_ptr<int64_t>(), in_.prompt_1p.const_data_ptr<int64_t>() + in_.prompt_1p.size(1));
    const std::vector<int64_t> tokens = mesh_.cp == 1 ? tessera::generate(model_, {prompt}, {.max_new_tokens = kNewTokens})[0] : generate_anew(prompt);
    add("generate.prompt", "", in_.prompt_1p);
    add("generate.tokens", "generation", at::tensor(tokens, at::kLong).reshape({1, kNewTokens}));
  }

  // Without a decode state: every token from all before it.
  std::vector<int64_t> generate_anew(std::vector<int64_t> text) {
    const size_t prompt = text.size();
    while (text.size() < prompt + kNewTokens) {
      const auto n = static_cast<int64_t>(text.size());
      const Batch batch{.ids_n = at::tensor(text, at::kLong).to(device_), .spans = Spans::documents({n})};
      const at::Tensor hidden = hidden_by_stage(model_, batch);
      at::Tensor next = at::zeros({1}, at::TensorOptions(at::kLong).device(device_));
      if (hidden.defined()) next = model_.logits(hidden.narrow(0, n - 1, 1)).argmax(1);
      text.push_back(from_last_stage(*ranks_, next).item<int64_t>());
    }
    return {text.begin() + static_cast<std::ptrdiff_t>(prompt), text.end()};
  }

  void refuse_auxiliary(const StepResult& result) const {
    std::set<std::string> passes;
    if (plan_.head)
      for (const HeadPass& pass : plan_.head->passes) passes.insert(pass.name);
    for (const auto& [name, part] : result.parts)
      if (!passes.contains(name) && part != 0)
        throw Error(ExitCode::kUsage, fmt::format("the auxiliary loss '{}' is on: reference files are without", name), "set its coefficient to 0");
  }

  void gradients() {
    store_.zero_grad();
    const StepResult losses = accumulate(model_, batches_);
    refuse_auxiliary(losses);
    add("loss", "loss", {losses.loss}, true);
    if (plan_.head) {
      for (const HeadPass& pass : plan_.head->passes) add(pass.name + ".loss", "head " + pass.name, {losses.parts.at(pass.name)}, true);
      add("total_loss", "loss", {losses.total_loss}, true);
    }
    std::map<std::string, std::string> where;
    for (const TensorRow& row : tensor_rows(plan_)) where[row.name] = (row.layer ? layer_name(*row.layer) : row.name) + ", backward";
    const auto tensors = hub_tensors(plan_);
    std::string source;
    at::Tensor grad;
    for (auto t = tensors.rbegin(); t != tensors.rend(); ++t) {
      if (t->is_buffer || !store_.trainable(t->source)) continue;
      if (t->source != source) {
        source = t->source;
        if (ranks_) ranks_->whereabouts().place = "showing the gradient of " + source;
        grad = store_.whole(source, tessera::gradients);
      }
      add("grad." + t->name, where[source], (t->index < 0 ? grad : grad.select(0, t->index)).clone());
    }
  }

  // Reference files are without the blocks' own updates: their buffers stay.
  void train() {
    std::vector<std::pair<at::Tensor, at::Tensor>> kept;
    for (const TensorRow& row : tensor_rows(plan_))
      if (row.buffer && store_.has(row.name)) kept.emplace_back(store_.buffer(row.name), store_.buffer(row.name).clone());
    Optimizer optimizer(store_, kOptimizer);
    store_.zero_grad();
    std::vector<double> losses, norms;
    for (int64_t step = 0; step < kSteps; ++step) {
      const StepResult result = train_step(model_, optimizer, batches_, kLr, kMaxNorm);
      losses.push_back(result.total_loss);
      norms.push_back(result.grad_norm);
      for (const auto& [buffer, before] : kept) buffer.copy_(before);
    }
    add("train.losses", "training", losses);
    add("train.grad_norms", "training", norms);
  }

  std::map<std::string, int64_t> sent() const {
    std::map<std::string, int64_t> bytes;
    for (const char* axis : kAxes) bytes[axis] = 0;
    if (ranks_)
      for (const Group* group : ranks_->list())
        if (const char* axis = axis_of(*group, *ranks_)) bytes[axis] += group->sent_bytes();
    return bytes;
  }

  // What every rank holds, and what it sent since `before`.
  void count_ranks(const std::map<std::string, int64_t>& before) {
    std::vector<int64_t> own{0};
    for (const FlatGroup& group : store_.groups()) own[0] += static_cast<int64_t>(group.data.nbytes());
    const auto now = sent();
    for (const char* axis : kAxes) own.push_back(now.at(axis) - before.at(axis));
    const auto width = static_cast<int64_t>(own.size());
    at::Tensor all = at::tensor(own, at::kLong);
    if (ranks_ && ranks_->all()) {
      ranks_->whereabouts().place = "the count of bytes";
      const at::Tensor here = all.to(device_);
      all = at::empty({width * mesh_.size()}, here.options());
      ranks_->all()->all_gather(all, here);
      all = all.to(at::kCPU);
    }
    const int64_t* from = all.const_data_ptr<int64_t>();
    for (int64_t rank = 0; rank < mesh_.size(); ++rank) {
      VerifyRank row{.parameter_bytes = *from++};
      for (const char* axis : kAxes) row.sent_bytes.emplace_back(axis, *from++);
      report_.ranks.push_back(std::move(row));
    }
  }

  const Config& config_;
  const Inputs& in_;
  const MeshGroups* ranks_;
  Mesh mesh_;
  ModelPlan plan_;
  at::Device device_;
  Store store_;
  Model model_;
  std::vector<Range> rows_;       // of each micro-batch
  std::vector<Batch> batches_;    // recomputation reads them in the backward pass
  VerifyReport report_;
};

double relative_rms(const at::Tensor& got, const at::Tensor& want) {
  const at::Tensor a = got.to(at::kDouble), b = want.to(at::kDouble);
  const double diff = (a - b).square().mean().item<double>(), base = b.square().mean().item<double>();
  return std::sqrt(base > 0 ? diff / base : diff);
}

void compare(VerifyTensor& t, const at::Tensor& want) {
  t.compared = true;
  const bool exact = !at::isFloatingType(t.value.scalar_type());
  t.limit = exact ? 0 : t.name.starts_with("grad.") ? kGradientLimit : t.value.dim() < 2 ? kLossLimit : kForwardLimit;
  if (t.value.sizes() != want.sizes()) {
    t.problem = fmt::format("shape [{}] in the file, [{}] computed", fmt::join(want.sizes(), ", "), fmt::join(t.value.sizes(), ", "));
  } else if (exact != !at::isFloatingType(want.scalar_type())) {
    t.problem = fmt::format("{} in the file, {} computed", safetensors_dtype(want.scalar_type()), safetensors_dtype(t.value.scalar_type()));
  } else if (t.value.numel()) {
    t.error = exact ? t.value.ne(want).to(at::kDouble).mean().item<double>() : relative_rms(t.value, want);
    if (!std::isfinite(t.error)) t.problem = "not finite";
  }
  t.ok = t.problem.empty() && t.error <= t.limit;
}

// As many passes as the file has logits of; the head's own default where it has none.
void take_depths(Config& config, const SafetensorsFile& file, std::vector<std::string>& notes) {
  if (!config.head) return;
  const Field* depths = config.head->type->fields().find("depths");
  if (!depths) return;
  for (int64_t n = 64; n >= 1; --n) {
    depths->set(config.head->config.get(), Value(n));
    const auto passes = config.head->type->passes(config.head->config);
    if (n == 1 || file.find(passes.back().name + ".logits") || file.find(passes.back().name + ".loss")) {
      if (n > 1) notes.push_back(fmt::format("heads.{}.depths = {}: as many as the reference file holds", config.head->name, n));
      return;
    }
  }
}

}  // namespace

int64_t VerifyReport::num_compared() const {
  return std::count_if(tensors.begin(), tensors.end(), [](const VerifyTensor& t) { return t.compared; }) + static_cast<int64_t>(not_computed.size());
}
int64_t VerifyReport::num_failed() const {
  return std::count_if(tensors.begin(), tensors.end(), [](const VerifyTensor& t) { return !t.ok; }) + static_cast<int64_t>(not_computed.size());
}
const VerifyTensor* VerifyReport::find(const std::string& name) const {
  for (const VerifyTensor& t : tensors)
    if (t.name == name) return &t;
  return nullptr;
}

VerifyReport verify_hf(const fs::path& folder, const fs::path& reference, const Registry& registry, const VerifyOptions& options, const MeshGroups* ranks) {
  const SafetensorsFile file = SafetensorsFile::open(reference);
  std::vector<std::string> notes;
  Config config = import_hf_config(folder / "config.json", registry, options.waived, notes);
  if (const TensorEntry* ids = file.find("input_ids"); ids && !ids->shape.empty()) config.training.local_batch_size = std::max<int64_t>(1, ids->shape[0]);
  config.training.device = "cpu";
  config.training.dtype = "float32";
  take_depths(config, file, notes);
  config = with_sets(config, options.sets, registry);
  const Inputs inputs = read_inputs(file, config.model.vocab_size);
  Issues issues;
  check_config(config, ranks ? ranks->mesh() : Mesh{}, issues);
  issues.raise();
  VerifyReport report = Verifier(config, inputs, folder, ranks).run();
  report.notes = std::move(notes);
  for (VerifyTensor& t : report.tensors) {
    if (kInputs.contains(t.name) || !file.find(t.name)) continue;
    compare(t, file.tensor(t.name));
    if (!t.ok && report.first_difference.empty()) report.first_difference = t.where;
  }
  for (const TensorEntry& entry : file.entries())
    if (!report.find(entry.name)) report.not_computed.push_back(entry.name);
  if (report.first_difference.empty() && !report.not_computed.empty()) report.first_difference = "tensors that are not computed";
  return report;
}

}  // namespace tessera
