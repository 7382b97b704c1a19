// What the environment says of this process among others: torchrun, `tessera launch` or the same variables set by hand; Slurm's srun; OpenMPI's mpirun.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace tessera {

struct Started {
  int64_t rank = 0, size = 1;
  int64_t local_rank = -1, local_size = -1;  // on this machine; -1: not said
  std::string host;                          // where the store is served; "" in a world of one
  int64_t port = 0;
  bool serves = false;                       // this process serves it
  std::string attempt = "run/0";             // tells apart the restarts that share a store
  std::string rank_from, address_from;       // "RANK=3", "MASTER_ADDR=node1 MASTER_PORT=29500": what an error names
};

using Variables = std::function<std::optional<std::string>(const std::string& name)>;
// This process's own; one that is empty counts as not set.
std::optional<std::string> environment_variable(const std::string& name);

// The first of these that is there: RANK and WORLD_SIZE; OMPI_COMM_WORLD_RANK; SLURM_PROCID (not in a batch script itself, which runs once). None: a world
// of one. MASTER_ADDR and MASTER_PORT go before addresses and ports that are derived: Slurm's first host and job id, mpirun's host and job.
// Throws Error(kUsage) with the variable and its value where one is missing, malformed, or contradicts another.
Started read_start(const Variables& variable = environment_variable);

// "gpu[01-03,7],login-2" -> "gpu01". "" where it cannot be read. `several`: whether it names more than one.
std::string first_host(const std::string& nodelist, bool* several = nullptr);

}  // namespace tessera
