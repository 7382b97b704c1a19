#include "parallel/environment.hpp"

#include <fmt/format.h>

#include <cctype>
#include <charconv>
#include <cstdlib>

#include "tessera/error.hpp"

namespace tessera {

namespace {

constexpr int64_t kMostRanks = 1 << 20;
constexpr int64_t kFirstPort = 20000, kNumPorts = 10000;  // below the ports that Linux gives to clients
constexpr const char* kHelp = "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set together, by a launcher or by hand; `unset RANK WORLD_SIZE` runs one process";

[[noreturn]] void refuse(const std::string& message, const std::string& help = kHelp) { throw Error(ExitCode::kUsage, message, help); }

struct Reader {
  const Variables& variable;

  std::optional<int64_t> number(const std::string& name, int64_t least, int64_t most) const {
    const auto text = variable(name);
    if (!text) return {};
    int64_t value = 0;
    const char* last = text->data() + text->size();
    if (auto [stop, error] = std::from_chars(text->data(), last, value); error != std::errc() || stop != last || value < least || value > most)
      refuse(fmt::format("{}={}: must be an integer in [{}, {}]", name, *text, least, most));
    return value;
  }

  // Rank and size, of the world or of this machine.
  std::pair<int64_t, int64_t> pair(const std::string& rank_name, const std::string& size_name) const {
    const auto rank = number(rank_name, 0, kMostRanks), size = number(size_name, 1, kMostRanks);
    if (rank && !size) refuse(fmt::format("{}={} is set, but {} is not", rank_name, *rank, size_name));
    if (size && !rank) refuse(fmt::format("{}={} is set, but {} is not", size_name, *size, rank_name));
    if (rank && *rank >= *size) refuse(fmt::format("{}={}: must be below {}={}", rank_name, *rank, size_name, *size));
    return rank ? std::pair{*rank, *size} : std::pair<int64_t, int64_t>{-1, -1};
  }

  void local(Started& start, const std::string& rank_name, const std::string& size_name) const {
    if (variable(size_name)) {
      std::tie(start.local_rank, start.local_size) = pair(rank_name, size_name);
      if (start.local_size > start.size) refuse(fmt::format("{}={}: must be at most the number of ranks, {}", size_name, start.local_size, start.size));
    } else if (const auto rank = number(rank_name, 0, kMostRanks)) {
      start.local_rank = *rank;
    }
  }

