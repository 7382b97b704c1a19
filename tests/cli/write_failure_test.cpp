// The command where its files cannot be written: every call of a run fails once, and whole disks are full or read-only. The error says what, where and
// why, the last complete checkpoint stands, and the run goes on when it can write again.
#include <gtest/gtest.h>
#include <sys/mount.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>

#include "checkpoint/checkpoint.hpp"
#include "tests/support/failing.hpp"
#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

struct Kind {
  int error;
  bool stays, halves;
};
const Kind kKinds[] = {{ENOSPC, true, false}, {EIO, false, false}, {ENOSPC, false, true}, {EACCES, false, false}, {EDQUOT, true, false}};

const char* help_of(int error) {
  if (error == ENOSPC || error == EDQUOT) return "free some space on that disk";
  return error == EACCES || error == EROFS ? "choose a folder that this user may write to" : "";
}

// One line of the library's log.
struct Call {
  int64_t number = 0;
  bool failed = false;
  std::string name, path;
};

class WriteFailure : public TinyRunTest {
 protected:
  std::vector<Call> calls(const fs::path& log) const {
    std::vector<Call> all;
    std::ifstream file(log);
    for (std::string line; std::getline(file, line);) {
      Call call{.number = std::atoll(line.c_str()), .failed = line.find("! ") < line.find(' ')};
      const size_t begin = line.find(' ') + 1, path = line.find('/');
      call.name = line.substr(begin, path - 1 - begin), call.path = line.substr(path);
      all.push_back(call);
    }
    return all;
  }

  // What the error says of a call that failed in the process `pid`: "run/metrics.jsonl: cannot be written: No space left on device".
  std::string said(const Call& call, int error) const {
    std::string path = fs::path(call.path).lexically_relative(folder_).string();
    if (call.name == "open" || call.name == "write" || call.name == "flush")
      if (const size_t at = path.rfind(".tmp-"); at != std::string::npos && path.find('/', at) == std::string::npos) path.resize(at);
    const char* what = call.name == "open"           ? "cannot be created"
                       : call.name == "open to read" ? "cannot be opened"
                       : call.name == "open folder"  ? "folder cannot be opened"
                       : call.name == "write"        ? "cannot be written"
                       : call.name == "flush"        ? "cannot be flushed to disk"
                       : call.name == "flush folder" ? "folder cannot be flushed to disk"
                       : call.name == "rename"       ? "cannot be renamed into place"
                                                     : "folder cannot be created";
    return fmt::format("{}: {}: {}", path, what, std::strerror(error));
  }
  static std::string with_help(const std::string& error, const std::string& help) { return "error: " + error + "\n" + (help.empty() ? "" : "help: " + help + "\n"); }

  std::string newest(const std::string& run) const {
    const auto complete = list_checkpoints(folder_ / run / "checkpoints");
    return complete.empty() ? "" : run + "/checkpoints/" + complete.back().filename().string();
  }

  // A run of few tensors that goes on from step 2 to 3, saves and removes an old checkpoint.
  void SetUp() override {
    TinyRunTest::SetUp();
    auto two = kSmall;
    two[0] = "training.steps=2";
    ASSERT_EQ(train("base", two).code, 0);
    ASSERT_EQ(train("whole", kSmall).code, 0);
  }
  Finished go_on(const FailurePlan& plan) const {
    auto sets = kSmall;
    sets.push_back("run.folder=run");
    return tessera(with_sets({"train", "tiny.toml", "--resume", "--quiet"}, sets), {}, failing(plan));
  }
  void start_again() const {
    fs::remove_all(folder_ / "run");
    fs::copy(folder_ / "base", folder_ / "run", fs::copy_options::recursive);
    fs::remove(folder_ / "log");
  }

