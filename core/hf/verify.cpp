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
#include "model/model.hpp"
#include "train/optimizer.hpp"
#include "train/setup.hpp"

namespace tessera {

namespace fs = std::filesystem;

namespace {

// The training run that reference files hold.
constexpr int64_t kSteps = 5, kNewTokens = 24, kPromptLen = 9;
constexpr double kLr = 1e-3, kMaxNorm = 1.0;
const OptimizerConfig kOptimizer{.lr = kLr, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};

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
  batch.ids_n = in.ids_bt.narrow(0, begin, end - begin).reshape({-1}).to(device);
  batch.spans = Spans::documents(lengths);
  if (padded) batch.valid_n = valid_n.to(device);
  return batch;
}

class Verifier {
 public:
  Verifier(const Config& config, const Inputs& inputs, const fs::path& folder)
      : config_(config), in_(inputs), plan_(make_plan(config)), device_(choose_device(config.training.device)),
        store_(plan_, device_, choose_dtype(config.training.dtype, device_), config.training.freeze),
        model_(plan_, store_, recomputed_bindings(config.activation_checkpoint)) {
    load_hf(folder, plan_, store_);
  }

  VerifyReport run() {
    for (const FlatGroup& group : store_.groups()) report_.parameter_bytes += static_cast<int64_t>(group.data.nbytes());
    report_.pattern = config_.model.hybrid_override_pattern;
    add("input_ids", "", in_.ids_bt);
    if (in_.lengths_bn.defined()) add("document_lengths", "", in_.lengths_bn);
    forward();
    generate();
    gradients();
    train();
    return std::move(report_);
  }

 private:
  // Losses and their backward pass over the batch in micro-batches.
  struct Losses {
    double main = 0, total = 0;
    std::map<std::string, double> parts;
  };

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

  std::vector<std::pair<int64_t, int64_t>> micro_batches() const {
    const int64_t B = in_.ids_bt.size(0), rows = config_.training.local_batch_size;
    std::vector<std::pair<int64_t, int64_t>> out;
    for (int64_t b = 0; b < B; b += rows) out.emplace_back(b, std::min(B, b + rows));
    return out;
  }

  void forward() {
    at::NoGradGuard no_grad;
    const int64_t B = in_.ids_bt.size(0), T = in_.ids_bt.size(1);
    std::map<std::string, std::vector<at::Tensor>> parts;
    std::vector<std::pair<std::string, std::string>> names{{"hidden.0", "embedding"}};
    for (const LayerPlan& layer : plan_.layers) names.emplace_back(fmt::format("hidden.{}", layer.index + 1), layer_name(layer));
    names.emplace_back("logits", "final norm and lm_head");
    if (plan_.head)
      for (const HeadPass& pass : plan_.head->passes) names.emplace_back(pass.name + ".logits", "head " + pass.name);
    for (const auto& [begin, end] : micro_batches()) {
      const Batch batch = make_batch(in_, begin, end, device_);
      auto shaped = [&](const at::Tensor& x) { return x.to(at::kFloat).reshape({end - begin, T, x.size(-1)}).clone(); };
      const at::Tensor hidden = model_.hidden(batch, nullptr, [&](int64_t layer, const at::Tensor& x) { parts[fmt::format("hidden.{}", layer + 1)].push_back(shaped(x)); });
      parts["logits"].push_back(shaped(model_.logits(hidden)));
      const auto head = model_.head_logits(batch, hidden);
      for (size_t i = 0; i < head.size(); ++i) parts[plan_.head->passes[i].name + ".logits"].push_back(shaped(head[i]));
    }
    for (const auto& [name, where] : names) {
      at::Tensor whole = at::empty({B, T, parts[name][0].size(-1)}, at::kFloat);
      int64_t row = 0;
      for (const at::Tensor& part : parts[name]) {
        whole.narrow(0, row, part.size(0)).copy_(part);
        row += part.size(0);
      }
      add(name, where, whole);
    }
  }

