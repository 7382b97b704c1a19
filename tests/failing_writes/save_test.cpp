// Every call of a save that can fail is made to: the error names the file and the reason, the last complete checkpoint stands, nothing else is left.
#include <gtest/gtest.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "checkpoint/saver.hpp"
#include "hf/convert.hpp"
#include "metrics/events.hpp"
#include "metrics/metrics_file.hpp"
#include "tests/failing_writes/failing_writes.hpp"
#include "tests/support/folder.hpp"
#include "tests/support/model.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

constexpr const char* kModel = R"(
[model]
hybrid_override_pattern = "ME"
vocab_size = 24
hidden_size = 16
[blocks.mamba2]
num_heads = 2
head_dim = 4
state_size = 4
num_groups = 1
[blocks.mlp]
intermediate_size = 12
)";

struct Kind {
  int error;
  bool stays, halves;
  const char* help;
};
constexpr const char* kSpace = "free some space on that disk";
constexpr const char* kFolder = "choose a folder that this user may write to";
const Kind kKinds[] = {{ENOSPC, true, false, kSpace}, {ENOSPC, false, true, kSpace}, {EDQUOT, true, false, kSpace}, {EIO, false, false, ""}, {EACCES, false, false, kFolder}, {EROFS, true, false, kFolder}};

// What the error says of a call.
std::string expected(const FailureReport& report, const Kind& kind) {
  const std::string suffix = fmt::format(".tmp-{}", getpid());
  std::string path = report.path, what;
  if (path.ends_with(suffix)) path.resize(path.size() - suffix.size());
  if (report.failed == "open") what = "cannot be created";
  else if (report.failed == "open to read") what = "cannot be opened";
  else if (report.failed == "open folder") what = "folder cannot be opened";
  else if (report.failed == "write") what = "cannot be written";
  else if (report.failed == "flush") what = "cannot be flushed to disk";
  else if (report.failed == "flush folder") what = "folder cannot be flushed to disk";
  else if (report.failed == "rename") what = "cannot be renamed into place";
  else if (report.failed == "mkdir") what = "folder cannot be created";
  const char* help = report.failed == "open to read" ? "" : kind.help;
  return fmt::format("error: {}: {}: {}{}{}", path, what, std::strerror(kind.error), *help ? "\nhelp: " : "", help);
}

class FailingWrites : public FolderTest {
 protected:
  // Runs `work` again and again with its first, second, third, ... call below `below` failing, until none is left. `after` looks at what is there, and
  // clears it for the next; its argument says whether the only thing amiss is that the folder `below` was not flushed. Returns the calls that there are.
  int64_t each_call(const fs::path& below, const Kind& kind, const std::function<void()>& work, const std::function<void(bool unflushed, bool done)>& after) {
    for (int64_t at = 1;; ++at) {
      SCOPED_TRACE(fmt::format("{} at call {}", std::strerror(kind.error), at));
      plan_failure({.below = below.string(), .at = at, .error = kind.error, .stays = kind.stays, .halves = kind.halves, .flushes = false});
      std::string message = "no error";
      try {
        work();
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::kRuntime);
        message = error.what();
      } catch (const std::exception& error) {
        message = fmt::format("not an Error: {}", error.what());
      }
      const FailureReport report = end_of_failures();
      // What could not be closed was flushed before.
      const bool good = report.failed.empty() || report.failed == "close";
      EXPECT_EQ(message, good ? "no error" : expected(report, kind)) << report.failed;
      after(report.path == below.string() && report.failed.ends_with("folder"), good);
      if (HasFailure() || report.failed.empty()) return report.calls;
    }
  }
};