  // The call `at` fails: the run ends with an error that says so, and goes on when it no longer does.
  void fail_and_go_on(int64_t at, const Kind& kind, std::map<std::string, int>& seen) {
    SCOPED_TRACE(fmt::format("{} at call {}", std::strerror(kind.error), at));
    start_again();
    const Finished end = go_on({.below = (folder_ / "run").string(), .at = at, .error = kind.error, .stays = kind.stays, .halves = kind.halves, .log = (folder_ / "log").string()});
    Call failed;
    for (const Call& call : calls(folder_ / "log"))
      if (call.failed && !failed.failed) failed = call;
    // The last call closes a file, which a full disk does not hinder.
    if (!failed.failed) {
      EXPECT_TRUE(kind.stays && calls(folder_ / "log").back().name == "close") << "nothing failed";
      EXPECT_EQ(end.code, 0) << end.err;
      return expect_same_run("run", "whole", 3);
    }
    ++seen[failed.name];
    const std::string name = fs::path(failed.path).filename().string();
    // What cannot be closed was flushed before; a checkpoint that cannot be removed is no reason to end a run.
    const bool harmless = failed.name == "close" || (failed.name == "rename" && name.starts_with(".saving-removed-"));
    EXPECT_EQ(end.out, "");
    if (harmless) {
      EXPECT_EQ(end.code, 0) << end.err;
      EXPECT_EQ(end.err, "");
    } else {
      const std::string what = said(failed, kind.error), help = failed.name == "open to read" ? "" : help_of(kind.error);
      const std::string stands = fmt::format("the last complete checkpoint is {}, and --resume goes on from it", newest("run"));
      const std::string early = with_help(what, help), late = with_help("step 3: " + what, help + (help.empty() ? "" : "; ") + stands);
      EXPECT_EQ(end.code, 4);
      EXPECT_TRUE(end.err == late || (end.err == early && failed.path.find("/.saving-") == std::string::npos)) << end.err << "and not\n" << late;
    }
    // No process but the tests' own wrote what is left, and nothing of it is half.
    for (const std::string& entry : entries(folder_ / "run/checkpoints"))
      if (!entry.starts_with(".saving-removed-")) {
        EXPECT_TRUE(entry == "step-1" || entry == "step-2" || entry == "step-3") << entry;
        EXPECT_NO_THROW(open_checkpoint(folder_ / "run/checkpoints" / entry)) << entry;
      }
    EXPECT_FALSE(newest("run").empty());
    const Finished on = train("run", kSmall, /*resume=*/true);
    ASSERT_EQ(on.code, 0) << on.err;
    expect_same_run("run", "whole", 3);
  }

  inline static const std::vector<std::string> kSmall{"training.steps=3", "model.hybrid_override_pattern=E", "checkpoint.interval=1", "checkpoint.keep_latest_k=2", "metrics.tensorboard=true", "validation.interval=0"};
};

// One of each kind of call on each file; all of them with --all.
TEST_F(WriteFailure, ARunEndsAndGoesOnWhenItCanWriteAgain) {
  start_again();
  ASSERT_EQ(go_on({.below = (folder_ / "run").string(), .log = (folder_ / "log").string()}).code, 0);
  const std::vector<Call> all = calls(folder_ / "log");
  ASSERT_GT(all.size(), 60u);
  const bool each = std::getenv("TESSERA_TEST_ALL");
  const std::set<std::pair<std::string, std::string>> few{
      {"write", "config.toml"}, {"write", "metrics.jsonl"}, {"mkdir", ".saving-step-3"}, {"write", "optimizer.safetensors"}, {"flush", "model.safetensors"}, {"flush folder", ".saving-step-3"}, {"rename", "step-3"}};
  std::map<std::string, int> seen;
  size_t kind = 0;
  std::set<std::pair<std::string, std::string>> done;
  for (const Call& call : all) {
    std::string name = fs::path(call.path).filename().string();
    if (const size_t at = name.find(".tmp-"); at != std::string::npos) name.resize(at);
    if (name.starts_with(".saving-step-")) name.resize(name.rfind('-'));
    if (!each && (!few.contains({call.name, name}) || !done.insert({call.name, name}).second)) continue;
    fail_and_go_on(call.number, kKinds[kind++ % std::size(kKinds)], seen);
    if (HasFatalFailure() || HasFailure()) return;
  }
  EXPECT_GE(kind, few.size());
  std::string counts;
  for (const auto& [name, count] : seen) counts += fmt::format(" {} {},", count, name);
  fmt::print("{} of {} calls failed once:{}\n", kind, all.size(), counts);
}

