// tessera report on real runs: the files it writes, --watch, and, where Chromium is installed, what a browser makes of the page.
#include <gtest/gtest.h>

#include <regex>

#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

class ReportTest : public TinyRunTest {
 protected:
  static const std::vector<std::string>& seeds() {
    static const std::vector<std::string> sets{"metrics.detail_interval=2", "training.num_threads=1"};
    return sets;
  }
  void train_seed(const std::string& run, int seed, std::vector<std::string> sets = seeds()) {
    sets.push_back(fmt::format("training.seed={}", seed));
    const Finished done = train(run, sets);
    ASSERT_EQ(done.code, 0) << done.err;
  }
  static json data_of(const std::string& html) {
    const std::string open = "<script type=\"application/json\" id=\"data\">";
    const size_t begin = html.find(open);
    EXPECT_NE(begin, std::string::npos);
    return json::parse(html.substr(begin + open.size(), html.find("</script>", begin) - begin - open.size()));
  }
};

TEST_F(ReportTest, SeedsBecomeOneRowAndNothingIsLoaded) {
  train_seed("one", 1);
  train_seed("two", 2);
  std::vector<std::string> other = seeds();
  other.push_back("model.hybrid_override_pattern=MM");
  train_seed("three", 1, other);
  const Finished done = tessera({"report", "one", "two", "three", "--out", "all.html"});
  ASSERT_EQ(done.code, 0) << done.err;
  const std::string html = file_text(folder_ / "all.html");
  const json data = data_of(html);
  ASSERT_EQ(data["groups"].size(), 2u);
  const json& group = data["groups"][0];
  EXPECT_EQ(group["counted"], 2);
  EXPECT_EQ(group["stack"].size(), 5u - 1);
  EXPECT_EQ(data["groups"][1]["label"], "MM");
  EXPECT_EQ(group["curves"]["series"]["loss"]["low"].size(), 6u);
  EXPECT_FALSE(group["loads"].empty());
  EXPECT_GT(group["memory"]["parameters"], 0);
  EXPECT_EQ(data["runs"][0]["starts"].size(), 1u);
  EXPECT_EQ(data["runs"][0]["starts"][0]["dtype"], "float32");
  EXPECT_NE(data["runs"][0]["config"].get<std::string>().find("num_experts = 4"), std::string::npos);
  EXPECT_TRUE(data["fronts"]["val_loss"].contains("flops"));
  // The parameters are those that the plan gives.
  const json plan = json::parse(tessera({"plan", "one/config.toml", "--json"}).out);
  const size_t params = 3;
  ASSERT_EQ(data["measures"][params]["name"], "params");
  EXPECT_EQ(group["summaries"][params][1].get<double>(), plan["totals"]["trained"].get<double>());
  double elements = 0;
  for (const json& part : group["elements"]) elements += part.get<double>();
  EXPECT_EQ(elements, plan["totals"]["trained"].get<double>());

  const std::regex loads(R"((src|href|action|data)\s*=\s*["']?\s*(https?:)?//|url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket|<link)");
  EXPECT_FALSE(std::regex_search(html, loads)) << "the page must not load anything";
  EXPECT_NE(html.find("default-src 'none'"), std::string::npos);
  EXPECT_NE(file_text(folder_ / "all.csv").find("\r\nMM,three,three,done,1,MM,"), std::string::npos) << file_text(folder_ / "all.csv");
  EXPECT_NE(file_text(folder_ / "all.md").find("| MM | 1 |"), std::string::npos);
}

TEST_F(ReportTest, OneFolderGetsItsReportAndBadNamesAreRefused) {
  put_file(folder_ / "run/config.toml", kTinyRun);
  EXPECT_EQ(tessera({"report", "run"}).code, 0);
  EXPECT_NE(file_text(folder_ / "run/report.md").find("no metrics"), std::string::npos);
  EXPECT_EQ(data_of(file_text(folder_ / "run/report.html"))["runs"].size(), 1u);
  const Finished absent = tessera({"report", "absent"});
  EXPECT_EQ(absent.code, 2);
  EXPECT_NE(absent.err.find("error: absent: there is no such file or folder\nhelp: "), std::string::npos) << absent.err;
  EXPECT_EQ(tessera({"report", "text"}).code, 2);
  EXPECT_EQ(tessera({"report", "run", "--out", "x.txt"}).code, 2);
  EXPECT_EQ(tessera({"report", "run", "--out", "no/such/x.html"}).code, 4);
}

TEST_F(ReportTest, WatchRewritesUntilStopped) {
  put_file(folder_ / "run/config.toml", kTinyRun);
  put_file(folder_ / "run/metrics.jsonl", "{\"step\":1,\"loss\":5}\n");
  Process process(folder_, {"report", "run", "--watch", "--interval", "1"});
  const auto steps = [&] {
    const std::string html = file_text(folder_ / "run/report.html");
    return html.empty() ? json(0) : data_of(html)["runs"][0]["lines"];
  };
  ASSERT_TRUE(process.wait_until([&] { return process.err().find("Ctrl-C") != std::string::npos; })) << process.err();
  EXPECT_EQ(steps(), 1);
  EXPECT_NE(file_text(folder_ / "run/report.html").find("http-equiv=\"refresh\" content=\"1\""), std::string::npos);
  put_file(folder_ / "run/metrics.jsonl", "{\"step\":1,\"loss\":5}\n{\"step\":2,\"loss\":4}\n{\"step\":3,");
  EXPECT_TRUE(process.wait_until([&] { return steps() == 2; }));
  process.signal(SIGINT);
  const Finished done = process.wait();
  EXPECT_EQ(done.code, 0) << done.err;
  EXPECT_EQ(file_text(folder_ / "run/report.html").find("http-equiv=\"refresh\""), std::string::npos);
}

// What a browser says of a page: the probe's object, everything else on its console, and the picture.
struct Seen {
  json probe;
  std::string console;
  int64_t width = 0, height = 0, bytes = 0;
};

class ReportPageTest : public ReportTest {
 protected:
  void SetUp() override {
    ReportTest::SetUp();
    if (std::system("command -v chromium >/dev/null 2>&1") != 0) GTEST_SKIP() << "needs Chromium: apt-get install --no-install-recommends chromium";
  }

  // `name`.html `width` pixels wide, in a frame because windows have a least width.
  Seen look(const std::string& name, int width, int height, bool dark) {
    static constexpr const char* kProbe = R"(<script>
addEventListener("load", () => setTimeout(() => {
  const colours = [...document.querySelectorAll(".chart canvas")].map(c => {
    const pixels = c.getContext("2d").getImageData(0, 0, c.width, c.height).data, seen = new Set();
    for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3]) seen.add(pixels[i] << 16 | pixels[i + 1] << 8 | pixels[i + 2]);
    return seen.size;
  });
  const out = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".wide, pre")).map(e => e.tagName + "." + e.className);
  console.log("PROBE " + JSON.stringify({ width: innerWidth, scroll: document.documentElement.scrollWidth, colours, out, paper: getComputedStyle(document.body).backgroundColor,
    headings: [...document.querySelectorAll("h2")].map(h => h.textContent), rows: document.querySelectorAll("tbody tr").length, cells: document.querySelectorAll(".stack b").length }));
}, 200));
</script></body>)";
    std::string html = file_text(folder_ / (name + ".html"));
    html.replace(html.rfind("</body>"), 7, kProbe);
    put_file(folder_ / "probed.html", html);
    put_file(folder_ / "frame.html", fmt::format("<!DOCTYPE html><html><body style='margin:0'><iframe src='probed.html' style='border:0;width:{}px;height:{}px'></iframe></body></html>", width, height));
    const std::string picture = (folder_ / "picture.png").string();
    const std::string command = fmt::format("cd '{}' && HOME='{}' timeout 120 chromium --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --user-data-dir='{}/profile' "
                                            "--enable-logging=stderr --virtual-time-budget=4000 --window-size={},{} {} --screenshot='{}' 'file://{}/frame.html' >browser.out 2>&1",
                                            folder_.string(), folder_.string(), folder_.string(), std::max(width, 500), height, dark ? "--force-dark-mode" : "", picture, folder_.string());
    EXPECT_EQ(std::system(command.c_str()), 0) << file_text(folder_ / "browser.out");
    Seen seen;
    std::istringstream lines(file_text(folder_ / "browser.out"));
    for (std::string line; std::getline(lines, line);) {
      const size_t at = line.find(":CONSOLE");
      if (at == std::string::npos) continue;
      const size_t probe = line.find("\"PROBE "), end = line.rfind("\", source:");
      if (probe == std::string::npos) seen.console += line + "\n";
      else seen.probe = json::parse(line.substr(probe + 7, end - probe - 7), nullptr, false);
    }
    const std::string png = file_text(picture);
    seen.bytes = std::ssize(png);
    const auto big_endian = [&](size_t at) {
      int64_t value = 0;
      for (size_t i = at; i < at + 4; ++i) value = value << 8 | static_cast<unsigned char>(png[i]);
      return value;
    };
    if (png.size() > 24) seen.width = big_endian(16), seen.height = big_endian(20);
    return seen;
  }
};

