#include "pattern/pattern.hpp"

#include <gtest/gtest.h>

namespace tessera {
namespace {

std::string problems_of(std::string_view text) {
  std::vector<PatternProblem> problems;
  parse_pattern(text, problems);
  std::string out;
  for (const PatternProblem& p : problems) out += p.rule + " @" + std::to_string(p.position) + "\n";
  return out;
}

TEST(Pattern, LayersStagesAndHead) {
  std::vector<PatternProblem> problems;
  const Pattern p = parse_pattern("ME|M*/*E", problems);
  EXPECT_TRUE(problems.empty());
  EXPECT_EQ(p.text, "ME|M*/*E");
  EXPECT_EQ(p.num_stages, 2);
  EXPECT_TRUE(p.has_head);
  ASSERT_EQ(p.main.size(), 4u);
  ASSERT_EQ(p.head.size(), 2u);
  EXPECT_EQ(p.main[1].symbol, 'E');
  EXPECT_EQ(p.main[1].stage, 0);
  EXPECT_EQ(p.main[2].symbol, 'M');
  EXPECT_EQ(p.main[2].position, 3);
  EXPECT_EQ(p.main[2].stage, 1);
  EXPECT_EQ(p.head[0].symbol, '*');
  EXPECT_EQ(p.head[0].position, 6);
  EXPECT_EQ(p.head[0].stage, 1);
}

TEST(Pattern, WithoutHead) {
  std::vector<PatternProblem> problems;
  const Pattern p = parse_pattern("M", problems);
  EXPECT_TRUE(problems.empty());
  EXPECT_EQ(p.num_stages, 1);
  EXPECT_FALSE(p.has_head);
  EXPECT_EQ(p.main.size(), 1u);
}

TEST(Pattern, EveryProblemIsReported) {
  EXPECT_EQ(problems_of(""), "empty pattern @0\n");
  EXPECT_EQ(problems_of("|M"), "empty stage @0\n");
  EXPECT_EQ(problems_of("M|"), "empty stage @1\n");
  EXPECT_EQ(problems_of("M||M"), "empty stage @2\n");
  EXPECT_EQ(problems_of("/M"), "empty stage @0\n");
  EXPECT_EQ(problems_of("M|/M"), "empty stage @2\n");
  EXPECT_EQ(problems_of("M/"), "no layers after '/' @1\n");
  EXPECT_EQ(problems_of("/"), "empty stage @0\nno layers after '/' @0\n");
  EXPECT_EQ(problems_of("M/*/*"), "a second '/' @3\n");
  EXPECT_EQ(problems_of("M/*|*"), "'|' in the head's part @3\n");
  EXPECT_EQ(problems_of("M \t"), "a space is no symbol @1\nbyte 0x09 is no symbol @2\n");
  EXPECT_EQ(problems_of(std::string_view("\0\xff", 2)),
            "byte 0x00 is no symbol @0\nbyte 0xff is no symbol @1\n");
}

TEST(Pattern, Caret) {
  EXPECT_EQ(show_position("MEM*X", 4), "  MEM*X\n      ^");
  EXPECT_EQ(show_position("M\tM", 1), "  M?M\n   ^");
  EXPECT_EQ(show_position("", 0), "  \n  ^");
  EXPECT_EQ(show_position("M", 99), "  M\n   ^");
  const std::string text(100, 'a');
  EXPECT_EQ(show_position(text + "X" + text, 100), "  ..." + std::string(60, 'a') + "X" + std::string(19, 'a') + "...\n  " + std::string(63, ' ') + "^");
  EXPECT_EQ(show_position(text, 0), "  " + std::string(20, 'a') + "...\n  ^");
  EXPECT_EQ(show_position(text, 99), "  ..." + std::string(61, 'a') + "\n  " + std::string(63, ' ') + "^");
}

TEST(Pattern, IssuesAreBounded) {
  Issues issues;
  check_pattern(std::string(100, '|'), "p", issues);
  ASSERT_EQ(issues.list().size(), 9u);
  EXPECT_EQ(issues.list()[0].rule, "empty stage at position 0\n  " + std::string(20, '|') + "...\n  ^");
  EXPECT_EQ(issues.list()[8].rule, "93 more problems");
}

}  // namespace
}  // namespace tessera
