// Real processes that find each other, work, and end together whatever becomes of one of them.
#include "tests/distributed/ranks.hpp"

namespace tessera {
namespace {

TEST_F(Ranks, MeetAsTorchrunStartsThem) {
  start_all(3, {});
  expect_sums(finish());
}

TEST_F(Ranks, MeetWithVariablesSetByHand) {
  start_by_hand(2, {});
  expect_sums(finish());
}

// The first to be done serves the store: it stays until the others are.
TEST_F(Ranks, RankZeroStaysUntilTheOthersAreDone) {
  start_by_hand(2, {"at=1", "do=late"});
  expect_sums(finish());
}

TEST_F(Ranks, MeetAsSrunStartsThem) {
  for (int64_t rank = 0; rank < 2; ++rank)
    start({{"SLURM_PROCID", std::to_string(rank)}, {"SLURM_LOCALID", std::to_string(rank)}, {"SLURM_NTASKS", "2"}, {"SLURM_JOB_ID", std::to_string(getpid())}, {"SLURM_STEP_ID", "0"}, {"SLURM_JOB_NODELIST", "gpu01"}}, {});
  expect_sums(finish());
}

TEST_F(Ranks, MeetAsMpirunStartsThem) {
  for (int64_t rank = 0; rank < 2; ++rank)
    start({{"OMPI_COMM_WORLD_RANK", std::to_string(rank)}, {"OMPI_COMM_WORLD_SIZE", "2"}, {"OMPI_COMM_WORLD_LOCAL_RANK", std::to_string(rank)}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
           {"PMIX_NAMESPACE", "prterun-node1-" + std::to_string(getpid()) + "@1"}}, {});
  expect_sums(finish());
}

TEST_F(Ranks, OneProcessAloneNeedsNobody) {
  start({}, {});
  expect_sums(finish());
}

TEST_F(Ranks, ThePortIsTaken) {
  uint16_t port = 0;
  const auto other = serve_store(port, false, std::chrono::seconds(10));
  start({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "127.0.0.1"}, {"MASTER_PORT", std::to_string(port)}}, {});
  const Finished end = finish()[0];
  EXPECT_EQ(end.code, 2);
  EXPECT_EQ(end.err, fmt::format("error: MASTER_ADDR=127.0.0.1 MASTER_PORT={0}: rank 0 cannot serve on port {0}: Address already in use\nhelp: choose another MASTER_PORT, the same for every rank\n", port));
}

TEST_F(Ranks, NobodyAnswers) {
  const std::string port = std::to_string(free_port());
  start({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "127.0.0.1"}, {"MASTER_PORT", port}}, {"timeout=1500"});
  const Finished end = finish()[0];
  EXPECT_EQ(end.code, 5);
  EXPECT_TRUE(has(end.err, fmt::format("error: MASTER_ADDR=127.0.0.1 MASTER_PORT={}: rank 1 of 2 reached no store there within 1.5", port))) << end.err;
  EXPECT_TRUE(has(end.err, ": Connection refused\nhelp: start rank 0 too")) << end.err;
}

TEST_F(Ranks, SomeDoNotCome) {
  const std::string port = std::to_string(free_port());
  for (const char* rank : {"0", "2"}) start({{"RANK", rank}, {"WORLD_SIZE", "4"}, {"MASTER_ADDR", "127.0.0.1"}, {"MASTER_PORT", port}}, {"timeout=3000"});
  const auto ends = finish();
  EXPECT_EQ(ends[0].code, 5);
  EXPECT_EQ(ends[1].code, 5);
  EXPECT_TRUE(has(ends[0].err, fmt::format("error: RANK=0 WORLD_SIZE=4: 2 of 4 ranks did not come to MASTER_ADDR=127.0.0.1 MASTER_PORT={} within 3 s: 1, 3\n", port))) << ends[0].err;
}

TEST_F(Ranks, TwoHaveOneNumber) {
  uint16_t port = 0;
  store_ = serve_store(port, true, std::chrono::seconds(60));
  for (int i = 0; i < 2; ++i)
    start({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "127.0.0.1"}, {"MASTER_PORT", std::to_string(port)}, {"TORCHELASTIC_USE_AGENT_STORE", "True"}}, {"timeout=3000"});
  const auto ends = finish();
  const Finished& second = ends[0].code == 2 ? ends[0] : ends[1];
  EXPECT_EQ(ends[0].code + ends[1].code, 7) << "one refuses, the other waits in vain for rank 0";
  EXPECT_TRUE(has(second.err, "error: RANK=1 WORLD_SIZE=2: another process has this rank at ")) << second.err;
}

