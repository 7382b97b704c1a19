// A prompt on the command line: text of a byte vocabulary, or token ids.
#pragma once
#include <CLI/CLI.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace tessera {

struct Prompt {
  std::string text, ids;
  bool has_text = false, has_ids = false;
};
// --prompt and --prompt-ids. `prompt` outlives the verb.
void add_prompt(CLI::App& verb, Prompt& prompt);
// Throws Error(kUsage) where text is given and the vocabulary is not one of bytes, and where ids are no integers.
std::vector<int64_t> read_prompt(const Prompt& prompt, int64_t vocab_size);

}  // namespace tessera
