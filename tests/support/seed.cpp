// Every test draws the same random numbers in every run; TESSERA_TEST_SEED=n for others.
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>

#include <cstdlib>

namespace {

class Seeds : public testing::EmptyTestEventListener {
  void OnTestStart(const testing::TestInfo&) override {
    const char* word = std::getenv("TESSERA_TEST_SEED");
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    generator.set_current_seed(word ? std::strtoull(word, nullptr, 10) : 0);
  }
};

const bool kSeeding = (testing::UnitTest::GetInstance()->listeners().Append(new Seeds), true);

}  // namespace
