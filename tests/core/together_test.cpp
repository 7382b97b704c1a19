// Ranks that do a work in rounds beside their steps.
#include "checkpoint/together.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>

#include "tests/support/ranks.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {

using nlohmann::json;

TEST(Together, EveryRankLearnsWhatAllSay) {
  run_ranks({.dp_shard = 3}, [](MeshGroups& groups) {
    const Together together(&groups);
    EXPECT_EQ(together.rank(), groups.place().rank);
    for (int64_t number = 0; number < 20; ++number) {
      const auto words = together.round([&]() -> json { return {{"rank", together.rank()}, {"round", number}}; });
      ASSERT_EQ(words.size(), 3u);
      for (int64_t rank = 0; rank < 3; ++rank) EXPECT_EQ(words[static_cast<size_t>(rank)], (json{{"rank", rank}, {"round", number}}));
    }
  });
}

TEST(Together, OneRankIsAlone) {
  const Together together(nullptr);
  EXPECT_EQ(together.round([]() -> json { return json::array({1, 2}); }), std::vector<json>{json::array({1, 2})});
  EXPECT_THROW(together.round([]() -> json { throw std::bad_alloc(); }), std::bad_alloc);
}

TEST(Together, TheFirstFailureIsEveryRanks) {
  for (int64_t fails = 0; fails < 3; ++fails) {
    std::array<std::string, 3> said;
    run_ranks({.dp_shard = 3}, [&](MeshGroups& groups) {
      const Together together(&groups);
      try {
        together.round([&]() -> json {
          if (together.rank() >= fails) throw Error(ExitCode::kUsage, fmt::format("rank {} failed", together.rank()), "help");
          return nullptr;
        });
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::kRuntime);
        said[static_cast<size_t>(together.rank())] = error.what();
      }
      EXPECT_EQ(together.round([]() -> json { return 1; }), (std::vector<json>{1, 1, 1})) << "it goes on";
    });
    for (const std::string& text : said) EXPECT_EQ(text, fmt::format("error: rank {} failed\nhelp: help", fails));
  }
}

TEST(Together, ARankThatDoesNotComeIsNamed) {
  run_ranks({.dp_shard = 2}, [](MeshGroups& groups) {
    if (groups.place().rank == 1) return;
    try {
      Together(&groups).round([]() -> json { return nullptr; });
      FAIL() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kCollective);
      EXPECT_EQ(error.message().substr(0, 40), "rank 1 did not come to a save within 1 s");
    }
  }, std::chrono::seconds(1));
}

}  // namespace
}  // namespace tessera
