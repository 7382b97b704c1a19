#include "infer/generate.hpp"

#include <fmt/format.h>

#include <cstdio>
#include <iostream>

#include "cli/limits.hpp"
#include "cli/verbs.hpp"

namespace tessera {

namespace {

constexpr int64_t kByteVocabulary = 256;

struct Options {
  std::string checkpoint, prompt, prompt_ids, mesh;
  bool has_prompt = false, has_ids = false;
  std::vector<std::string> sets;
  GenerateOptions generate;
};

std::vector<int64_t> parse_ids(const std::string& text) {
  std::vector<int64_t> ids;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    try {
      size_t used = 0;
      ids.push_back(std::stoll(part, &used));
      if (used != part.size()) throw std::invalid_argument(part);
    } catch (const std::logic_error&) {
      throw Error(ExitCode::kUsage, fmt::format("--prompt-ids: must be integers separated by commas, got \"{}\"", part));
    }
    begin = end + 1;
  }
  return ids;
}

int generate_text(const Options& o, const MeshGroups* ranks) {
  const auto runnable = open_runnable(o.checkpoint, o.sets, ranks);
  const int64_t vocab_size = runnable->plan.model.vocab_size;
  if (o.has_prompt && vocab_size != kByteVocabulary)
    throw Error(ExitCode::kUsage, fmt::format("--prompt: text needs a byte vocabulary of {} ids, this model has {}", kByteVocabulary, vocab_size),
                "give token ids by --prompt-ids 1,2,3");
  std::vector<int64_t> prompt;
  if (o.has_prompt)
    for (unsigned char c : o.prompt) prompt.push_back(c);
  else prompt = parse_ids(o.prompt_ids);
  const bool speaks = is_first(ranks);
  if (o.has_prompt && speaks) std::fwrite(o.prompt.data(), 1, o.prompt.size(), stdout);
  const auto made = generate(*runnable->model, {prompt}, o.generate, [&](size_t, int64_t id) {
    if (!o.has_prompt || !speaks) return;
    std::putchar(static_cast<int>(id));
    std::fflush(stdout);
  });
  if (!speaks) return 0;
  if (!o.has_prompt)
    for (size_t i = 0; i < made[0].size(); ++i) std::printf("%s%lld", i ? "," : "", static_cast<long long>(made[0][i]));
  std::putchar('\n');
  return 0;
}

}  // namespace

void add_generate(CLI::App& app, Run& run) {
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("generate", "continues a prompt with a trained model");
  verb->add_option("CHECKPOINT", o->checkpoint, "a run or one of its checkpoints")->required();
  auto* prompt = verb->add_option("--prompt", o->prompt, "text; needs a byte vocabulary");
  auto* ids = verb->add_option("--prompt-ids", o->prompt_ids, "token ids, 1,2,3");
  verb->add_option("--max-new-tokens", o->generate.max_new_tokens, "tokens to make")->capture_default_str()->check(whole(0));
  verb->add_option("--temperature", o->generate.temperature, "0: the likeliest token")->capture_default_str()->check(number(0));
  verb->add_option("--top-p", o->generate.top_p, "smallest set of tokens whose probability reaches it")->capture_default_str()->check(number(0, 1));
  verb->add_option("--seed", o->generate.seed, "of the draws")->capture_default_str()->check(whole(0));
  add_mesh(*verb, o->mesh);
  add_sets(*verb, o->sets);
  verb->callback([o, prompt, ids, &run] {
    o->has_prompt = prompt->count() > 0;
    o->has_ids = ids->count() > 0;
    run = [o] {
      if (o->has_prompt == o->has_ids) throw Error(ExitCode::kUsage, "generate: give either --prompt or --prompt-ids");
      return over_ranks(o->mesh, [&](const MeshGroups* ranks) { return generate_text(*o, ranks); });
    };
  });
}

}  // namespace tessera
