// Reports: what is read from run folders, the statistics of seeds, tables to the byte, and the page.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "report/page.hpp"
#include "tessera/error.hpp"
#include "tests/support/folder.hpp"

namespace tessera {
namespace {

using nlohmann::json;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

size_t measure(const std::string& name) {
  for (size_t i = 0; i < measures().size(); ++i)
    if (measures()[i].name == name) return i;
  ADD_FAILURE() << name;
  return 0;
}

TEST(ReportStatistics, IntervalsAreThoseOfStudentsT) {
  // Quantiles of t at 97.5 % from printed tables: 12.706 (1 degree), 4.303 (2), 2.776 (4), 2.262 (9).
  EXPECT_NEAR(summarise({0, 2}).half, 12.7062 * 1.0, 1e-4);
  const Summary three = summarise({1, 2, 3});
  EXPECT_EQ(three.n, 3);
  EXPECT_DOUBLE_EQ(three.mean, 2);
  EXPECT_NEAR(three.half, 4.30265 / std::sqrt(3.0), 1e-5);
  EXPECT_NEAR(summarise({2, 4, 4, 4, 6}).half, 2.77645 * std::sqrt(2.0 / 5), 1e-5);
  EXPECT_NEAR(summarise({1, 2, 3, 4, 5, 6, 7, 8, 9, 10}).half, 2.26216 * std::sqrt(9.1666667 / 10), 1e-5);
  EXPECT_EQ(three.low, 1);
  EXPECT_EQ(three.high, 3);
}

TEST(ReportStatistics, FewValuesAndNone) {
  const Summary one = summarise({kNan, 5});
  EXPECT_EQ(one.n, 1);
  EXPECT_EQ(one.mean, 5);
  EXPECT_TRUE(std::isnan(one.half));
  EXPECT_EQ(summarise({}).n, 0);
  EXPECT_TRUE(std::isnan(summarise({kNan}).mean));
  EXPECT_EQ(summarise({0.1, 0.1, 0.1}).half, 0);
  EXPECT_EQ(text_of(summarise({})), "—");
  EXPECT_EQ(text_of(one), "5");
  EXPECT_EQ(text_of(summarise({1, 2, 3})), "2.0 ± 2.5");
  EXPECT_EQ(text_of(summarise({0.98, 0.981, 0.982})), "0.9810 ± 0.0025");
}

TEST(ReportStatistics, ParetoFront) {
  using Points = std::vector<std::pair<double, double>>;
  using Front = std::vector<size_t>;
  const Points points{{3, 1}, {1, 3}, {2, 2}, {2, 4}, {4, 1}, {kNan, 0}, {1, 3}};
  EXPECT_EQ(pareto_front(points, /*more_is_better=*/false), (Front{1, 6, 2, 0}));
  EXPECT_EQ(pareto_front(points, /*more_is_better=*/true), (Front{1, 6, 3}));
  EXPECT_TRUE(pareto_front({}, false).empty());
}

TEST(ReportMetrics, BadLinesAreLeftOutAndCounted) {
  const Metrics metrics = parse_metrics(
      "{\"step\":1,\"loss\":3,\"lr\":0.1}\n"
      "{\"step\":2,\"lo\n"
      "\xff\xfe\n"
      "[1]\n"
      "{\"loss\":3}\n"
      "{\"step\":3,\"loss\":null,\"val_loss\":2.5,\"val_accuracy_by\":{\"pairs 4\":0.5},\"layers.1.expert_load\":[3,1]}\n"
      "{\"step\":4,\"loss\":1.5,\"val_acc");
  EXPECT_EQ(metrics.unreadable, 4) << "the last line is being written";
  EXPECT_EQ(metrics.steps, (std::vector<double>{1, 3}));
  EXPECT_EQ(metrics.column("loss")->at(0), 3);
  EXPECT_TRUE(std::isnan(metrics.column("loss")->at(1)));
  EXPECT_TRUE(std::isnan(metrics.column("val_loss")->at(0)));
  EXPECT_EQ(metrics.column("val_loss")->at(1), 2.5);
  ASSERT_EQ(metrics.column("lr")->size(), 2u);
  EXPECT_TRUE(std::isnan(metrics.column("lr")->at(1)));
  EXPECT_EQ(metrics.by.at("val_accuracy_by").at("pairs 4"), 0.5);
  EXPECT_EQ(metrics.loads.at("layers.1.expert_load").counts.front(), (std::vector<double>{3, 1}));
  EXPECT_EQ(metrics.column("absent"), nullptr);
}

TEST(ReportMetrics, TimeAndFlopsFollowFromRates) {
  RunData run;
  run.metrics = parse_metrics(
      "{\"step\":1,\"tokens\":100,\"tokens_per_s\":50,\"flops_per_s\":500}\n"
      "{\"step\":2,\"tokens\":200,\"tokens_per_s\":100,\"flops_per_s\":1000,\"save_s\":0.5}\n");
  EXPECT_EQ(elapsed_seconds(run.metrics), (std::vector<double>{2, 3.5}));
  EXPECT_EQ(spent_flops(run), (std::vector<double>{1000, 2000}));
}

class ReportFolderTest : public FolderTest {
 protected:
  // Made-up runs: their configuration names no block that exists, so the report knows their letters alone.
  void put_run(const std::string& name, const std::string& pattern, int64_t seed, const std::vector<std::string>& lines, int64_t steps = 2) {
    std::string config = "[run]\nname = \"" + name + "\"\n[model]\nhybrid_override_pattern = '" + pattern + "'\n[training]\nsteps = " + std::to_string(steps) +
                         "\nseed = " + std::to_string(seed) + "\n";
    put_file(folder_ / name / "config.toml", config);
    std::string text;
    for (const std::string& line : lines) text += line + "\n";
    put_file(folder_ / name / "metrics.jsonl", text);
    put_file(folder_ / name / "starts.jsonl", R"({"version":"1","host":"h","cpu":"c, \"fast\"","cores":2,"device":"cpu","dtype":"float32"})" "\n");
  }
  RunComparison compared(const std::vector<std::string>& names) const {
    std::vector<std::string> paths;
    for (const std::string& name : names) paths.push_back((folder_ / name).string());
    return compare(read_report_input(paths));
  }
  bool noted(const RunComparison& c, const std::string& part) const {
    for (const std::string& note : c.notes)
      if (note.find(part) != std::string::npos) return true;
    return false;
  }
};

TEST_F(ReportFolderTest, TablesToTheByte) {
  put_run("a0", "MM", 0, {R"({"step":1,"loss":4,"tokens":10})", R"({"step":2,"loss":2,"tokens":20,"val_loss":2.5,"val_accuracy_by":{"pairs 16":0.5,"pairs 4":1}})"});
  put_run("a1", "MM", 1, {R"({"step":1,"loss":4,"tokens":10})", R"({"step":2,"loss":4,"tokens":20,"val_loss":3.5,"val_accuracy_by":{"pairs 16":0.25,"pairs 4":1}})"});
  put_run("b", "M*|M", 0, {R"({"step":1,"loss":4,"tokens":10})", R"({"step":2,"loss":1,"tokens":20,"val_loss":1.25})"});
  const RunComparison c = compared({"a0", "a1", "b"});
  ASSERT_EQ(c.groups.size(), 2u);
  EXPECT_EQ(c.varied, std::vector<std::string>{"model.hybrid_override_pattern"});
  std::string csv = to_csv(c), folder = folder_.string() + "/";
  for (size_t at; (at = csv.find(folder)) != std::string::npos;) csv.erase(at, folder.size());
  EXPECT_EQ(csv,
            "group,run,folder,state,seed,model.hybrid_override_pattern,val_loss,val_accuracy,loss,params,active_params,flops_per_token,tokens,flops,seconds,tokens_per_s,bench_tokens_per_s,peak_bytes,"
            "val_accuracy_by pairs 4,val_accuracy_by pairs 16,version,host,cpu,device,dtype,error\r\n"
            "MM,a0,a0,done,0,MM,2.5,,3,,,,20,,,,,,1,0.5,1,h,\"c, \"\"fast\"\"\",cpu,float32,\r\n"
            "MM,a1,a1,done,1,MM,3.5,,4,,,,20,,,,,,1,0.25,1,h,\"c, \"\"fast\"\"\",cpu,float32,\r\n"
            "M*|M,b,b,done,0,M*|M,1.25,,2.5,,,,20,,,,,,,,1,h,\"c, \"\"fast\"\"\",cpu,float32,\r\n");
  const std::string markdown = to_markdown(c);
  EXPECT_EQ(markdown.substr(0, markdown.find('\n')), "# Report of 3 runs");
  EXPECT_EQ(markdown.substr(markdown.find("\n| model")),
            "\n| model.hybrid\\_override\\_pattern | runs | validation loss | training loss, last 10 steps | tokens |\n"
            "|---|---|---|---|---|\n"
            "| MM | 2 | 3.0 ± 6.4 | 3.5 ± 6.4 | 20 ± 0 |\n"
            "| M\\*\\|M | 1 | 1.25 | 2.5 | 20 |\n"
            "\nMeans over seeds ± half of the 95 % confidence interval by Student's t, where there are two runs or more.\n"
            "\n## val\\_accuracy\\_by\n\n"
            "|  | pairs 4 | pairs 16 |\n|---|---|---|\n"
            "| MM | 1 ± 0 | 0.4 ± 1.6 |\n");
  EXPECT_TRUE(noted(c, "a0: parameters and FLOPs are not known")) << markdown;
  EXPECT_TRUE(noted(c, "different numbers of runs, 1 to 2"));
}

// What `bench SWEEP.toml` measured of a trial, or of a run's own file, is the run's; one seed's figure stands for its row.
TEST_F(ReportFolderTest, MeasuredThroughputIsTheRuns) {
  put_run("fast", "M", 0, {R"({"step":1,"loss":4,"tokens":1,"val_loss":3})", R"({"step":2,"loss":3,"tokens":2,"val_loss":3})"});
  put_run("again", "M", 1, {R"({"step":1,"loss":4,"tokens":1,"val_loss":3})", R"({"step":2,"loss":3,"tokens":2,"val_loss":3})"});
  put_run("good", "MM", 0, {R"({"step":1,"loss":4,"tokens":1,"val_loss":2})", R"({"step":2,"loss":3,"tokens":2,"val_loss":2})"});
  put_run("worse", "M*", 0, {R"({"step":1,"loss":4,"tokens":1,"val_loss":4})", R"({"step":2,"loss":3,"tokens":2,"val_loss":4})"});
  put_file(folder_ / "bench.json", json{{"results", {{{"config", "fast"}, {"train", {{"tokens_per_s", 30.0}}}, {"parts", json::array()}},
                                                     {{"config", (folder_ / "good/config.toml").string()}, {"train", {{"tokens_per_s", 10.0}}}, {"parts", json::array()}},
                                                     {{"config", "worse"}, {"train", {{"tokens_per_s", 20.0}}}, {"parts", json::array()}}}}}.dump());
  const RunComparison c = compared({"fast", "again", "good", "worse", "bench.json"});
  ASSERT_EQ(c.groups.size(), 3u);
  const size_t rate = measure("bench_tokens_per_s");
  EXPECT_EQ(c.groups[0].summaries[rate].n, 1);
  EXPECT_EQ(c.groups[0].summaries[rate].mean, 30);
  EXPECT_EQ(c.groups[1].summaries[rate].mean, 10);
  EXPECT_EQ(pareto_fronts(c)["val_loss"]["bench_tokens_per_s"], (std::vector<size_t>{0, 1}));
  EXPECT_NE(to_markdown(c).find("## Pareto fronts of validation loss\n\n| against | no other is better in both than |\n|---|---|\n| tokens/s by bench | M; MM |\n"), std::string::npos) << to_markdown(c);
}

TEST_F(ReportFolderTest, DivergedAndUnfinishedRunsDoNotFlatter) {
  put_run("good", "M", 0, {R"({"step":1,"loss":4,"val_loss":4})", R"({"step":2,"loss":3,"val_loss":3})"});
  put_run("diverged", "M", 1, {R"({"step":1,"loss":4,"val_loss":1})", R"({"step":2,"loss":null})"});
  put_run("short", "M", 2, {R"({"step":1,"loss":1,"val_loss":1})"});
  const RunComparison c = compared({"good", "diverged", "short"});
  ASSERT_EQ(c.groups.size(), 1u);
  EXPECT_EQ(c.groups[0].counted, (std::vector<size_t>{0, 1}));
  const Summary loss = c.groups[0].summaries[measure("val_loss")];
  EXPECT_EQ(loss.n, 1);
  EXPECT_EQ(loss.mean, 3);
  EXPECT_TRUE(noted(c, "diverged: the loss of 1 of 2 steps is not finite, the last among them."));
  EXPECT_TRUE(noted(c, "1 unfinished"));
}

TEST_F(ReportFolderTest, MachinesAndVersionsThatDifferAreMarked) {
  const std::vector<std::string> lines{R"({"step":1,"loss":4})", R"({"step":2,"loss":3})"};
  for (const char* name : {"a", "b", "c", "d"}) put_run(name, "M", name[0], lines);
  EXPECT_FALSE(noted(compared({"a", "b"}), "machines"));
  put_file(folder_ / "b/starts.jsonl", R"({"version":"1","host":"other","cpu":"c","cores":2})" "\n" R"({"version":"2","host":"h","cpu":"c","cores":2})" "\n" R"({"vers)");
  std::filesystem::remove(folder_ / "d/starts.jsonl");
  const RunComparison c = compared({"a", "b", "c", "d"});
  EXPECT_TRUE(noted(c, "The runs are of 3 machines"));
  EXPECT_TRUE(noted(c, "The runs are of 2 versions: 1; 2."));
  EXPECT_TRUE(noted(c, "b: it ran on 2 machines"));
  EXPECT_TRUE(noted(c, "1 of 4 runs do not say which version and machine"));
}

TEST_F(ReportFolderTest, SweepsOfTrialsInEveryState) {
  put_run("s/trials/one", "M", 0, {R"({"step":1,"loss":4})", R"({"step":2,"loss":3})"});
  put_file(folder_ / "s/trials/one/trial.json", R"({"name":"one","state":"done","seed":7,"sets":{},"match":{"text":"params 10, +1.00 % of 9","error":0.01}})");
  put_file(folder_ / "s/trials/two/trial.json", R"({"name":"two","state":"failed","error":"out of <memory>","seed":8,"sets":{"model.hybrid_override_pattern":"M*","optimizer.lr":0.5}})");
  put_file(folder_ / "s/trials/three/trial.json", "{\"name\":");
  put_file(folder_ / "s/trials/not_a_trial/notes.txt", "");
  const RunComparison c = compared({"s"});
  ASSERT_EQ(c.runs.size(), 3u);
  EXPECT_EQ(c.runs[0].name, "one");
  EXPECT_EQ(c.runs[0].seed, 7);
  EXPECT_EQ(c.runs[0].match, "params 10, +1.00 % of 9");
  EXPECT_EQ(c.runs[0].match_error, 0.01);
  EXPECT_EQ(c.runs[1].state, "no metrics");
  EXPECT_EQ(c.runs[2].state, "failed");
  EXPECT_EQ(c.runs[2].error, "out of <memory>");
  EXPECT_EQ(c.runs[2].keys.at("optimizer.lr"), "0.5");
  EXPECT_EQ(c.runs[2].stack.size(), 2u);
  EXPECT_TRUE(noted(c, "three: its trial.json cannot be read"));
  EXPECT_TRUE(noted(c, "1 failed, 1 no metrics"));
  EXPECT_NO_THROW(json::parse(page_data(c).dump()));
}

TEST_F(ReportFolderTest, WhatIsNoRunIsRefused) {
  put_file(folder_ / "empty/notes.txt", "");
  put_file(folder_ / "bench.json", R"([{"config":"a.toml","train":{"tokens_per_s":3},"parts":[{"part":"x","forward_s":1}]}])");
  put_file(folder_ / "other.json", R"({"config":3})");
  put_file(folder_ / "cut.json", R"([{"config":)");
  EXPECT_EQ(compared({"bench.json"}).benches.size(), 1u);
  EXPECT_EQ(page_data(compared({"bench.json"}))["benches"][0]["train"]["tokens_per_s"], 3);
  for (const char* name : {"absent", "empty", "other.json", "cut.json"}) {
    try {
      compared({name});
      ADD_FAILURE() << name;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
      EXPECT_NE(error.message().find(name), std::string::npos) << error.message();
      EXPECT_FALSE(error.help().empty());
    }
  }
}

// The page's data, from its one JSON block.
json data_of(const std::string& html) {
  const std::string open = "<script type=\"application/json\" id=\"data\">";
  const size_t begin = html.find(open) + open.size();
  return json::parse(html.substr(begin, html.find("</script>", begin) - begin));
}

TEST_F(ReportFolderTest, NamesAreTextAndNotHtml) {
  const std::string evil = "</script><img src=x onerror=alert(1)>";
  put_run("a", "M", 0, {R"({"step":1,"loss":4,"tokens":1})", R"({"step":2,"loss":3,"tokens":2,"val_accuracy_by":{"<b>|":1}})"});
  put_file(folder_ / "a/trial.json", json{{"name", evil}, {"state", "done"}, {"error", evil + "\xff"}}.dump(-1, ' ', false, json::error_handler_t::replace));
  put_run("b", "M*", 0, {R"({"step":1,"loss":4,"tokens":1})", R"({"step":2,"loss":3,"tokens":2})"});
  const RunComparison c = compared({"a", "b"});
  const std::string html = to_html(c, evil);
  EXPECT_EQ(html.find("<img"), std::string::npos);
  EXPECT_NE(html.find("<title>&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;</title>"), std::string::npos);
  EXPECT_EQ(data_of(html)["runs"][0]["name"], evil);
  const std::string markdown = to_markdown(c);
  EXPECT_EQ(markdown.find("<b>"), std::string::npos);
  EXPECT_NE(markdown.find("&lt;b\\>\\|"), std::string::npos) << markdown;
}

TEST_F(ReportFolderTest, LongCurvesAreThinnedAndSaySo) {
  constexpr int kSteps = 100'000;
  for (const char* name : {"a", "b"}) {
    std::vector<std::string> lines;
    for (int step = 1; step <= kSteps; ++step)
      lines.push_back("{\"step\":" + std::to_string(step) + ",\"loss\":" + (step == 500 ? "null" : std::to_string(name[0] == 'a' ? 1 : 3)) + ",\"tokens\":" + std::to_string(10 * step) + "}");
    put_run(name, "M", name[0], lines, kSteps);
  }
  const json data = page_data(compared({"a", "b"}));
  EXPECT_EQ(data["thinning"], "Each point is the mean of 250 steps.");
  const json& curves = data["groups"][0]["curves"];
  ASSERT_EQ(curves["series"]["loss"]["mean"].size(), 400u);
  for (const json& mean : curves["series"]["loss"]["mean"]) EXPECT_EQ(mean, 2);
  EXPECT_EQ(curves["series"]["loss"]["low"][5], 1);
  EXPECT_EQ(curves["series"]["loss"]["high"][5], 3);
  EXPECT_EQ(curves["step"][0], 125.5);
  EXPECT_EQ(curves["tokens"][0], 1255);
}

}  // namespace
}  // namespace tessera
