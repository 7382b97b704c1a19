// Ranks of a launcher: what is told, exit codes, signals, and nothing left behind.
#include "tests/distributed/ranks.hpp"

namespace tessera {
namespace {

class Launcher : public Ranks {
 protected:
  Process& launch(int size, Words words, bool group = false) {
    words.insert(words.begin(), {"launch", std::to_string(size)});
    ranks_.push_back(std::make_unique<Process>(folder_, words, [group] {
      clear_launchers();
      setenv("RANK", "7", 1);  // of a launcher around it: not the ranks'
      setenv("OMP_NUM_THREADS", "1", 1);
      if (group) setpgid(0, 0);
    }, "rank_program"));
    return *ranks_.back();
  }
  Finished run(int size, const Words& words) {
    launch(size, words);
    return finish()[0];
  }
};

TEST_F(Launcher, RanksMeetAndRankZeroSpeaks) {
  const Finished end = run(3, {});
  EXPECT_EQ(end.code, 0) << end.err;
  EXPECT_EQ(end.out, "rank 0 of 3 local 0 of 3: 1\n");
  for (const char* line : {"rank 0 runs\n", "[rank 1] rank 1 runs\n", "[rank 2] rank 2 runs\n"}) EXPECT_TRUE(has(end.err, line)) << end.err;
}

TEST_F(Launcher, OneRankIsOneProcess) {
  const Finished end = run(1, {});
  EXPECT_EQ(end.code, 0) << end.err;
  EXPECT_EQ(end.out, "rank 0 of 1 local 0 of 1: 0\n");
}

TEST_F(Launcher, TheFirstFailureGivesTheExitCodeAndIsTold) {
  for (const char* others : {"others=wait", "others=compute"}) {
    ranks_.clear();
    const Finished end = run(3, {"at=1", "do=throw", others});
    EXPECT_EQ(end.code, 4) << end.err;
    EXPECT_TRUE(has(end.err, "[rank 1] error: out/file: cannot be written: No space left on device\n[rank 1] help: free some space\n")) << end.err;
    EXPECT_FALSE(has(end.err, "[rank 2] error")) << end.err;
  }
}

TEST_F(Launcher, AnErrorOfAllRanksIsToldOnce) {
  const Finished end = run(3, {"at=1", "do=config"});
  EXPECT_EQ(end.code, 2);
  EXPECT_EQ(end.err, fmt::format("error: rank 1 (on host {0}) has training.lr = 2e-3, rank 0 (on host {0}) has 1e-3\nhelp: all ranks need the same build, plugins, configuration and data\n", host_name()));
}

TEST_F(Launcher, AKilledRankEndsTheOthers) {
  const Finished end = run(3, {"at=2", "do=kill", "others=compute"});
  EXPECT_EQ(end.code, 137);
  EXPECT_TRUE(has(end.err, "error: rank 2 was ended by signal 9 (Killed)\nhelp: ")) << end.err;
}

TEST_F(Launcher, ARankThatExitsEndsTheOthers) {
  const Finished end = run(2, {"at=1", "do=exit", "others=compute"});
  EXPECT_EQ(end.code, 3) << end.err;
}

// A stopped rank does not end by itself, nor by SIGTERM.
TEST_F(Launcher, AStoppedRankIsKilledInTheEnd) {
  if (!std::getenv("TESSERA_TEST_ALL")) GTEST_SKIP() << "waits for every grace: ./tessera test --all";
  const Finished end = run(2, {"at=1", "do=stop"});
  EXPECT_EQ(end.code, 5) << end.err;
  EXPECT_TRUE(has(end.err, "rank 1 (dp_shard 1) gave no sign of life for ")) << end.err;
}

// As a terminal does: the signal goes to the launcher's whole process group. A second one would kill a rank.
TEST_F(Launcher, ASignalReachesEveryRankOnce) {
  for (const auto& [signal, code] : {std::pair{SIGINT, 130}, {SIGTERM, 143}}) {
    ranks_.clear();
    Process& process = launch(2, {"rounds=100000", "pause=20"}, /*group=*/true);
    ASSERT_TRUE(process.wait_until([&] { return has(process.err(), "rank 0 runs") && has(process.err(), "rank 1 runs"); }));
    kill(-process.pid(), signal);
    const Finished end = finish()[0];
    EXPECT_EQ(end.code, code) << end.err;
    EXPECT_TRUE(has(end.err, "rank 0 stops") || has(end.err, "rank 1 stops")) << end.err;
    EXPECT_FALSE(has(end.err, "was ended by")) << end.err;
  }
}

TEST_F(Launcher, RanksDieWithIt) {
  Process& process = launch(3, {"rounds=100000", "pause=20"});
  ASSERT_TRUE(process.wait_until([&] { return has(process.err(), "rank 2 runs"); }));
  EXPECT_EQ(alive(), 4);
  process.signal(SIGKILL);
  EXPECT_EQ(process.wait().code, 137);
  for (int i = 0; i < 2000 && alive() > 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
}

}  // namespace
}  // namespace tessera
