// Runs a fuzz target where there is no libFuzzer: over the committed corpus and, with TESSERA_TEST_ALL, over seeded mutations of it.
// The input that a target ends the process with is left in TESSERA_FUZZ_ARTIFACTS, or the current folder.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "tests/fuzz/target.hpp"

namespace {
namespace fs = std::filesystem;

constexpr int64_t kMutations = 20000;
constexpr unsigned kSeconds = 20;        // an input that takes longer hangs
constexpr size_t kLongest = 1 << 13;     // bytes of a mutated input
constexpr rlim_t kMemory = rlim_t{1} << 30;  // beyond what the process has when it begins: more is what an input claims

std::string current;
std::string artifact;

std::string read(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

void save_current() {
  const int fd = ::open(artifact.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (fd < 0) return;
  const bool whole = ::write(fd, current.data(), current.size()) == static_cast<ssize_t>(current.size());
  ::close(fd);
  const std::string line = std::string(whole ? "the input is " : "a part of the input is ") + artifact + "\n";
  if (::write(2, line.data(), line.size()) < 0) return;
}

void on_signal(int number) {
  save_current();
  ::signal(number, SIG_DFL);
  ::raise(number);
}

void limit_memory() {
#if !defined(__SANITIZE_ADDRESS__)
  long pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  struct rlimit limit;
  ::getrlimit(RLIMIT_AS, &limit);
  limit.rlim_cur = static_cast<rlim_t>(pages) * static_cast<rlim_t>(::sysconf(_SC_PAGESIZE)) + kMemory;
  ::setrlimit(RLIMIT_AS, &limit);
#endif
}

void run(std::string input) {
  current = std::move(input);
  ::alarm(kSeconds);
  try {
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(current.data()), current.size());
  } catch (const std::exception& error) {
    save_current();
    ADD_FAILURE() << error.what();
  }
  ::alarm(0);
}

// The lines `name="value"` of a dictionary; \xNN, \\ and \" are escapes.
std::vector<std::string> words_of(const fs::path& dictionary) {
  std::vector<std::string> words;
  std::ifstream in(dictionary);
  for (std::string line; std::getline(in, line);) {
    const size_t begin = line.find('"'), end = line.rfind('"');
    if (line.starts_with("#") || begin == end) continue;
    std::string word;
    for (size_t i = begin + 1; i < end; ++i) {
      if (line[i] == '\\' && line[i + 1] == 'x') word += static_cast<char>(std::stoi(line.substr(i + 2, 2), nullptr, 16)), i += 3;
      else word += line[line[i] == '\\' ? ++i : i];
    }
    words.push_back(word);
  }
  return words;
}

class Mutator {
 public:
  Mutator(std::vector<std::string> seeds, std::vector<std::string> words, uint64_t seed) : seeds_(std::move(seeds)), words_(std::move(words)), random_(seed) {
    for (const char* number : {"0", "-1", "1e999", "nan", "inf", "18446744073709551615", "9223372036854775807", "4294967296", "1000000000"}) words_.push_back(number);
    for (const uint64_t number : {uint64_t{0}, uint64_t{1}, uint64_t{0x7f}, uint64_t{0xffffffff}, uint64_t{1} << 31, uint64_t{1} << 62, uint64_t{1} << 63, ~uint64_t{0}})
      for (const size_t size : {1, 2, 4, 8}) words_.emplace_back(reinterpret_cast<const char*>(&number), size);
  }
  std::string next() {
    std::string text = pick(seeds_);
    for (size_t rounds = below(6) + 1; rounds > 0; --rounds) change(text);
    if (text.size() > kLongest) text.resize(kLongest);
    return text;
  }

 private:
  size_t below(size_t n) { return n ? random_() % n : 0; }
  const std::string& pick(const std::vector<std::string>& from) { return from[below(from.size())]; }
  void change(std::string& text) {
    const size_t at = below(text.size() + 1), length = below(std::min<size_t>(text.size() - at, 64) + 1);
    switch (below(8)) {
      case 0: if (at < text.size()) text[at] = static_cast<char>(text[at] ^ (1 << below(8))); break;
      case 1: if (at < text.size()) text[at] = static_cast<char>(below(256)); break;
      case 2: text.erase(at, length); break;
      case 3: text.resize(at); break;
      case 4: text.insert(at, pick(words_)); break;
      case 5: { const std::string word = pick(words_); text.replace(at, std::min(word.size(), text.size() - at), word); break; }
      case 6: text.insert(below(text.size() + 1), text.substr(at, length)); break;
      default: {
        const std::string& other = pick(seeds_);
        const size_t from = below(other.size() + 1);
        text.replace(at, length, other.substr(from, below(256)));
      }
    }
  }
  std::vector<std::string> seeds_, words_;
  std::mt19937_64 random_;
};

std::vector<std::string> corpus() {
  std::vector<fs::path> files;
  for (const char* folder : {TESSERA_FUZZ_CORPUS})
    for (const auto& entry : fs::directory_iterator(folder))
      if (entry.is_regular_file()) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  std::vector<std::string> inputs;
  for (const fs::path& file : files) inputs.push_back(read(file));
  return inputs;
}

void prepare() {
  const char* folder = std::getenv("TESSERA_FUZZ_ARTIFACTS");
  artifact = (fs::path(folder ? folder : ".") / ("crash-" TESSERA_FUZZ_NAME)).string();
  for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM}) ::signal(number, on_signal);
  run("");  // what is made once is made before memory is limited
  limit_memory();
}

}  // namespace

#define FUZZ_TEST(name) TEST(TESSERA_FUZZ_SUITE, name)

FUZZ_TEST(TheCorpusIsReadOrRefused) {
  prepare();
  const auto inputs = corpus();
  ASSERT_GE(inputs.size(), 5u);
  for (const std::string& input : inputs) run(input);
}

FUZZ_TEST(MutationsAreReadOrRefused) {
  if (!std::getenv("TESSERA_TEST_ALL")) GTEST_SKIP() << "a long test: ./tessera test --all";
  prepare();
  Mutator mutator(corpus(), words_of(TESSERA_FUZZ_DICTIONARY), 20);
  for (int64_t i = 0; i < kMutations && !HasFailure(); ++i) run(mutator.next());
}