  void generate() {
    at::NoGradGuard no_grad;
    const int64_t P = in_.prompt_1p.size(1);
    DecodeState state(plan_, 1, device_, store_.compute_dtype());
    state.reserve(P + kNewTokens);
    std::vector<int64_t> tokens;
    Batch batch;
    batch.ids_n = in_.prompt_1p.reshape({-1}).to(device_);
    for (int64_t start = 0; static_cast<int64_t>(tokens.size()) < kNewTokens;) {
      const int64_t n = batch.ids_n.size(0);
      batch.spans = Spans({Span{.document = 0, .start = start, .length = n, .document_len = start + n, .state_slot = 0}});
      const at::Tensor hidden = model_.hidden(batch, &state);
      start += n;
      tokens.push_back(model_.logits(hidden.narrow(0, n - 1, 1)).argmax(1).item<int64_t>());
      batch.ids_n = at::tensor(std::vector<int64_t>{tokens.back()}, at::kLong).to(device_);
    }
    add("generate.prompt", "", in_.prompt_1p);
    add("generate.tokens", "generation", at::tensor(tokens, at::kLong).reshape({1, kNewTokens}));
  }

  Losses backward() {
    at::AutoGradMode grad_mode(true);
    const auto micro = micro_batches();
    Denominators over;
    for (const auto& [begin, end] : micro) over += denominators(plan_, make_batch(in_, begin, end, device_));
    Losses sums;
    for (const auto& [begin, end] : micro) {
      const Batch batch = make_batch(in_, begin, end, device_);  // recomputation reads it in the backward pass
      const LossResult loss = model_.loss(batch, over, true);
      sums.main += loss.main.item<double>();
      sums.total += loss.value.item<double>();
      for (const auto& [name, part] : loss.parts) sums.parts[name] += part.item<double>();
      loss.total.backward();
    }
    std::set<std::string> passes;
    if (plan_.head)
      for (const HeadPass& pass : plan_.head->passes) passes.insert(pass.name);
    for (const auto& [name, part] : sums.parts)
      if (!passes.contains(name) && part != 0)
        throw Error(ExitCode::kUsage, fmt::format("the auxiliary loss '{}' is on: reference files are without", name), "set its coefficient to 0");
    model_.take_counts();
    return sums;
  }

  void gradients() {
    store_.zero_grad();
    const Losses losses = backward();
    store_.finish_grad();
    add("loss", "loss", {losses.main}, true);
    if (plan_.head) {
      for (const HeadPass& pass : plan_.head->passes) add(pass.name + ".loss", "head " + pass.name, {losses.parts.at(pass.name)}, true);
      add("total_loss", "loss", {losses.total}, true);
    }
    std::map<std::string, std::string> where;
    for (const TensorRow& row : tensor_rows(plan_)) where[row.name] = (row.layer ? layer_name(*row.layer) : row.name) + ", backward";
    const auto tensors = hub_tensors(plan_);
    for (auto t = tensors.rbegin(); t != tensors.rend(); ++t) {
      if (t->is_buffer || !store_.trainable(t->source)) continue;
      const at::Tensor grad = store_.gradient(t->source);
      add("grad." + t->name, where[t->source], (t->index < 0 ? grad : grad.select(0, t->index)).clone());
    }
  }

  void train() {
    Optimizer optimizer(store_, kOptimizer);
    store_.zero_grad();
    std::vector<double> losses, norms;
    for (int64_t step = 0; step < kSteps; ++step) {
      losses.push_back(backward().total);
      const at::Tensor norm = optimizer.grad_norm();
      norms.push_back(norm.item<double>());
      optimizer.step(kLr, kMaxNorm, norm);
    }
    add("train.losses", "training", losses);
    add("train.grad_norms", "training", norms);
  }

  const Config& config_;
  const Inputs& in_;
  ModelPlan plan_;
  at::Device device_;
  Store store_;
  Model model_;
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

VerifyReport verify_hf(const fs::path& folder, const fs::path& reference, const Registry& registry, const VerifyOptions& options) {
  const SafetensorsFile file = SafetensorsFile::open(reference);
  std::vector<std::string> notes;
  Config config = import_hf_config(folder / "config.json", registry, options.waived, notes);
  if (const TensorEntry* ids = file.find("input_ids"); ids && !ids->shape.empty()) config.training.local_batch_size = std::max<int64_t>(1, ids->shape[0]);
  config.training.device = "cpu";
  config.training.dtype = "float32";
  take_depths(config, file, notes);
  config = with_sets(config, options.sets, registry);
  const Inputs inputs = read_inputs(file, config.model.vocab_size);
  VerifyReport report = Verifier(config, inputs, folder).run();
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
