#include "sweep/runner.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstring>
#include <deque>
#include <fstream>
#include <iostream>
#include <map>
#include <optional>
#include <thread>

#include "checkpoint/file.hpp"
#include "metrics/machine.hpp"
#include "plan/plan.hpp"
#include "sweep/trial_state.hpp"
#include "sweep/trials.hpp"
#include "train/signals.hpp"

namespace tessera {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr double kManyTrials = 1000, kMostTrials = 100'000;  // asked about; refused

// A trial on its way.
struct Entry {
  Trial trial;
  fs::path folder;
  TrialState state;
  int64_t params = 0, steps = 0;
  pid_t pid = -1;
  bool sent_stop = false;
  std::chrono::steady_clock::time_point began{}, looked{};
};

double now_s(std::chrono::steady_clock::time_point since) { return std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count(); }

// The error that a run told last, or what is left of it.
std::string last_error(const fs::path& log, int code) {
  std::ifstream in(log);
  std::string block, last;
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with("error: ") || line.find(": error: ") != std::string::npos) block = line;
    else if (!block.empty() && (line.starts_with("help: ") || line.starts_with("  "))) block += "\n" + line;
    if (!line.empty()) last = line;
  }
  if (code > 128) return fmt::format("ended by signal {} ({}){}", code - 128, ::strsignal(code - 128), code == 137 ? ": the machine may have run out of memory" : "");
  return !block.empty() ? block : fmt::format("ended with exit code {}{}", code, last.empty() ? "" : ": " + last);
}

class SweepRun {
 public:
  SweepRun(Sweep sweep, const SweepOptions& options) : sweep_(std::move(sweep)), options_(options) {}

  int run() {
    refuse_too_many();
    const LoadedSweep loaded = load_trials(sweep_, options_.step_time);
    for (const std::string& note : sweep_.notes) say("note: " + note);
    for (const LoadedTrial& one : loaded.trials) {
      Entry& entry = entries_.emplace_back(Entry{.trial = one.trial, .folder = trial_folder(sweep_, one.trial)});
      if (one.config) entry.params = totals(make_plan(*one.config)).trained, entry.steps = one.config->training.steps;
      else entry.state = {.state = "failed", .error = one.error->what(), .machine = machine_text()};
    }
    if (!options_.trial.empty()) return run_one();
    for (Entry& entry : entries_)
      if (entry.state.state != "failed" || is_there(entry.folder)) recall(entry);
    if (options_.dry_run) return show();
    make_folder(sweep_.folder);
    const FolderLock lock(sweep_.folder, "another process runs this sweep", "wait until it ends, or choose another [sweep] folder");
    write_file(sweep_.folder / "sweep.toml", read_file(sweep_.file, 1 << 20));
    if (options_.slurm) return submit();
    const StopSignals signals;
    say(fmt::format("{}: {} trials, {} of them ended before", sweep_.folder.string(), entries_.size(), count([](const Entry& e) { return e.state.ended() && e.state.state != "failed"; })));
    for (Entry& entry : entries_)
      if (entry.state.state == "failed" && !is_there(entry.folder / "trial.json")) write_trial_state(entry.folder, entry.trial, entry.state), tell(entry);
    int signal = 0;
    const std::vector<int64_t> rungs = sweep_.halving ? sweep_.halving->rungs : std::vector<int64_t>{};
    for (size_t r = 0; r <= rungs.size() && !signal; ++r) {
      signal = run_all(r < rungs.size() ? rungs[r] : 0);
      if (!signal && r < rungs.size()) halve(rungs[r]);
    }
    write_results();
    if (signal) {
      say(fmt::format("stopped: `tessera sweep {}` goes on", sweep_.file.string()));
      return 128 + signal;
    }
    print_table();
    const auto failed = count([](const Entry& e) { return e.state.state == "failed"; });
    if (failed > 0)
      throw Error(ExitCode::kRuntime, fmt::format("{} of {} trials failed; their errors are in {}", failed, entries_.size(), (sweep_.folder / "results.csv").string()), "--retry runs them again");
    return 0;
  }

 private:
  void say(const std::string& text) const {
    if (!options_.quiet) std::cerr << text << std::endl;
  }
  int64_t count(const std::function<bool(const Entry&)>& which) const { return std::count_if(entries_.begin(), entries_.end(), which); }