// At once and in the background, each with every other kind of failure; with --all both with every kind.
TEST_F(FailingWrites, OfASaveLeaveTheLastCheckpoint) {
  Built built(kModel);
  Optimizer optimizer(built.store, {.lr = 1e-2});
  const fs::path below = folder_ / "checkpoints", old = below / "step-2", next = below / "step-3";
  for (const bool in_background : {false, true}) {
    fs::remove_all(below);
    Saver saver(built.config, plugins(), built.store, &optimizer, in_background);
    const auto save = [&](const fs::path& to, int64_t step) {
      saver.save(to, {.step = step, .tokens = 58, .data = nullptr, .hf = nullptr, .extra = nullptr});
      saver.finish();
    };
    save(old, 2);
    for (const Kind& kind : kKinds) {
      if (!std::getenv("TESSERA_TEST_ALL") && (&kind - kKinds) % 2 != in_background) continue;
      const int64_t calls = each_call(below, kind, [&] { save(next, 3); }, [&](bool unflushed, bool done) {
        const bool there = fs::exists(next);
        if (!unflushed) {
          EXPECT_EQ(there, done);
        }
        EXPECT_EQ(entries(below), there ? (std::vector<std::string>{"step-2", "step-3"}) : std::vector<std::string>{"step-2"});
        EXPECT_EQ(open_checkpoint(folder_).folder, there ? next : old);
        EXPECT_EQ(open_checkpoint(old).state.step, 2);
        fs::remove_all(next);
      });
      EXPECT_GT(calls, 60);
      if (HasFailure()) return;
    }
  }
}

// Each sharded, so that the index is written too. With --all for every kind of failure.
TEST_F(FailingWrites, OfAConversionLeaveNothing) {
  const fs::path hub = fs::path(TESSERA_SOURCE_DIR) / "tests/golden/dense", ours = folder_ / "ours", work = folder_ / "work", out = work / "out";
  const ConvertOptions options{.max_shard_bytes = 20000};
  convert_to_tessera(hub, ours, plugins(), options);
  fs::create_directory(work);
  const auto nothing_or_all = [&](bool unflushed, bool done) {
    if (!unflushed) {
      EXPECT_EQ(entries(work), done ? std::vector<std::string>{"out"} : std::vector<std::string>{});
    }
    fs::remove_all(out);
  };
  for (const Kind& kind : kKinds) {
    EXPECT_GT(each_call(work, kind, [&] { convert_to_tessera(hub, out, plugins(), options); }, nothing_or_all), 60);
    EXPECT_GT(each_call(work, kind, [&] { convert_to_hf(ours, out, plugins(), options); }, nothing_or_all), 60);
    if (HasFailure() || !std::getenv("TESSERA_TEST_ALL")) return;
  }
}

// A resumed run's file: the lines that are kept are there whatever fails, whole, and a half line is dropped by the next resumption.
TEST_F(FailingWrites, OfMetricsKeepTheLinesBefore) {
  const fs::path below = folder_ / "run", file = below / "metrics.jsonl";
  const std::string kept = "{\"step\":1}\n{\"step\":2}\n";
  for (const Kind& kind : kKinds) {
    put_file(file, kept + "{\"step\":3}\n");
    each_call(below, kind,
              [&] {
                MetricsFile metrics(file, 2);
                metrics.write({{"step", 3}, {"loss", 1}});
                metrics.flush();
              },
              [&](bool, bool done) {
                EXPECT_TRUE(file_text(file).starts_with(kept));
                if (done) {
                  EXPECT_EQ(file_text(file), kept + "{\"loss\":1,\"step\":3}\n");
                }
                EXPECT_EQ(entries(below), std::vector<std::string>{"metrics.jsonl"});
                { MetricsFile again(file, 2); }
                EXPECT_EQ(file_text(file), kept);
                put_file(file, kept + "{\"step\":3}\n");
              });
    if (HasFailure()) return;
  }
}

TEST_F(FailingWrites, OfEventsAreNamed) {
  for (const Kind& kind : kKinds) each_call(folder_, kind, [&] { EventFile(folder_, 2).scalar("loss", 3, 1.0); }, [](bool, bool) {});
}

}  // namespace
}  // namespace tessera