TEST_F(Ranks, RanksDisagree) {
  start_all(3, {"at=2", "do=config"});
  const auto ends = finish();
  for (const Finished& end : ends) EXPECT_EQ(end.code, 2) << end.err;
  EXPECT_EQ(ends[0].err, fmt::format("error: rank 2 (on host {0}) has training.lr = 2e-3, rank 0 (on host {0}) has 1e-3\nhelp: all ranks need the same build, plugins, configuration and data\n", host_name()));
  EXPECT_EQ(ends[1].err, "");
  EXPECT_EQ(ends[2].err, "");
}

// Its own error is told in full, and once more in one line by the first rank of the machine.
void expect_thrown(const std::vector<Finished>& ends, const std::string& name) {
  for (size_t rank = 0; rank < ends.size(); ++rank) EXPECT_EQ(ends[rank].code, rank == 1 ? 4 : 5) << ends[rank].err;
  EXPECT_EQ(ends[1].err, "rank 1 runs\nerror: out/file: cannot be written: No space left on device\nhelp: free some space\n");
  EXPECT_TRUE(has(ends[0].err, name + " ended: out/file: cannot be written: No space left on device")) << ends[0].err;
  EXPECT_EQ(errors(ends), 2);
}

TEST_F(Ranks, OneThrowsWhileTheOthersWaitForIt) {
  start_all(4, {"at=1", "do=throw", "tp=2"});
  const auto ends = finish();
  expect_thrown(ends, "rank 1 (dp_shard 0, tp 1)");
  EXPECT_TRUE(has(ends[0].err, "error: all_reduce over world (ranks 0, 1, 2, 3) in layers.3 (moe), forward, number 5: rank 1 (dp_shard 0, tp 1) ended: ")) << ends[0].err;
}

TEST_F(Ranks, OneThrowsWhileTheOthersCompute) {
  start_all(3, {"at=1", "do=throw", "others=compute"});
  expect_thrown(finish(), "error: rank 1 (dp_shard 1)");
}

TEST_F(Ranks, OneIsKilledWhileTheOthersWaitForIt) {
  start_all(3, {"at=1", "do=kill"});
  const auto ends = finish();
  EXPECT_EQ(ends[0].code, 5);
  EXPECT_EQ(ends[1].code, 137);
  EXPECT_EQ(ends[2].code, 5);
  EXPECT_TRUE(has(ends[0].err, "number 5: rank 1 (dp_shard 1) gave no sign of life for 3 s: it was killed, or its machine or network is gone")) << ends[0].err;
}

TEST_F(Ranks, OneIsKilledWhileTheOthersCompute) {
  start_all(3, {"at=1", "do=kill", "others=compute"});
  const auto ends = finish();
  EXPECT_EQ(ends[0].code, 5);
  EXPECT_EQ(ends[2].code, 5);
  // Rank 0 noticed it, and is the first of the machine too.
  EXPECT_TRUE(has(ends[0].err, "error: rank 1 (dp_shard 1) gave no sign of life for 10 s: it was killed, or its machine or network is gone")) << ends[0].err;
  EXPECT_EQ(errors(ends), 1);
}

TEST_F(Ranks, OneIsStopped) {
  if (!std::getenv("TESSERA_TEST_ALL")) GTEST_SKIP() << "waits until silence counts: ./tessera test --all";
  start_all(2, {"at=1", "do=stop"});
  const auto ends = finish(/*left=*/1);
  EXPECT_EQ(ends[0].code, 5);
  EXPECT_TRUE(has(ends[0].err, "rank 1 (dp_shard 1) gave no sign of life for ")) << ends[0].err;
}

TEST_F(Ranks, OneHangs) {
  start_all(3, {"at=1", "do=hang", "timeout=2000"});
  const auto ends = finish();
  for (const Finished& end : ends) EXPECT_EQ(end.code, 5);
  EXPECT_TRUE(has(ends[0].err, "error: all_reduce over world (ranks 0, 1, 2) in layers.3 (moe), forward, number 5: ")) << ends[0].err;
  EXPECT_TRUE(has(ends[0].err, "rank 1 (dp_shard 1) has not arrived, it is at all_reduce number 4 over world in layers.3 (moe), forward")) << ends[0].err;
}

// The store goes with rank 0.
TEST_F(Ranks, RankZeroIsKilled) {
  for (const char* others : {"others=wait", "others=compute"}) {
    ranks_.clear();
    start_by_hand(3, {"at=0", "do=kill", others});
    const auto ends = finish();
    EXPECT_EQ(ends[1].code, 5);
    EXPECT_EQ(ends[2].code, 5);
    EXPECT_TRUE(has(ends[1].err, "does not answer any more: rank 0 or the launcher, which served it, has ended")) << ends[1].err;
  }
}

TEST_F(Ranks, RankZeroThrows) {
  start_by_hand(2, {"at=0", "do=throw", "others=compute"});
  const auto ends = finish();
  EXPECT_EQ(ends[0].code, 4);
  EXPECT_EQ(ends[1].code, 5);
  EXPECT_EQ(errors(ends), 1) << ends[1].err;
}

}  // namespace
}  // namespace tessera