TEST_F(ReportPageTest, LightDarkAndPhone) {
  if (IsSkipped()) return;
  train_seed("one", 1);
  train_seed("two", 2);
  std::vector<std::string> other = seeds();
  other.push_back("model.hybrid_override_pattern=M" + std::string(40, '*') + "E");
  train_seed("three", 1, other);
  for (const char* run : {"one", "two", "three"}) {  // as the tasks report
    std::vector<json> lines = metrics(run);
    lines.back()["val_accuracy"] = 0.5;
    for (int pairs = 4; pairs <= 512; pairs *= 2) lines.back()["val_accuracy_by"][fmt::format("pairs {}", pairs)] = 4.0 / pairs;
    std::string text;
    for (const json& line : lines) text += line.dump() + "\n";
    put_file(folder_ / run / "metrics.jsonl", text);
  }
  put_file(folder_ / "bench.json", tessera({"bench", "tiny.toml", "three/config.toml", "--steps", "1", "--decode-tokens", "2", "--json"}).out);
  const Finished done = tessera({"report", "one", "two", "three", "bench.json", "--out", "page.html"});
  ASSERT_EQ(done.code, 0) << done.err;
  for (const auto& [width, dark] : {std::pair{1200, false}, {1200, true}, {390, false}}) {
    const Seen seen = look("page", width, 5200, dark);
    EXPECT_EQ(seen.console, "");
    ASSERT_TRUE(seen.probe.is_object()) << file_text(folder_ / "browser.out");
    EXPECT_EQ(seen.probe["width"], width);
    EXPECT_LE(seen.probe["scroll"], width) << seen.probe["out"];
    EXPECT_EQ(seen.probe["out"], json::array());
    EXPECT_EQ(seen.probe["paper"], dark ? "rgb(20, 24, 28)" : "rgb(255, 255, 255)");
    EXPECT_EQ(seen.probe["headings"], (json{"Comparison", "Architectures", "Curves", "Cost and quality", "validation accuracy by", "Throughput", "Parameters and planned memory", "Expert load", "Runs"}));
    EXPECT_GE(seen.probe["rows"], 2);
    EXPECT_EQ(seen.probe["cells"], 4 + 42);
    ASSERT_GE(seen.probe["colours"].size(), 8u);
    for (const json& colours : seen.probe["colours"]) EXPECT_GE(colours, 3) << "a chart is blank: " << seen.probe["colours"];
    EXPECT_EQ(seen.width, std::max(width, 500));
    EXPECT_EQ(seen.height, 5200);
    EXPECT_GT(seen.bytes, 50'000);
    if (const char* keep = std::getenv("TESSERA_KEEP_PICTURES"))
      fs::copy_file(folder_ / "picture.png", fs::path(keep) / fmt::format("report-{}{}.png", width, dark ? "-dark" : ""), fs::copy_options::overwrite_existing);
  }
}

}  // namespace
}  // namespace tessera
