// tessera launch: what it refuses, and that its ranks are this command.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

class Launch : public TinyRunTest {};

TEST_F(Launch, WrongUse) {
  for (const auto& [words, message] : std::vector<std::pair<std::vector<std::string>, std::string>>{
           {{"launch"}, "error: -n is required\n"},
           {{"launch", "train", "tiny.toml"}, "error: -n is required\n"},
           {{"launch", "-n", "two", "train"}, "error: Could not convert: -n = two\n"},
           {{"launch", "-n", "0", "train", "tiny.toml"}, "error: launch: -n must be an integer in [1, 256], got 0\n"},
           {{"launch", "-n", "100000", "train", "tiny.toml"}, "error: launch: -n must be an integer in [1, 256], got 100000\n"},
           {{"launch", "-n", "2"}, "error: launch: no verb to run\n"},
           {{"launch", "-n", "2", "tarin", "tiny.toml"}, "error: launch: no verb 'tarin'\n"},
           {{"launch", "-n", "2", "--resume", "train"}, "error: launch: unknown option '--resume' before the verb\n"},
           {{"launch", "-n", "2", "launch", "-n", "2", "train", "tiny.toml"}, "error: launch: 'launch' cannot run itself\n"}}) {
    const Finished end = tessera(words);
    EXPECT_EQ(end.code, 2) << end.err;
    EXPECT_EQ(end.out, "");
    EXPECT_EQ(end.err.substr(0, message.size()), message);
    EXPECT_NE(end.err.find("\nhelp: "), std::string::npos) << end.err;
  }
}

TEST_F(Launch, RankZeroSpeaksForAll) {
  const Finished alone = tessera({"plan", "tiny.toml", "--json"}), end = tessera({"launch", "-n", "2", "plan", "tiny.toml", "--json"});
  ASSERT_EQ(end.code, 0) << end.err;
  EXPECT_EQ(end.out, alone.out);
  EXPECT_EQ(end.err, "");
}

// Options after the verb are the verb's, whatever they are called.
TEST_F(Launch, AnErrorThatAllRanksReportIsToldOnce) {
  for (const std::vector<std::string>& words : std::vector<std::vector<std::string>>{{"describe", "nothing"}, {"plan", "nowhere.toml"}, {"plan", "tiny.toml", "-n", "3"}, {"train"}}) {
    std::vector<std::string> launched{"launch", "-n", "3"};
    launched.insert(launched.end(), words.begin(), words.end());
    const Finished alone = tessera(words), end = tessera(launched);
    EXPECT_NE(end.code, 0);
    EXPECT_EQ(end.code, alone.code);
    EXPECT_EQ(end.err, alone.err);
  }
}

}  // namespace
}  // namespace tessera
