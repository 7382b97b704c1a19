// tessera report: runs and sweeps as one page with its tables beside it.
#include <fmt/format.h>

#include <chrono>
#include <iostream>
#include <thread>

#include "checkpoint/file.hpp"
#include "cli/limits.hpp"
#include "cli/verbs.hpp"
#include "report/page.hpp"
#include "train/signals.hpp"

namespace tessera {

namespace fs = std::filesystem;

namespace {

struct Options {
  std::vector<std::string> paths;
  std::string out;
  bool watch = false;
  int64_t interval = 10;
};

// In the folder that is reported, or here where there are several.
fs::path out_file(const Options& o) {
  if (!o.out.empty()) return o.out;
  return o.paths.size() == 1 && fs::is_directory(o.paths.front()) ? fs::path(o.paths.front()) / "report.html" : fs::path("report.html");
}

std::string title(const Options& o) {
  if (o.paths.size() != 1) return "Report";
  const fs::path path = fs::weakly_canonical(o.paths.front());
  return path.filename().string();
}

// What a report depends on: names, sizes and times of the files that it is read from.
std::string stamp(const std::vector<std::string>& paths) {
  std::string text;
  const auto add = [&](const fs::path& file) {
    std::error_code gone;
    const auto size = fs::file_size(file, gone);
    const auto time = fs::last_write_time(file, gone);
    if (!gone) text += fmt::format("{} {} {}\n", file.string(), size, time.time_since_epoch().count());
  };
  const auto add_run = [&](const fs::path& folder) {
    for (const char* name : {"config.toml", "metrics.jsonl", "starts.jsonl", "trial.json"}) add(folder / name);
  };
  for (const std::string& path : paths) {
    add(path);
    add_run(path);
    std::error_code gone;
    for (const auto& entry : fs::directory_iterator(fs::path(path) / "trials", gone)) add_run(entry.path());
  }
  return text;
}

void write_report(const Options& o, const fs::path& out, int64_t refresh_s) {
  const RunComparison comparison = compare(read_report_input(o.paths));
  write_file(out, to_html(comparison, title(o), refresh_s));
  write_file(fs::path(out).replace_extension(".csv"), to_csv(comparison));
  write_file(fs::path(out).replace_extension(".md"), to_markdown(comparison));
}

int watch(const Options& o, const fs::path& out) {
  using Clock = std::chrono::steady_clock;
  const StopSignals signals;
  std::string written = stamp(o.paths);
  std::cerr << fmt::format("{}: written again every {} s while files change; Ctrl-C ends it", out.string(), o.interval) << std::endl;
  while (!StopSignals::received()) {
    const auto next = Clock::now() + std::chrono::seconds(o.interval);
    while (!StopSignals::received() && Clock::now() < next) std::this_thread::sleep_for(std::chrono::milliseconds(100));
    const std::string now = stamp(o.paths);
    if (now == written || StopSignals::received()) continue;
    try {
      write_report(o, out, o.interval);
      written = now;
    } catch (const Error& error) {
      // What is read is written by others at the same time; the next round sees it whole.
      std::cerr << error.what() << std::endl;
    }
  }
  write_report(o, out, 0);
  return 0;
}

}  // namespace

void add_report(CLI::App& app, Run& run) {
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("report", "runs, sweeps and measurements side by side: one HTML page, and CSV and Markdown beside it");
  verb->add_option("RUN_OR_SWEEP", o->paths, "folders of runs or sweeps, and files with the output of `bench --json`")->required();
  verb->add_option("--out", o->out, "the page; default: report.html in the folder, or here where several are named")->type_name("FILE.html");
  verb->add_flag("--watch", o->watch, "write it again while the runs go on, until Ctrl-C");
  verb->add_option("--interval", o->interval, "seconds between looks with --watch")->capture_default_str()->check(whole(1));
  verb->callback([o, &run] {
    run = [o] {
      const fs::path out = out_file(*o);
      if (out.extension() != ".html") throw Error(ExitCode::kUsage, fmt::format("--out: must end in .html, got \"{}\"", out.string()), "the CSV and the Markdown file get its name with .csv and .md");
      write_report(*o, out, o->watch ? o->interval : 0);
      if (o->watch) return watch(*o, out);
      std::cerr << fmt::format("written: {}, with .csv and .md beside it", out.string()) << std::endl;
      return 0;
    };
  });
}

}  // namespace tessera
