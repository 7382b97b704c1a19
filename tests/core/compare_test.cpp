// Whether two measurements differ.
#include "measure/compare.hpp"

#include <cmath>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "tests/support/folder.hpp"

namespace tessera {
namespace {

// Counted from the arrangements: 1 of 252 is as extreme on either side; 7 of 20 have U of at most 3; 7 of 126 at most 3.
TEST(MannWhitney, GivesTheKnownValues) {
  EXPECT_NEAR(mann_whitney_p({1, 2, 3, 4, 5}, {6, 7, 8, 9, 10}), 2 / 252.0, 1e-12);
  EXPECT_NEAR(mann_whitney_p({6, 7, 8, 9, 10}, {1, 2, 3, 4, 5}), 2 / 252.0, 1e-12);
  EXPECT_NEAR(mann_whitney_p({1, 3, 5}, {2, 4, 6}), 0.7, 1e-12);
  EXPECT_NEAR(mann_whitney_p({19, 22, 16, 29, 24}, {20, 11, 17, 12}), 0.1111111111, 1e-9);
  EXPECT_EQ(mann_whitney_p({1, 1, 1}, {1, 1, 1}), 1);
  EXPECT_EQ(mann_whitney_p({}, {1}), 1);
  std::vector<double> low, high;
  for (int i = 0; i < 15; ++i) low.push_back(i), high.push_back(i + 5.5);
  EXPECT_NEAR(mann_whitney_p(low, high), std::erfc((112.5 - 45 - 0.5) / std::sqrt(581.25) / std::sqrt(2.0)), 1e-12) << "U = 45 of 225, by the normal approximation";
}

TEST(Samples, QuantilesLieBetweenNeighbours) {
  const Samples s{{4, 1, 3, 2}};
  EXPECT_EQ(s.median(), 2.5);
  EXPECT_EQ(s.quantile(0), 1);
  EXPECT_EQ(s.quantile(1), 4);
  EXPECT_EQ(s.quantile(0.25), 1.75);
  EXPECT_EQ(Samples{}.median(), 0);
}

class CompareBench : public FolderTest {
 protected:
  std::string put(const std::string& name, const std::vector<double>& samples, const std::string& dtype = "float32", const std::string& machine = "m") const {
    put_file(folder_ / name, fmt::format(R"({{"config": "c.toml", "dtype": "{}", "device": "cpu", "params": 5, "train": {{"samples_s": [{}]}}, "context": {{"machine": "{}"}}}})", dtype, fmt::join(samples, ", "), machine));
    return (folder_ / name).string();
  }
};

TEST_F(CompareBench, TellsTheRatioAndWhetherItIsNoise) {
  const auto clear = compare_bench(put("a", {2, 2.1, 2.2, 2.05, 2.15}), put("b", {1, 1.1, 1.05, 1.02, 1.03}));
  ASSERT_EQ(clear.size(), 1u);
  EXPECT_NEAR(clear[0].ratio, 2.1 / 1.03, 1e-12);
  EXPECT_LT(clear[0].p, 0.05);
  EXPECT_EQ(clear[0].warning, "");
  EXPECT_GT(compare_bench(put("a", {2, 2.1, 2.2}), put("b", {2.05, 2.15, 1.9}))[0].p, 0.05);
  EXPECT_EQ(compare_bench(put("a", {1}), put("b", {1}, "bfloat16", "n"))[0].warning, "dtype \"float32\" and \"bfloat16\", other machine or version");
  const auto routed = [&](const std::string& name, const std::string& routing) {
    put_file(folder_ / name, fmt::format(R"({{"config": "c.toml", "dtype": "float32", "device": "cpu", "params": 5, "routing": "{}", "train": {{"samples_s": [1]}}}})", routing));
    return (folder_ / name).string();
  };
  EXPECT_EQ(compare_bench(put("a", {1}), routed("b", "natural"))[0].warning, "") << "documents that do not say are of natural routing";
  EXPECT_EQ(compare_bench(put("a", {1}), routed("b", "balanced"))[0].warning, "routing \"natural\" and \"balanced\"");
}

TEST_F(CompareBench, RefusesWhatIsNoDocument) {
  put_file(folder_ / "none.json", "{\"config\": 1}");
  EXPECT_THROW(compare_bench((folder_ / "none.json").string(), put("b", {1})), Error);
  put_file(folder_ / "cut.json", "{\"config\": ");
  EXPECT_THROW(compare_bench(put("a", {1}), (folder_ / "cut.json").string()), Error);
  put_file(folder_ / "two.json", fmt::format("{{\"results\": [{0}, {0}]}}", file_text(folder_ / "b")));
  EXPECT_THROW(compare_bench(put("a", {1}), (folder_ / "two.json").string()), Error);
}

}  // namespace
}  // namespace tessera
