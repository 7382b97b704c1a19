// Generation: greedy and sampled, prompts together and alone, chunks of a prompt, stopping.
#include "infer/generate.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <set>

#include "tests/support/model.hpp"

namespace tessera {
namespace {

using Ids = std::vector<int64_t>;
constexpr int64_t kVocab = 32;

const std::string kText = R"(
[model]
hybrid_override_pattern = "M*EO"
vocab_size = 32
hidden_size = 24
init_std = 0.3
[blocks.mamba2]
num_heads = 2
head_dim = 8
state_size = 8
num_groups = 1
chunk = 8
[blocks.gqa]
num_heads = 2
num_kv_heads = 1
head_dim = 8
[blocks.mlp]
intermediate_size = 24
[blocks.moe]
num_experts = 4
top_k = 2
intermediate_size = 16
)";

Ids prompt(int64_t length, uint64_t seed) {
  const at::Tensor ids = random_ids(length, kVocab, seed);
  return {ids.const_data_ptr<int64_t>(), ids.const_data_ptr<int64_t>() + length};
}

// The likeliest next id, by running the whole text again for every token.
Ids by_whole_forward(Model& model, Ids text, int64_t count) {
  at::NoGradGuard no_grad;
  Ids made;
  for (int64_t i = 0; i < count; ++i) {
    const auto n = static_cast<int64_t>(text.size());
    const at::Tensor hidden = model.hidden({.ids_n = at::tensor(text, at::kLong), .spans = Spans::documents({n})});
    made.push_back(at::argmax(model.logits(hidden.narrow(0, n - 1, 1))).item<int64_t>());
    text.push_back(made.back());
  }
  return made;
}

TEST(Generate, GreedyIsTheArgmaxOfTheWholeForward) {
  Built built(kText);
  for (const int64_t length : {1, 7, 40}) {
    const Ids text = prompt(length, 3);
    EXPECT_EQ(generate(built.model, {text}, {.max_new_tokens = 20})[0], by_whole_forward(built.model, text, 20)) << length;
  }
}

TEST(Generate, PromptsTogetherGiveWhatEachGivesAlone) {
  Built built(kText);
  const std::vector<Ids> prompts{prompt(1, 1), prompt(33, 2), prompt(8, 3)};
  const auto together = generate(built.model, prompts, {.max_new_tokens = 15});
  for (size_t i = 0; i < prompts.size(); ++i) EXPECT_EQ(together[i], generate(built.model, {prompts[i]}, {.max_new_tokens = 15})[0]) << i;
}

TEST(Generate, ChunksOfAPromptChangeNothing) {
  Built built(kText);
  const std::vector<Ids> prompts{prompt(5, 1), prompt(33, 2), prompt(16, 3)};
  const auto whole = generate(built.model, prompts, {.max_new_tokens = 12});
  for (const int64_t chunk : {1, 4, 16, 100}) EXPECT_EQ(generate(built.model, prompts, {.max_new_tokens = 12, .prefill_chunk = chunk}), whole) << chunk;
}

TEST(Generate, SamplingDependsOnSeedSequenceAndPositionAlone) {
  Built built(kText);
  const std::vector<Ids> prompts{prompt(9, 1), prompt(9, 1), prompt(20, 2)};
  const GenerateOptions options{.max_new_tokens = 25, .temperature = 1, .seed = 7};
  const auto first = generate(built.model, prompts, options);
  EXPECT_EQ(generate(built.model, prompts, options), first);
  EXPECT_NE(first[0], first[1]) << "two sequences drew alike";
  GenerateOptions other = options;
  other.seed = 8;
  EXPECT_NE(generate(built.model, prompts, other)[0], first[0]);
  EXPECT_EQ(generate(built.model, {prompts[0]}, options)[0], first[0]);
}

TEST(Generate, SmallNucleusAndLowTemperatureAreGreedy) {
  Built built(kText);
  const Ids text = prompt(9, 1), greedy = generate(built.model, {text}, {.max_new_tokens = 15})[0];
  EXPECT_EQ(generate(built.model, {text}, {.max_new_tokens = 15, .temperature = 1, .top_p = 1e-6})[0], greedy);
  EXPECT_EQ(generate(built.model, {text}, {.max_new_tokens = 15, .temperature = 1e-4})[0], greedy);
  EXPECT_NE(generate(built.model, {text}, {.max_new_tokens = 15, .temperature = 2})[0], greedy);
}

// The draws follow softmax(logits / temperature), cut to the nucleus: chi-square over many sequences of one prompt.
TEST(Generate, DrawsFollowTheDistribution) {
  Built built(kText);
  const Ids text = prompt(9, 1);
  constexpr size_t kDraws = 4000;
  std::vector<double> p(kVocab);
  {
    at::NoGradGuard no_grad;
    const at::Tensor hidden = built.model.hidden({.ids_n = at::tensor(text, at::kLong), .spans = Spans::documents({9})});
    const at::Tensor logits = built.model.logits(hidden.narrow(0, 8, 1)).to(at::kDouble).flatten() / 1.5;
    double sum = 0;
    for (int64_t v = 0; v < kVocab; ++v) sum += p[static_cast<size_t>(v)] = std::exp(logits[v].item<double>());
    for (double& x : p) x /= sum;
  }
  for (const double top_p : {1.0, 0.6}) {
    std::vector<size_t> order(p.size());
    std::iota(order.begin(), order.end(), 0u);
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return p[a] > p[b]; });
    std::set<size_t> kept;
    double mass = 0;
    for (size_t i = 0; i < order.size() && mass < top_p; ++i) kept.insert(order[i]), mass += p[order[i]];
    std::vector<double> seen(p.size(), 0);
    const auto made = generate(built.model, std::vector<Ids>(kDraws, text), {.max_new_tokens = 1, .temperature = 1.5, .top_p = top_p, .seed = 5});
    for (const Ids& ids : made) ++seen[static_cast<size_t>(ids.at(0))];
    double chi = 0;
    for (size_t v = 0; v < p.size(); ++v) {
      if (!kept.contains(v)) EXPECT_EQ(seen[v], 0) << v << " lies outside the nucleus";
      else chi += std::pow(seen[v] - kDraws * p[v] / mass, 2) / (kDraws * p[v] / mass);
    }
    const double freedom = static_cast<double>(kept.size()) - 1;
    EXPECT_LT(chi, freedom + 5 * std::sqrt(2 * freedom)) << top_p;
  }
}