// The run ends at a later step, with the error that it would have ended with at once.
TEST_F(WriteFailure, ASaveInTheBackgroundEndsARunTheSame) {
  auto sets = kSmall;
  sets.insert(sets.end(), {"training.steps=1000000", "checkpoint.interval=2", "checkpoint.async_mode=async", "run.folder=run"});
  const std::string checkpoints = (folder_ / "run/checkpoints").string();
  const auto is_of_the_second = [&](const Call& call) { return call.name == "write" && call.path.find("/.saving-step-4-") != std::string::npos && call.path.ends_with("/optimizer.safetensors"); };
  int64_t at = 0;
  {
    Process process(folder_, with_sets({"train", "tiny.toml", "--quiet"}, sets), failing({.below = checkpoints, .log = (folder_ / "log").string()}));
    ASSERT_TRUE(process.wait_until([&] { return !newest("run").empty() && newest("run") != "run/checkpoints/step-2"; }));
    process.signal(SIGKILL), process.wait();
  }
  for (const Call& call : calls(folder_ / "log"))
    if (at == 0 && is_of_the_second(call)) at = call.number;
  ASSERT_GT(at, 0);
  for (const Kind& kind : kKinds) {
    fs::remove_all(folder_ / "run"), fs::remove(folder_ / "log");
    const Finished end = tessera(with_sets({"train", "tiny.toml", "--quiet"}, sets), {},
                                 failing({.below = checkpoints, .at = at, .error = kind.error, .stays = kind.stays, .halves = kind.halves, .log = (folder_ / "log").string()}));
    Call failed;
    for (const Call& call : calls(folder_ / "log"))
      if (call.failed && !failed.failed) failed = call;
    EXPECT_TRUE(is_of_the_second(failed)) << failed.path;
    const std::string help = help_of(kind.error);
    EXPECT_EQ(end.code, 4);
    EXPECT_EQ(end.err, with_help("step 4: " + said(failed, kind.error), help + (help.empty() ? "" : "; ") + "the last complete checkpoint is run/checkpoints/step-2, and --resume goes on from it"));
    EXPECT_EQ(entries(checkpoints), std::vector<std::string>{"step-2"});
    EXPECT_GE(metrics("run").size(), 4u);
  }
  const Finished on = tessera(with_sets({"train", "tiny.toml", "--quiet", "--resume"}, sets), {"training.steps=5"});
  EXPECT_EQ(on.code, 0) << on.err;
  EXPECT_EQ(newest("run"), "run/checkpoints/step-5");
}

// Two processes write a checkpoint together, and the disk is full from some call of either on: each forty-fifth call, all of them with --all.
TEST_F(WriteFailure, ProcessesTogetherEndAndGoOnWhenTheyCanWriteAgain) {
  auto sets = kSmall;
  sets.insert(sets.end(), {"metrics.tensorboard=false", "training.num_threads=1"});
  const auto launch = [&](const std::string& run, const std::vector<std::string>& more, bool resume, const std::function<void()>& prepare = {}) {
    std::vector<std::string> words{"launch", "-n", "2", "train", "tiny.toml", "--quiet"}, all = sets;
    if (resume) words.emplace_back("--resume");
    all.insert(all.end(), more.begin(), more.end());
    all.push_back("run.folder=" + run);
    return tessera(with_sets(words, all), {}, prepare);
  };
  ASSERT_EQ(launch("base2", {"training.steps=2"}, false).code, 0);
  ASSERT_EQ(launch("whole2", {}, false).code, 0);
  const int64_t stride = std::getenv("TESSERA_TEST_ALL") ? 1 : 45;
  int64_t at = 1;
  for (;; at += stride) {
    SCOPED_TRACE(at);
    fs::remove_all(folder_ / "run"), fs::remove(folder_ / "log");
    fs::copy(folder_ / "base2", folder_ / "run", fs::copy_options::recursive);
    const Finished end = launch("run", {}, true, failing({.below = (folder_ / "run").string(), .at = at, .error = ENOSPC, .stays = true, .log = (folder_ / "log").string()}));
    const std::vector<Call> all = calls(folder_ / "log");
    if (std::none_of(all.begin(), all.end(), [](const Call& call) { return call.failed; })) {
      EXPECT_EQ(end.code, 0) << end.err;
      break;
    }
    EXPECT_EQ(end.code, 4) << end.err;
    EXPECT_NE(end.err.find("No space left on device\nhelp: free some space on that disk"), std::string::npos) << end.err;
    for (const std::string& entry : entries(folder_ / "run/checkpoints"))
      if (!entry.starts_with(".saving-")) {
        EXPECT_NO_THROW(open_checkpoint(folder_ / "run/checkpoints" / entry)) << entry;
      }
    EXPECT_FALSE(newest("run").empty());
    const Finished on = launch("run", {}, true);
    ASSERT_EQ(on.code, 0) << on.err;
    EXPECT_EQ(newest("run"), "run/checkpoints/step-3");
    const auto got = metrics("run"), want = metrics("whole2");
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < want.size(); ++i)
      for (const char* key : {"step", "loss", "grad_norm"}) EXPECT_EQ(got[i][key], want[i][key]) << key << " of step " << i + 1;
    for (const char* name : {"model.safetensors", "optimizer.safetensors"})
      EXPECT_TRUE(file_text(folder_ / "run/checkpoints/step-3" / name) == file_text(folder_ / "whole2/checkpoints/step-3" / name)) << name;
    if (HasFailure()) return;
  }
  EXPECT_GT(at, 30);
}

