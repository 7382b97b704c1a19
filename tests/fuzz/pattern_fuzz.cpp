// The pattern string.
#include "pattern/pattern.hpp"

#include <algorithm>

#include "tests/fuzz/target.hpp"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tessera;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  fuzz::hold([&] {
    std::vector<PatternProblem> problems;
    const Pattern pattern = parse_pattern(text, problems);
    for (const PatternProblem& problem : problems) fuzz::must(problem.position >= 0 && problem.position <= static_cast<int64_t>(size), "a problem lies in the text");
    Issues issues;
    check_pattern(text, "model.hybrid_override_pattern", issues);
    fuzz::must(issues.empty() == problems.empty(), "problems are told");
    issues.raise();
    fuzz::must(!pattern.main.empty() && pattern.has_head != pattern.head.empty(), "an accepted pattern has layers");
    std::string again;
    int64_t stage = 0;
    for (const PatternLayer& layer : pattern.main) {
      again += std::string(static_cast<size_t>(layer.stage - stage), '|') + layer.symbol;
      stage = layer.stage;
    }
    if (pattern.has_head) again += '/';
    for (const PatternLayer& layer : pattern.head) again += layer.symbol;
    fuzz::must(again == text && stage + 1 == pattern.num_stages, "an accepted pattern is its text");
  });
  return 0;
}