  void refuse_too_many() const {
    const double most = sweep_.most_trials();
    if (most > kMostTrials) throw Error(ExitCode::kUsage, fmt::format("{}: error: the axes make {:.0f} trials, at most {:.0f}", sweep_.file.string(), most, kMostTrials), "take values out of an axis");
    if (most <= kManyTrials || options_.yes || options_.dry_run) return;
    throw Error(ExitCode::kUsage, fmt::format("{}: error: the axes make {:.0f} trials", sweep_.file.string(), most), "--yes if that is meant; --dry-run lists them");
  }

  // What became of the trial before.
  void recall(Entry& entry) const {
    const TrialState before = read_trial_state(entry.folder);
    if (entry.steps == 0) return;  // its configuration is not legal
    entry.state = before;
    if (before.state == "running") entry.state.state = "interrupted";  // its sweep was killed
    if (before.state == "failed" && options_.retry) entry.state = {};
  }

  int run_one() {
    const auto found = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.trial.name == options_.trial; });
    if (found == entries_.end()) throw Error(ExitCode::kUsage, fmt::format("{}: has no trial {}", sweep_.file.string(), options_.trial), "--dry-run lists them");
    Entry entry = *found;
    if (entry.steps == 0) throw Error(ExitCode::kUsage, entry.state.error);
    recall(entry);
    entries_ = {entry};
    const StopSignals signals;
    const int signal = run_all(0);
    if (signal) return 128 + signal;
    if (entries_[0].state.state == "failed") throw Error(ExitCode::kRuntime, fmt::format("trial {} failed", entry.trial.name), entries_[0].state.error);
    return 0;
  }

  std::vector<std::string> words(const Entry& entry, int64_t until) const {
    const int64_t ranks = sweep_.config.ranks;
    std::vector<std::string> out;
    if (ranks > 1 && options_.slurm) out = {"srun", "--ntasks", std::to_string(ranks), fs::read_symlink("/proc/self/exe").string()};
    else out = {"tessera"};
    if (ranks > 1 && !options_.slurm) out.insert(out.end(), {"launch", "-n", std::to_string(ranks)});
    out.insert(out.end(), {"train", sweep_.base.string(), "--resume", "--quiet"});
    if (until > 0 && until < entry.steps) out.insert(out.end(), {"--until", std::to_string(until)});
    for (const std::string& set : entry.trial.sets(sweep_)) out.insert(out.end(), {"--set", set});
    return out;
  }

  void start(Entry& entry, int64_t until) {
    entry.state = {.state = "running", .machine = machine_text()};
    write_trial_state(entry.folder, entry.trial, entry.state);
    std::vector<std::string> list = words(entry, until);
    std::vector<char*> argv;
    for (std::string& word : list) argv.push_back(word.data());
    argv.push_back(nullptr);
    cpu_set_t cores;
    const int64_t num_cores = ::sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
    const std::string threads = std::to_string(std::max<int64_t>(1, num_cores / (sweep_.config.at_once * sweep_.config.ranks)));
    const std::string log = (entry.folder / "log.txt").string();
    const pid_t own = ::getpid();
    entry.pid = ::fork();
    if (entry.pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != own) ::_exit(127);
      ::setpgid(0, 0);  // a terminal's signals reach the sweep alone
      const int null = ::open("/dev/null", O_RDWR), file = ::open(log.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
      ::dup2(null, STDIN_FILENO), ::dup2(null, STDOUT_FILENO), ::dup2(file >= 0 ? file : null, STDERR_FILENO);
      ::setenv("OMP_NUM_THREADS", threads.c_str(), 0);
      if (list[0] == "srun") ::execvp("srun", argv.data());
      else ::execv("/proc/self/exe", argv.data());
      ::_exit(127);
    }
    if (entry.pid < 0) throw Error(ExitCode::kRuntime, fmt::format("trial {} cannot be started: {}", entry.trial.name, std::strerror(errno)), "a limit on processes may be reached: ulimit -u");
    entry.began = entry.looked = std::chrono::steady_clock::now();
    entry.sent_stop = false;
  }

  // Trains all that go on to step `until` (0: to their end). Returns the signal that stopped it, or 0.
  int run_all(int64_t until) {
    std::deque<Entry*> waiting;
    for (Entry& entry : entries_)
      if (!entry.state.ended() && entry.steps > 0) waiting.push_back(&entry);
    std::vector<Entry*> running;
    int forwarded = 0;
    try {
      while (!running.empty() || (!waiting.empty() && !forwarded)) {
        while (!forwarded && !waiting.empty() && static_cast<int64_t>(running.size()) < sweep_.config.at_once) {
          running.push_back(waiting.front());
          waiting.pop_front();
          start(*running.back(), until);
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        if (const int signal = StopSignals::received(); signal && !forwarded) {
          forwarded = signal;
          stop(running, signal);
        }
        for (Entry* entry : running) watch(*entry);
        std::erase_if(running, [&](Entry* entry) { return collect(*entry, until, forwarded); });
      }
    } catch (...) {
      stop(running, SIGTERM);
      for (const Entry* entry : running)
        if (entry->pid > 0) ::waitpid(entry->pid, nullptr, 0);
      throw;
    }
    return forwarded;
  }

  // Those that still run: -1 would be every process there is.
  static void stop(const std::vector<Entry*>& entries, int signal) {
    for (const Entry* entry : entries)
      if (entry->pid > 0) ::kill(entry->pid, signal);
  }

  // Ends a trial that diverges.
  void watch(Entry& entry) const {
    if (entry.pid <= 0 || sweep_.config.stop_above <= 0 || entry.sent_stop || now_s(entry.looked) < 0.5) return;
    entry.looked = std::chrono::steady_clock::now();
    if (diverged_at(entry.folder, sweep_.config.stop_above) == 0) return;
    entry.sent_stop = true;
    ::kill(entry.pid, SIGTERM);
  }

  // True when the trial's process has ended.
  bool collect(Entry& entry, int64_t until, int forwarded) {
    int status = 0;
    if (::waitpid(entry.pid, &status, WNOHANG) != entry.pid) return false;
    entry.pid = -1;
    const int code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    const int64_t diverged = sweep_.config.stop_above > 0 ? diverged_at(entry.folder, sweep_.config.stop_above) : 0;
    if (diverged > 0) entry.state.state = "diverged", entry.state.error = fmt::format("the loss of step {} is no number, or above {} times that of the first step", diverged, sweep_.config.stop_above);
    else if (forwarded && (code == 128 + forwarded || code == 0)) entry.state.state = "interrupted";
    else if (code == 0) entry.state.state = until > 0 && until < entry.steps ? "interrupted" : "done";
    else {
      entry.state.error = last_error(entry.folder / "log.txt", code);
      const bool not_finite = entry.state.error.starts_with("error: step ") && (entry.state.error.find(": the loss is ") != std::string::npos || entry.state.error.find(": the gradient norm is ") != std::string::npos);
      entry.state.state = not_finite ? "diverged" : "failed";  // what training did, and what kept it from training
    }
    write_trial_state(entry.folder, entry.trial, entry.state);
    tell(entry, until);
    return true;
  }

  void tell(const Entry& entry, int64_t until = 0) const {
    const json last = last_metrics(entry.folder);
    std::string figures;
    for (const char* key : {"loss", "val_loss", "val_accuracy"})
      if (last.contains(key) && last[key].is_number()) figures += fmt::format(", {} {:.4f}", key, last[key].get<double>());
    const bool rung = entry.state.state == "interrupted" && until > 0 && !StopSignals::received();
    say(fmt::format("{}/{} {}: {}{}{}", count([](const Entry& e) { return e.state.ended(); }), entries_.size(), entry.trial.name, rung ? fmt::format("at step {}", until) : entry.state.state, figures,
                    entry.state.error.empty() ? "" : ": " + entry.state.error.substr(0, entry.state.error.find('\n'))));
  }

  // Ends the worst behind a rung.
  void halve(int64_t rung) {
    const HalvingConfig& halving = *sweep_.halving;
    struct Ranked {
      Entry* entry;
      double value;
    };
    std::vector<Ranked> alive;
    const double sign = halving.metric.ends_with("accuracy") ? -1 : 1;
    for (Entry& entry : entries_) {
      if (entry.state.ended() || entry.steps <= rung) continue;
      const json last = last_metrics(entry.folder);
      if (!last.contains(halving.metric))
        throw Error(ExitCode::kUsage, fmt::format("{}: error: halving.metric: no line of {} has '{}'", sweep_.file.string(), (entry.folder / "metrics.jsonl").string(), halving.metric),
                    halving.metric.starts_with("val_") ? "set validation.interval so that a rung is one of its steps" : "");
      alive.push_back({&entry, last[halving.metric].is_number() ? sign * last[halving.metric].get<double>() : std::numeric_limits<double>::infinity()});
    }
    std::stable_sort(alive.begin(), alive.end(), [](const Ranked& a, const Ranked& b) { return a.value < b.value; });
    const auto keep = std::max<size_t>(1, static_cast<size_t>(std::ceil(static_cast<double>(alive.size()) * halving.keep - 1e-9)));
    for (size_t i = keep; i < alive.size(); ++i) {
      Entry& entry = *alive[i].entry;
      entry.state.state = "stopped";
      entry.state.error = fmt::format("number {} of {} by {} at step {}", i + 1, alive.size(), halving.metric, rung);
      write_trial_state(entry.folder, entry.trial, entry.state);
      tell(entry);
    }
  }

  std::vector<std::string> columns() const {
    std::vector<std::string> keys;
    for (const SweepAxis& axis : sweep_.axes)
      for (const std::string& key : axis.keys)
        if (std::find(keys.begin(), keys.end(), key) == keys.end()) keys.push_back(key);
    for (const Entry& entry : entries_)
      for (const Setting& set : entry.trial.fitted)
        if (std::find(keys.begin(), keys.end(), set.key) == keys.end()) keys.push_back(set.key);
    return keys;
  }

  // A string without its quotes, where they say nothing.
  static std::string plain(const std::string& toml) {
    const bool quoted = toml.size() >= 2 && toml.front() == '"' && toml.back() == '"' && toml.find_first_of("\\\"", 1) == toml.size() - 1;
    return quoted ? toml.substr(1, toml.size() - 2) : toml;
  }

  // A header and a row a trial.
  std::vector<std::vector<std::string>> rows() const {
    const auto keys = columns();
    std::vector<std::vector<std::string>> out{{"trial"}};
    out[0].insert(out[0].end(), keys.begin(), keys.end());
    const std::vector<std::string> figures{"step", "tokens", "loss", "val_loss", "val_accuracy"};
    for (const char* name : {"seed", "state", "params", "match"}) out[0].emplace_back(name);
    out[0].insert(out[0].end(), figures.begin(), figures.end());
    out[0].emplace_back("error");
    for (const Entry& entry : entries_) {
      std::vector<std::string> row{entry.trial.name};
      for (const std::string& key : keys) {
        std::string value;
        for (const auto* list : {&entry.trial.settings, &entry.trial.fitted})  // what is fitted goes over what an axis sets
          for (const Setting& set : *list)
            if (set.key == key) value = plain(set.value);
        row.push_back(value);
      }
      row.push_back(entry.trial.seeded ? std::to_string(entry.trial.seed) : "");
      row.push_back(entry.state.state);
      row.push_back(std::to_string(entry.params));
      row.push_back(entry.trial.match.empty() ? "" : fmt::format("{:+.2f} %", 100 * entry.trial.match_error));
      const json last = last_metrics(entry.folder);
      for (const std::string& key : figures) row.push_back(!last.contains(key) ? "" : last[key].is_number() ? last[key].dump() : "nan");
      row.push_back(entry.state.error.substr(0, entry.state.error.find('\n')));
      out.push_back(std::move(row));
    }
    return out;
  }

  void write_results() const {
    std::string text;
    for (const auto& row : rows()) {
      for (size_t i = 0; i < row.size(); ++i) {
        std::string cell = row[i];
        if (cell.find_first_of(",\"\n") != std::string::npos) {
          std::string quoted = "\"";
          for (const char c : cell) quoted += c == '"' ? "\"\"" : std::string(1, c);
          cell = quoted + "\"";
        }
        text += (i ? "," : "") + cell;
      }
      text += "\n";
    }
    write_file(sweep_.folder / "results.csv", text);
  }

  void print_table() const {
    auto table = rows();
    for (auto& row : table) row.pop_back();  // errors are told, and in the file
    const std::vector<std::string> keys = columns();
    for (size_t i = 0; i < keys.size(); ++i) {
      const std::string last = keys[i].substr(keys[i].rfind('.') + 1);
      if (std::count_if(keys.begin(), keys.end(), [&](const std::string& key) { return key.substr(key.rfind('.') + 1) == last; }) == 1) table[0][i + 1] = last;
    }
    for (size_t r = 1; r < table.size(); ++r)
      for (size_t i = table[r].size() - 3; i < table[r].size(); ++i)
        if (const size_t point = table[r][i].find('.'); point != std::string::npos) table[r][i] = fmt::format("{:.5f}", std::stod(table[r][i]));
    // Columns that say nothing.
    for (size_t i = table[0].size(); i-- > 0;)
      if (std::all_of(table.begin() + 1, table.end(), [&](const auto& row) { return row[i].empty(); }))
        for (auto& row : table) row.erase(row.begin() + static_cast<std::ptrdiff_t>(i));
    std::vector<size_t> widths(table[0].size());
    for (const auto& row : table)
      for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
    for (const auto& row : table) {
      std::string line;
      for (size_t i = 0; i < row.size(); ++i) line += fmt::format("{:<{}}  ", row[i], widths[i]);
      fmt::print("{}\n", line.substr(0, line.find_last_not_of(' ') + 1));
    }
    std::map<std::string, int64_t> machines;
    for (const Entry& entry : entries_)
      if (!entry.state.machine.empty()) ++machines[entry.state.machine];
    if (machines.size() > 1) {
      fmt::print("\ntrials ran on different machines or versions:\n");
      for (const auto& [machine, trials] : machines) fmt::print("  {} trials: {}\n", trials, machine);
    }
  }

  int show() const {
    if (options_.slurm) fmt::print("{}", job());
    else
      for (const Entry& entry : entries_) {
        std::vector<std::string> sets;
        for (const auto* list : {&entry.trial.settings, &entry.trial.fitted})
          for (const Setting& set : *list) sets.push_back(set.text());
        fmt::print("{}  {}  {} parameters  {}{}\n", entry.trial.name, entry.state.state, entry.params, fmt::join(sets, " "),
                   !entry.state.error.empty() ? "  " + entry.state.error.substr(0, entry.state.error.find('\n')) : entry.trial.match.empty() ? "" : "  (" + entry.trial.match + ")");
      }
    return 0;
  }

  std::string job() const {
    const fs::path folder = fs::absolute(sweep_.folder);
    return fmt::format(
        "#!/bin/sh\n#SBATCH --job-name={}\n#SBATCH --array=0-{}%{}\n#SBATCH --ntasks={}\n#SBATCH --output={}/slurm-%a.txt\ncd '{}'\n"
        "exec '{}' sweep '{}' --launcher slurm --trial \"$(sed -n \"$((SLURM_ARRAY_TASK_ID + 1))p\" '{}/trials.txt')\"\n",
        sweep_.folder.filename().string(), entries_.size() - 1, sweep_.config.at_once, sweep_.config.ranks, folder.string(), fs::current_path().string(),
        fs::read_symlink("/proc/self/exe").string(), fs::absolute(sweep_.file).string(), folder.string());
  }

  int submit() const {
    if (sweep_.halving) throw Error(ExitCode::kUsage, fmt::format("{}: error: halving compares trials while they run, which the jobs of an array cannot", sweep_.file.string()), "leave out [halving], or run without --launcher slurm");
    std::string names;
    for (const Entry& entry : entries_) names += entry.trial.name + "\n";
    write_file(sweep_.folder / "trials.txt", names);
    write_file(sweep_.folder / "job.sh", job());
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::execlp("sbatch", "sbatch", (sweep_.folder / "job.sh").c_str(), nullptr);
      ::_exit(127);
    }
    int status = 0;
    if (pid < 0 || ::waitpid(pid, &status, 0) != pid || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
      throw Error(ExitCode::kRuntime, fmt::format("sbatch {} failed", (sweep_.folder / "job.sh").string()), WIFEXITED(status) && WEXITSTATUS(status) == 127 ? "there is no sbatch here: submit the file where Slurm is" : "");
    return 0;
  }

  Sweep sweep_;
  SweepOptions options_;
  std::vector<Entry> entries_;
};

}  // namespace

int run_sweep(const Sweep& sweep, const SweepOptions& options) { return SweepRun(sweep, options).run(); }

}  // namespace tessera