// Each ninth call; all of them with --all.
TEST_F(WriteFailure, ANewPluginIsWholeOrAbsent) {
  const fs::path below = folder_ / "blocks", log = folder_ / "log";
  const int64_t stride = std::getenv("TESSERA_TEST_ALL") ? 1 : 9;
  int64_t at = 1;
  for (;; at += stride) {
    SCOPED_TRACE(at);
    fs::remove_all(below), fs::remove(log);
    fs::create_directory(below);
    const Finished end = tessera({"new-plugin", "gated", "--symbol", "G", "--folder", "blocks"}, {}, failing({.below = below.string(), .at = at, .error = ENOSPC, .stays = true, .log = log.string()}));
    const std::vector<Call> all = calls(log);
    const auto failed = std::find_if(all.begin(), all.end(), [](const Call& call) { return call.failed; });
    if (failed == all.end()) {
      EXPECT_EQ(end.code, 0) << end.err;
      EXPECT_EQ(entries(below / "gated").size(), 5u);
      break;
    }
    std::string error = end.err;
    if (const size_t here = error.find(folder_.string() + "/"); here != std::string::npos) error.erase(here, folder_.string().size() + 1);
    EXPECT_EQ(end.code, 4);
    EXPECT_EQ(error, with_help(said(*failed, ENOSPC), help_of(ENOSPC)));
    if (failed->path != below.string()) {
      EXPECT_EQ(entries(below), std::vector<std::string>{});
    }
  }
  EXPECT_GT(at, 30);
}

// A folder on a disk of its own, where the test may mount one.
class OnADisk : public WriteFailure {
 protected:
  void SetUp() override {
    WriteFailure::SetUp();
    if (HasFatalFailure()) return;
    fs::create_directory(folder_ / "disk");
    if (mount("tmpfs", (folder_ / "disk").c_str(), "tmpfs", 0, "size=1m") != 0) GTEST_SKIP() << "a disk cannot be mounted here: " << std::strerror(errno);
    mounted_ = true;
  }
  void TearDown() override {
    if (mounted_) umount2((folder_ / "disk").c_str(), MNT_DETACH);
  }
  void remount(unsigned long flags, const char* options) const { ASSERT_EQ(mount("tmpfs", (folder_ / "disk").c_str(), "tmpfs", MS_REMOUNT | flags, options), 0) << std::strerror(errno); }
  void fill() const {
    std::ofstream file(folder_ / "disk/ballast", std::ios::binary);
    const std::string block(4096, 'x');
    while (file.write(block.data(), static_cast<std::streamsize>(block.size())).flush()) {}
  }
  bool mounted_ = false;
};

TEST_F(OnADisk, AFullOneEndsARun) {
  auto sets = kSmall;
  sets.insert(sets.end(), {"training.steps=20", "checkpoint.keep_latest_k=0"});
  ASSERT_EQ(train("all", sets).code, 0);
  const Finished end = train("disk/run", sets);
  ASSERT_EQ(end.code, 4) << end.err;
  const std::string last = newest("disk/run");
  ASSERT_FALSE(last.empty());
  EXPECT_NE(end.err.find(": No space left on device\nhelp: free some space on that disk; the last complete checkpoint is " + last + ", and --resume goes on from it\n"), std::string::npos) << end.err;
  for (const std::string& name : entries(folder_ / "disk/run/checkpoints")) EXPECT_NO_THROW(open_checkpoint(folder_ / "disk/run/checkpoints" / name)) << name;
  // It is still full.
  fill();
  const Finished still = train("disk/run", sets, /*resume=*/true);
  EXPECT_EQ(still.code, 4);
  EXPECT_EQ(still.err.substr(still.err.rfind("error: ")), "error: disk/run/config.toml: cannot be written: No space left on device\nhelp: free some space on that disk\n");
  EXPECT_EQ(newest("disk/run"), last);
  EXPECT_EQ(tessera({"eval", "disk/run"}).code, 0);
  remount(0, "size=64m");
  const Finished on = train("disk/run", sets, /*resume=*/true);
  ASSERT_EQ(on.code, 0) << on.err;
  expect_same_run("disk/run", "all", 20);
}

