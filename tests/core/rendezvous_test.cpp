// What the environment says of a rank: the launchers' variables, and every contradiction.
#include <gtest/gtest.h>

#include <map>

#include "parallel/environment.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {

using Settings = std::map<std::string, std::string>;

Started read(const Settings& variables) {
  return read_start([&](const std::string& name) { return variables.count(name) ? std::optional(variables.at(name)) : std::nullopt; });
}
std::string refusal(const Settings& variables) {
  try {
    read(variables);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    return error.message();
  }
  return "accepted";
}

TEST(Environment, NothingIsAWorldOfOne) {
  const Started start = read({});
  EXPECT_EQ(start.rank, 0);
  EXPECT_EQ(start.size, 1);
  // A batch script itself is not a step of its job.
  EXPECT_EQ(read({{"ENVIRONMENT", "BATCH"}, {"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "8"}, {"SLURM_JOB_NODELIST", "a[1-2]"}}).size, 1);
  EXPECT_EQ(read({{"RANK", "0"}, {"WORLD_SIZE", "1"}}).size, 1);
}

TEST(Environment, Torchrun) {
  const Settings variables{{"RANK", "3"}, {"WORLD_SIZE", "4"}, {"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "2"}, {"MASTER_ADDR", "node1"}, {"MASTER_PORT", "29500"}, {"TORCHELASTIC_USE_AGENT_STORE", "True"},
                             {"TORCHELASTIC_RUN_ID", "job"}, {"TORCHELASTIC_RESTART_COUNT", "2"}, {"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "2"}};
  const Started start = read(variables);
  EXPECT_EQ(start.rank, 3);
  EXPECT_EQ(start.size, 4);
  EXPECT_EQ(start.local_rank, 1);
  EXPECT_EQ(start.local_size, 2);
  EXPECT_EQ(start.host, "node1");
  EXPECT_EQ(start.port, 29500);
  EXPECT_FALSE(start.serves);
  EXPECT_EQ(start.attempt, "job/2");
  // The agent serves rank 0 too; by hand rank 0 does.
  Settings first = variables;
  first["RANK"] = "0";
  EXPECT_FALSE(read(first).serves);
  first.erase("TORCHELASTIC_USE_AGENT_STORE");
  EXPECT_TRUE(read(first).serves);
}

TEST(Environment, Srun) {
  Settings variables{{"SLURM_PROCID", "5"}, {"SLURM_LOCALID", "1"}, {"SLURM_NTASKS", "8"}, {"SLURM_JOB_ID", "123456"}, {"SLURM_STEP_ID", "1"}, {"SLURM_JOB_NODELIST", "gpu[01-03,7],login-2"}, {"ENVIRONMENT", "BATCH"}};
  Started start = read(variables);
  EXPECT_EQ(start.rank, 5);
  EXPECT_EQ(start.size, 8);
  EXPECT_EQ(start.local_rank, 1);
  EXPECT_EQ(start.local_size, -1);
  EXPECT_EQ(start.host, "gpu01");
  EXPECT_EQ(start.port, 20000 + 3457);
  EXPECT_FALSE(start.serves);
  // The step's own numbers go first; MASTER_ADDR goes before what is derived.
  variables["SLURM_STEP_NUM_TASKS"] = "6", variables["SLURM_STEP_NODELIST"] = "b7,b8", variables["SLURM_PROCID"] = "0";
  start = read(variables);
  EXPECT_EQ(start.size, 6);
  EXPECT_EQ(start.host, "b7");
  EXPECT_TRUE(start.serves);
  variables["MASTER_ADDR"] = "other", variables["MASTER_PORT"] = "1234";
  EXPECT_EQ(read(variables).host, "other");
  EXPECT_EQ(read(variables).port, 1234);
}

TEST(Environment, Mpirun) {
  Settings variables{{"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "4"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "1"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}, {"PMIX_NAMESPACE", "prterun-big-node-77@1"}};
  Started start = read(variables);
  EXPECT_EQ(start.rank, 1);
  EXPECT_EQ(start.local_size, 4);
  EXPECT_EQ(start.host, "127.0.0.1");
  const int64_t port = start.port;
  EXPECT_GE(port, 20000);
  EXPECT_LT(port, 30000);
  variables["OMPI_COMM_WORLD_LOCAL_SIZE"] = "2";
  EXPECT_EQ(read(variables).host, "big-node");
  EXPECT_EQ(read(variables).port, port);
  variables["PMIX_NAMESPACE"] = "2743599105", variables["OMPI_MCA_orte_hnp_uri"] = "2743599104.0;tcp://192.168.1.5,10.0.0.5:39181";
  EXPECT_EQ(read(variables).host, "192.168.1.5");
  EXPECT_NE(read(variables).port, port) << "another job";
  variables.erase("OMPI_MCA_orte_hnp_uri");
  EXPECT_EQ(refusal(variables), "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4: the ranks are on several machines, and MASTER_ADDR, the machine of rank 0, is not set");
}

TEST(Environment, ContradictionsAreRefused) {
  const Settings good{{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "1234"}};
  const auto with = [&](const std::string& name, const std::string& value) {
    Settings changed = good;
    if (value.empty()) changed.erase(name);
    else changed[name] = value;
    return refusal(changed);
  };
  EXPECT_EQ(refusal(good), "accepted");
  EXPECT_EQ(with("RANK", "3"), "RANK=3: must be below WORLD_SIZE=2");
  EXPECT_EQ(with("RANK", "-1"), "RANK=-1: must be an integer in [0, 1048576]");
  EXPECT_EQ(with("RANK", "1x"), "RANK=1x: must be an integer in [0, 1048576]");
  EXPECT_EQ(with("RANK", ""), "WORLD_SIZE=2 is set, but RANK is not");
  EXPECT_EQ(with("WORLD_SIZE", ""), "RANK=1 is set, but WORLD_SIZE is not");
  EXPECT_EQ(with("WORLD_SIZE", "0"), "WORLD_SIZE=0: must be an integer in [1, 1048576]");
  EXPECT_EQ(with("WORLD_SIZE", "99999999999999999999"), "WORLD_SIZE=99999999999999999999: must be an integer in [1, 1048576]");
  EXPECT_EQ(with("MASTER_PORT", "abc"), "MASTER_PORT=abc: must be an integer in [1, 65535]");
  EXPECT_EQ(with("MASTER_PORT", "65536"), "MASTER_PORT=65536: must be an integer in [1, 65535]");
  EXPECT_EQ(with("MASTER_PORT", ""), "RANK=1 WORLD_SIZE=2 needs MASTER_PORT, a free port on the machine of rank 0, and it is not set");
  EXPECT_EQ(with("MASTER_ADDR", ""), "RANK=1 WORLD_SIZE=2 needs MASTER_ADDR, the machine of rank 0, and it is not set");
  EXPECT_EQ(with("LOCAL_RANK", "x"), "LOCAL_RANK=x: must be an integer in [0, 1048576]");
  EXPECT_EQ(with("LOCAL_WORLD_SIZE", "2"), "LOCAL_WORLD_SIZE=2 is set, but LOCAL_RANK is not");
  EXPECT_EQ(with("TORCHELASTIC_USE_AGENT_STORE", "yes"), "TORCHELASTIC_USE_AGENT_STORE=yes: must be True or False");
  Settings local = good;
  local["LOCAL_RANK"] = "2", local["LOCAL_WORLD_SIZE"] = "2";
  EXPECT_EQ(refusal(local), "LOCAL_RANK=2: must be below LOCAL_WORLD_SIZE=2");
  local["LOCAL_WORLD_SIZE"] = "3";
  EXPECT_EQ(refusal(local), "LOCAL_WORLD_SIZE=3: must be at most the number of ranks, 2");

  const Settings slurm{{"SLURM_PROCID", "1"}, {"SLURM_NTASKS", "2"}};
  EXPECT_EQ(refusal(slurm), "SLURM_PROCID=1 SLURM_NTASKS=2: neither SLURM_JOB_NODELIST nor MASTER_ADDR is set");
  Settings list = slurm;
  list["SLURM_JOB_NODELIST"] = "gpu[01-";
  EXPECT_EQ(refusal(list), "SLURM_JOB_NODELIST=gpu[01-: no list of hosts such as gpu[01-03,7],login-2");
  list["SLURM_PROCID"] = "2";
  EXPECT_EQ(refusal(list), "SLURM_PROCID=2: must be below SLURM_NTASKS=2");
}

TEST(Environment, FirstHostOfAList) {
  for (const auto& [list, host, more] : {std::tuple{"gpu01", "gpu01", false}, {"gpu[01-03,7],login-2", "gpu01", true}, {"login-2,gpu[01-03]", "login-2", true}, {"rack[1-2]node[003,005-7].x.org", "rack1node003.x.org", true},
                                         {"n[7]", "n7", false}, {"n[08-10]", "n08", true}, {"", "", false}, {"n[", "", false}, {"n[]", "", false}, {"n[a-b]", "", false}, {"a b", "", false}}) {
    bool several = false;
    EXPECT_EQ(first_host(list, &several), host) << list;
    if (*host) { EXPECT_EQ(several, more) << list; }
  }
}

}  // namespace
}  // namespace tessera