  // MASTER_ADDR and MASTER_PORT, or what the launcher makes known.
  void address(Started& start, const std::string& host, int64_t port, const std::string& derived_from) const {
    const auto named = variable("MASTER_ADDR");
    start.host = named.value_or(host);
    start.port = number("MASTER_PORT", 1, 65535).value_or(port);
    if (start.host.empty()) refuse(fmt::format("{} needs MASTER_ADDR, the machine of rank 0, and it is not set", start.rank_from));
    if (start.port == 0) refuse(fmt::format("{} needs MASTER_PORT, a free port on the machine of rank 0, and it is not set", start.rank_from));
    start.address_from = fmt::format("MASTER_ADDR={} MASTER_PORT={}", start.host, start.port);
    if (!named || !variable("MASTER_PORT")) start.address_from += fmt::format(" (derived from {})", derived_from);
  }
};

Started by_rank(const Reader& read) {
  Started start;
  std::tie(start.rank, start.size) = read.pair("RANK", "WORLD_SIZE");
  start.rank_from = fmt::format("RANK={} WORLD_SIZE={}", start.rank, start.size);
  read.local(start, "LOCAL_RANK", "LOCAL_WORLD_SIZE");
  if (start.size == 1) return start;
  read.address(start, "", 0, "");
  const std::string agent = read.variable("TORCHELASTIC_USE_AGENT_STORE").value_or("False");
  if (agent != "True" && agent != "False") refuse(fmt::format("TORCHELASTIC_USE_AGENT_STORE={}: must be True or False", agent));
  start.serves = start.rank == 0 && agent == "False";
  start.attempt = read.variable("TORCHELASTIC_RUN_ID").value_or("run") + "/" + read.variable("TORCHELASTIC_RESTART_COUNT").value_or("0");
  return start;
}

Started by_mpirun(const Reader& read) {
  Started start;
  std::tie(start.rank, start.size) = read.pair("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE");
  start.rank_from = fmt::format("OMPI_COMM_WORLD_RANK={} OMPI_COMM_WORLD_SIZE={}", start.rank, start.size);
  read.local(start, "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE");
  if (start.size == 1) return start;
  start.serves = start.rank == 0;
  // "1234.0;tcp://192.168.1.5,10.0.0.5:41835" and "prterun-node1-1234@1": both are the same on every rank, and name mpirun's machine.
  const std::string uri = read.variable("OMPI_MCA_orte_hnp_uri").value_or(""), job = read.variable("PMIX_NAMESPACE").value_or("");
  std::string host, from;
  if (start.local_size == start.size) {
    host = "127.0.0.1", from = "OMPI_COMM_WORLD_LOCAL_SIZE";
  } else if (const size_t at = uri.find("://"); at != std::string::npos) {
    host = uri.substr(at + 3, uri.find_first_of(",:", at + 3) - at - 3), from = "OMPI_MCA_orte_hnp_uri=" + uri;
  } else if (const size_t end = job.rfind('-'); job.starts_with("prterun-") && end > 8) {
    host = job.substr(8, end - 8), from = "PMIX_NAMESPACE=" + job;
  }
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (const char c : job.empty() ? uri : job) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
  if (host.empty() && !read.variable("MASTER_ADDR"))
    refuse(fmt::format("{}: the ranks are on several machines, and MASTER_ADDR, the machine of rank 0, is not set", start.rank_from), "mpirun -x MASTER_ADDR=... -x MASTER_PORT=...");
  read.address(start, host, kFirstPort + static_cast<int64_t>(hash % kNumPorts), from);
  return start;
}

Started by_srun(const Reader& read) {
  Started start;
  const std::string size_name = read.variable("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS";
  std::tie(start.rank, start.size) = read.pair("SLURM_PROCID", size_name);
  start.rank_from = fmt::format("SLURM_PROCID={} {}={}", start.rank, size_name, start.size);
  read.local(start, "SLURM_LOCALID", "");
  if (start.size == 1) return start;
  start.serves = start.rank == 0;
  const int64_t job = read.number("SLURM_JOB_ID", 0, INT64_MAX / 2).value_or(0), step = read.number("SLURM_STEP_ID", 0, INT64_MAX / 2).value_or(0);
  const std::string list_name = read.variable("SLURM_STEP_NODELIST") ? "SLURM_STEP_NODELIST" : "SLURM_JOB_NODELIST";
  const std::string list = read.variable(list_name).value_or("");
  bool several = false;
  std::string host = first_host(list, &several);
  if (host.empty() && !read.variable("MASTER_ADDR"))
    refuse(list.empty() ? fmt::format("{}: neither SLURM_JOB_NODELIST nor MASTER_ADDR is set", start.rank_from) : fmt::format("{}={}: no list of hosts such as gpu[01-03,7],login-2", list_name, list),
           "set MASTER_ADDR to the machine of rank 0");
  if (!several) host = "127.0.0.1";
  read.address(start, host, kFirstPort + (job + step) % kNumPorts, fmt::format("{}={} SLURM_JOB_ID={}", list_name, list, job));
  return start;
}

}  // namespace

std::optional<std::string> environment_variable(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  return value && *value ? std::optional<std::string>(value) : std::nullopt;
}

Started read_start(const Variables& variable) {
  const Reader read{variable};
  if (variable("RANK")) return by_rank(read);
  if (variable("OMPI_COMM_WORLD_RANK")) return by_mpirun(read);
  const bool batch_script = variable("ENVIRONMENT") == "BATCH" && !variable("SLURM_STEP_ID") && !variable("SLURM_STEP_NUM_TASKS");
  if (variable("SLURM_PROCID") && !batch_script) return by_srun(read);
  if (const auto size = read.number("WORLD_SIZE", 1, kMostRanks); size && *size > 1) refuse(fmt::format("WORLD_SIZE={} is set, but RANK is not", *size));
  return {};
}

std::string first_host(const std::string& nodelist, bool* several) {
  std::string host;
  bool more = false;
  size_t at = 0;
  for (; at < nodelist.size() && nodelist[at] != ','; ++at) {
    const char c = nodelist[at];
    if (c != '[') {
      if (!std::isalnum(static_cast<unsigned char>(c)) && c != '-' && c != '.' && c != '_' && c != ':') return "";
      host += c;
      continue;
    }
    const size_t close = nodelist.find(']', at);
    if (close == std::string::npos) return "";
    const std::string range = nodelist.substr(at + 1, close - at - 1), first = range.substr(0, range.find_first_of(",-"));
    if (first.empty() || range.find_first_not_of("0123456789,-") != std::string::npos) return "";
    more |= range != first;
    host += first;
    at = close;
  }
  if (several) *several = more || at < nodelist.size();
  return host;
}

}  // namespace tessera