TEST_F(OnADisk, AFullOneTakesNoConversionAndNoPlugin) {
  fill();
  const auto refused = [&](const std::vector<std::string>& words, const char* where) {
    const Finished end = tessera(words);
    EXPECT_EQ(end.code, 4);
    EXPECT_EQ(end.out, "");
    EXPECT_EQ(end.err.find("error: "), 0u) << end.err;
    EXPECT_NE(end.err.find(where), std::string::npos) << end.err;
    EXPECT_TRUE(end.err.ends_with(": No space left on device\nhelp: free some space on that disk\n")) << end.err;
    EXPECT_EQ(entries(folder_ / "disk"), std::vector<std::string>{"ballast"});
  };
  const std::string golden = std::string(TESSERA_SOURCE_DIR) + "/tests/golden/dense";
  ASSERT_EQ(tessera({"convert", golden, "ours", "--to", "tessera"}).code, 0);
  refused({"convert", golden, "disk/ours", "--to", "tessera"}, "model.safetensors: cannot be written");
  refused({"convert", "ours", "disk/hub", "--to", "hf"}, "model.safetensors: cannot be written");
  refused({"new-plugin", "gated", "--symbol", "G", "--folder", "disk"}, "gated.cpp: cannot be written");
  refused({"new-plugin", "gated", "--symbol", "G", "--in-tree", "--folder", "disk"}, "disk/gated.cpp: cannot be written");
}

TEST_F(OnADisk, AReadOnlyOneIsReadAndNotWritten) {
  fs::copy(folder_ / "base", folder_ / "disk/run", fs::copy_options::recursive);
  remount(MS_RDONLY, "size=1m");
  constexpr const char* kWhy = ": Read-only file system\nhelp: choose a folder that this user may write to\n";
  const Finished on = train("disk/run", kSmall, /*resume=*/true);
  EXPECT_EQ(on.code, 4);
  EXPECT_EQ(on.err.substr(on.err.rfind("error: ")), std::string("error: disk/run/config.toml: cannot be created") + kWhy);
  const Finished other = train("disk/other", kSmall);
  EXPECT_EQ(other.code, 4);
  EXPECT_EQ(other.err, std::string("error: disk/other: folder cannot be created") + kWhy);
  EXPECT_EQ(tessera({"eval", "disk/run"}).code, 0);
  EXPECT_EQ(tessera({"generate", "disk/run", "--prompt", "a", "--max-new-tokens", "1"}).code, 0);
  auto two = kSmall;
  two[0] = "training.steps=2";
  EXPECT_EQ(train("disk/run", two, /*resume=*/true).code, 0) << "a finished run has nothing to write";
  const Finished plugin = tessera({"new-plugin", "gated", "--symbol", "G", "--folder", "disk"});
  EXPECT_EQ(plugin.code, 4);
  EXPECT_NE(plugin.err.find(std::string(": folder cannot be created") + kWhy), std::string::npos) << plugin.err;
}

// Two processes would remove each other's half-written checkpoints and mix their metrics.
TEST_F(TinyRunTest, ARunIsTrainedByOneProcess) {
  Process process(folder_, with_sets({"train", "tiny.toml"}, {"run.folder=run", "training.steps=100000"}));
  ASSERT_TRUE(process.wait_until([&] { return !metrics("run").empty(); }));
  const Finished other = train("run", {}, /*resume=*/true);
  EXPECT_EQ(other.code, 4);
  EXPECT_EQ(other.err, "error: run: another process is training there\nhelp: wait until it ends, or choose another [run] folder or name\n");
  EXPECT_TRUE(process.running());
}

}  // namespace
}  // namespace tessera
