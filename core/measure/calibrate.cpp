#include "measure/calibrate.hpp"

#include <ATen/ops/linalg_lstsq.h>
#include <ATen/ops/zeros.h>
#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "metrics/machine.hpp"
#include "train/setup.hpp"

namespace tessera {

namespace {

constexpr size_t kLeastConfigs = 4;
constexpr double kSmallPart = 0.02;  // of a step: errors of less are not relative to the part but to this

// Least squares over the terms of `chosen`; nothing where a rate is negative or not determined.
std::optional<std::pair<std::vector<double>, double>> solve(const std::vector<Sample>& samples, const std::vector<size_t>& chosen) {
  const auto m = static_cast<int64_t>(samples.size()), k = static_cast<int64_t>(chosen.size());
  const at::Tensor a_mk = at::zeros({m, k}, at::kDouble), b_m1 = at::zeros({m, 1}, at::kDouble);
  std::vector<double> scale(chosen.size());
  for (size_t j = 0; j < chosen.size(); ++j)
    for (const Sample& s : samples) scale[j] = std::max(scale[j], s.weight * s.work[chosen[j]]);
  for (int64_t i = 0; i < m; ++i) {
    const Sample& s = samples[static_cast<size_t>(i)];
    b_m1.mutable_data_ptr<double>()[i] = s.weight * s.value;
    for (int64_t j = 0; j < k; ++j) a_mk.mutable_data_ptr<double>()[i * k + j] = s.weight * s.work[chosen[static_cast<size_t>(j)]] / scale[static_cast<size_t>(j)];
  }
  const auto [x_k1, residuals, rank, singular] = at::linalg_lstsq(a_mk, b_m1, {}, "gelsd");
  if (rank.item<int64_t>() < k) return {};
  std::vector<double> rates(samples[0].work.size());
  for (size_t j = 0; j < chosen.size(); ++j) {
    const double rate = x_k1.const_data_ptr<double>()[j] / scale[j];
    if (!(rate >= 0)) return {};
    rates[chosen[j]] = rate;
  }
  double error = 0;
  for (const Sample& s : samples) {
    double sum = -s.value;
    for (size_t term = 0; term < rates.size(); ++term) sum += rates[term] * s.work[term];
    error += s.weight * s.weight * sum * sum;
  }
  return std::pair{rates, error};
}

struct KindSamples {
  std::vector<Sample> forward, backward;
  double least = std::numeric_limits<double>::infinity(), most = 0;
};

}  // namespace

std::vector<double> fit_rates(const std::vector<Sample>& samples) {
  std::vector<double> best(samples.at(0).work.size());
  std::vector<size_t> terms;
  for (size_t term = 0; term < best.size(); ++term)
    if (std::any_of(samples.begin(), samples.end(), [&](const Sample& s) { return s.weight * s.work[term] > 0; })) terms.push_back(term);
  double least = std::numeric_limits<double>::infinity();
  for (size_t subset = 1; subset < size_t{1} << terms.size(); ++subset) {
    std::vector<size_t> chosen;
    for (size_t i = 0; i < terms.size(); ++i)
      if (subset >> i & 1) chosen.push_back(terms[i]);
    if (chosen.size() > samples.size()) continue;
    if (auto solution = solve(samples, chosen); solution && solution->second < least) std::tie(best, least) = std::move(*solution);
  }
  return best;
}

void require_enough(size_t num_configs) {
  if (num_configs < kLeastConfigs)
    throw Error(ExitCode::kUsage, fmt::format("--calibrate: {} configurations are too few, at least {} of different sizes", num_configs, kLeastConfigs), "for example configs/sweeps/calibration.toml");
}

Calibration calibrate(const std::vector<Config>& configs, const std::vector<BenchResult>& results) {
  require_enough(results.size());
  for (size_t i = 1; i < results.size(); ++i) {
    const auto setting = [&](size_t at) { return fmt::format("{}, {}, {} threads", results[at].device, results[at].dtype, num_threads(configs[at].training)); };
    if (setting(i) != setting(0))
      throw Error(ExitCode::kUsage, fmt::format("--calibrate: {} trains with {}, {} with {}", results[0].config, setting(0), results[i].config, setting(i)), "each is a calibration of its own: --set training.dtype=... and the like");
  }
  std::map<std::string, KindSamples> kinds;
  std::vector<Sample> memory;
  for (size_t i = 0; i < results.size(); ++i) {
    const BenchResult& result = results[i];
    const ModelPlan plan = make_plan(configs[i]);
    double rest = result.train_step_s;
    for (const PartTime& part : result.parts) rest -= part.seconds();
    for (const PartWork& work : step_work(plan, configs[i])) {
      const auto part = std::find_if(result.parts.begin(), result.parts.end(), [&](const PartTime& p) { return p.name == work.part; });
      const bool known = part != result.parts.end();
      if (!known && work.part != "rest") continue;
      const double forward = known ? part->forward_s : std::max(rest, 0.0), backward = known ? part->backward_s : 0;
      const bool block = std::any_of(configs[i].bindings.begin(), configs[i].bindings.end(), [&](const Binding& b) { return b.name == work.part; });
      for (const std::string& kind : block ? std::vector<std::string>{work.kind, ""} : std::vector<std::string>{work.kind}) {
        KindSamples& samples = kinds[kind];
        const std::vector<double> terms(work.work.begin(), work.work.end());
        const double small = kSmallPart * result.train_step_s;
        samples.forward.push_back({.work = terms, .value = forward, .weight = 1 / std::max(forward, small)});
        samples.backward.push_back({.work = terms, .value = backward, .weight = 1 / std::max(backward, small)});
        samples.least = std::min(samples.least, work.size()), samples.most = std::max(samples.most, work.size());
      }
    }
    const auto peak = static_cast<double>(result.peak_bytes);
    const MemoryTerms terms = memory_terms(plan, configs[i]);
    memory.push_back({.work = {terms.begin(), terms.end()}, .value = peak, .weight = 1 / peak});
  }
  Calibration out{.machine = machine_text(), .device = results[0].device, .dtype = results[0].dtype, .threads = num_threads(configs[0].training),
                  .date = fmt::format("{:%Y-%m-%d %H:%M}", fmt::gmtime(std::time(nullptr))), .parts = {}};
  const auto keep = [](auto& to, const std::vector<Sample>& samples) {
    const std::vector<double> rates = fit_rates(samples);
    std::copy(rates.begin(), rates.end(), to.begin());
  };
  for (const auto& [kind, samples] : kinds) {
    PartRate& rate = out.parts[kind];
    keep(rate.forward, samples.forward), keep(rate.backward, samples.backward);
    rate.least = samples.least, rate.most = samples.most;
  }
  keep(out.memory, memory);
  return out;
}

}  // namespace tessera
