// A rank that sums in a loop, and ends as its arguments say: rank_program [launch N] KEY=VALUE...
//   at=RANK do=throw|kill|hang|stop|exit|config|late   what happens to which rank, at the sixth sum ("config": before the first)
//   others=compute   the other ranks work without collectives from then on
//   rounds=N pause=MS timeout=MS tp=N
#include <ATen/ops/full.h>
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <iostream>
#include <map>
#include <optional>
#include <thread>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "parallel/agree.hpp"
#include "parallel/launcher.hpp"
#include "parallel/rendezvous.hpp"
#include "parallel/watch.hpp"
#include "tessera/error.hpp"
#include "train/signals.hpp"

namespace {

using namespace tessera;
using std::chrono::milliseconds;

// In one write: lines of several processes do not mix.
void say(const std::string& line) { std::cerr << line + "\n" << std::flush; }

void forever() {
  volatile double x = 1;
  while (true) x = x * 1.0000001;
}

int run(std::map<std::string, std::string> words) {
  const auto number = [&](const char* key, int64_t otherwise) { return words.count(key) ? std::stoll(words[key]) : otherwise; };
  const StopSignals signals;
  World world = rendezvous(milliseconds(number("timeout", 60000)));
  Watch watch(world);
  std::optional<MeshGroups> groups;
  return watch.run([&] {
    Mesh mesh;
    mesh.tp = number("tp", 1);
    mesh.dp_shard = world.size / mesh.tp;
    watch.set_mesh(mesh);
    const bool chosen = number("at", -1) == world.rank;
    const std::string what = words["do"];
    agree(world, {{"build", "abc"}, {"config", fmt::format("# written by train\n[model]\nhidden_size = 8\n\n[training]\nlr = {}\nsteps = 4\n", chosen && what == "config" ? "2e-3" : "1e-3")}});
    groups.emplace(world, mesh);
    world.whereabouts->place = "layers.3 (moe), forward";
    double sum = static_cast<double>(world.rank);
    for (int64_t round = 0; round < number("rounds", 10); ++round) {
      if (round == 5 && chosen) {
        if (what == "throw") throw Error(ExitCode::kRuntime, "out/file: cannot be written: No space left on device", "free some space");
        if (what == "kill") ::raise(SIGKILL);
        if (what == "hang") forever();
        if (what == "stop") ::raise(SIGSTOP);
        if (what == "exit") ::_exit(3);
      } else if (round == 5 && words["others"] == "compute") {
        forever();
      }
      if (groups->all()) {
        at::Tensor x = at::full({4}, sum, at::kDouble);
        groups->all()->all_reduce(x);
        sum = x[0].item<double>() / static_cast<double>(world.size);
      }
      std::this_thread::sleep_for(milliseconds(number("pause", 0)));
      if (round == 0) say(fmt::format("rank {} runs", world.rank));
      if (StopSignals::received()) {
        say(fmt::format("rank {} stops", world.rank));
        return 128 + StopSignals::received();
      }
    }
    if (chosen && what == "late") std::this_thread::sleep_for(std::chrono::seconds(3));
    std::cout << fmt::format("rank {} of {} local {} of {}: {}", world.rank, world.size, world.local_rank, world.local_size, sum) << std::endl;
    return 0;
  });
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc > 2 && std::string(argv[1]) == "launch") return launch_ranks(std::stoll(argv[2]), {argv + 3, argv + argc});
    std::map<std::string, std::string> words;
    for (int i = 1; i < argc; ++i) {
      const std::string word = argv[i];
      words[word.substr(0, word.find('='))] = word.substr(word.find('=') + 1);
    }
    return run(words);
  } catch (const Error& error) {
    if (!error.message().empty()) std::cerr << error.what() << std::endl;
    return static_cast<int>(error.code());
  }
}