TEST(Generate, StopsAfterTheStopId) {
  Built built(kText);
  const std::vector<Ids> prompts{prompt(9, 1), prompt(4, 6)};
  const auto all = generate(built.model, prompts, {.max_new_tokens = 12});
  const int64_t stop = all[0][4];
  const auto cut = generate(built.model, prompts, {.max_new_tokens = 12, .stop_id = stop});
  for (size_t i = 0; i < 2; ++i) {
    const auto end = std::find(all[i].begin(), all[i].end(), stop);
    EXPECT_EQ(cut[i], Ids(all[i].begin(), end == all[i].end() ? end : end + 1)) << i;
  }
}

TEST(Generate, ReportsTokensAsTheyCome) {
  Built built(kText);
  std::vector<Ids> seen(2);
  const auto made = generate(built.model, {prompt(3, 1), prompt(6, 2)}, {.max_new_tokens = 5}, [&](size_t sequence, int64_t id) { seen[sequence].push_back(id); });
  EXPECT_EQ(seen, made);
  EXPECT_EQ(generate(built.model, {prompt(3, 1)}, {.max_new_tokens = 0}), std::vector<Ids>(1));
}

TEST(Generate, RefusesIdsOutsideTheVocabulary) {
  Built built(kText);
  const auto message = [&](const std::vector<Ids>& prompts) {
    try {
      generate(built.model, prompts, {});
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
      return error.message();
    }
    return std::string("no error");
  };
  EXPECT_EQ(message({{1}, {3, 32}}), "prompt 1: token id 32 is outside the vocabulary of 32");
  EXPECT_EQ(message({{-1}}), "prompt 0: token id -1 is outside the vocabulary of 32");
  EXPECT_EQ(message({{}}), "prompt 0: must have at least one token");
}

}  // namespace
}  // namespace tessera
