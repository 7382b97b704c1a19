#include "infer/generate.hpp"

#include <fmt/format.h>

#include <cstdio>
#include <iostream>

#include "cli/limits.hpp"
#include "cli/prompt.hpp"
#include "cli/verbs.hpp"

namespace tessera {

namespace {

struct Options {
  std::string checkpoint, mesh;
  Prompt prompt;
  std::vector<std::string> sets;
  GenerateOptions generate;
};

int generate_text(const Options& o, const MeshGroups* ranks) {
  const auto runnable = open_runnable(o.checkpoint, o.sets, ranks);
  const std::vector<int64_t> prompt = read_prompt(o.prompt, runnable->plan.model.vocab_size);
  const bool speaks = is_first(ranks);
  if (o.prompt.has_text && speaks) std::fwrite(o.prompt.text.data(), 1, o.prompt.text.size(), stdout);
  const auto made = generate(*runnable->model, {prompt}, o.generate, [&](size_t, int64_t id) {
    if (!o.prompt.has_text || !speaks) return;
    std::putchar(static_cast<int>(id));
    std::fflush(stdout);
  });
  if (!speaks) return 0;
  if (!o.prompt.has_text)
    for (size_t i = 0; i < made[0].size(); ++i) std::printf("%s%lld", i ? "," : "", static_cast<long long>(made[0][i]));
  std::putchar('\n');
  return 0;
}

}  // namespace

void add_generate(CLI::App& app, Run& run) {
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("generate", "continues a prompt with a trained model");
  verb->add_option("CHECKPOINT", o->checkpoint, "a run or one of its checkpoints")->required();
  add_prompt(*verb, o->prompt);
  verb->add_option("--max-new-tokens", o->generate.max_new_tokens, "tokens to make")->capture_default_str()->check(whole(0));
  verb->add_option("--temperature", o->generate.temperature, "0: the likeliest token")->capture_default_str()->check(number(0));
  verb->add_option("--top-p", o->generate.top_p, "smallest set of tokens whose probability reaches it")->capture_default_str()->check(number(0, 1));
  verb->add_option("--seed", o->generate.seed, "of the draws")->capture_default_str()->check(whole(0));
  add_mesh(*verb, o->mesh);
  add_sets(*verb, o->sets);
  verb->callback([o, &run] {
    run = [o] {
      if (o->prompt.has_text == o->prompt.has_ids) throw Error(ExitCode::kUsage, "generate: give either --prompt or --prompt-ids");
      return over_ranks(o->mesh, [&](const MeshGroups* ranks) { return generate_text(*o, ranks); });
    };
  });
}

}  // namespace tessera
