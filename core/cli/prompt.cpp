#include "cli/prompt.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

#include "tessera/error.hpp"

namespace tessera {

namespace {

constexpr int64_t kByteVocabulary = 256;

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

}  // namespace

void add_prompt(CLI::App& verb, Prompt& prompt) {
  verb.add_option_function<std::string>("--prompt", [&prompt](const std::string& text) { prompt.text = text, prompt.has_text = true; }, "text; needs a byte vocabulary");
  verb.add_option_function<std::string>("--prompt-ids", [&prompt](const std::string& ids) { prompt.ids = ids, prompt.has_ids = true; }, "token ids, 1,2,3");
}

std::vector<int64_t> read_prompt(const Prompt& prompt, int64_t vocab_size) {
  if (!prompt.has_text) return parse_ids(prompt.ids);
  if (vocab_size != kByteVocabulary)
    throw Error(ExitCode::kUsage, fmt::format("--prompt: text needs a byte vocabulary of {} ids, this model has {}", kByteVocabulary, vocab_size), "give token ids by --prompt-ids 1,2,3");
  std::vector<int64_t> ids;
  for (const unsigned char c : prompt.text) ids.push_back(c);
  return ids;
}

}  // namespace tessera
