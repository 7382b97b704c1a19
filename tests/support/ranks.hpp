// Several ranks in one process: a thread each, which meet over Gloo on the loopback interface as processes do.
#pragma once
#include <ATen/Parallel.h>
#include <torch/csrc/distributed/c10d/HashStore.hpp>

#include <chrono>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "parallel/mesh_groups.hpp"

namespace tessera {

// Runs `work` on every rank of `mesh`, each on one thread. Groups close when a rank ends or throws, so the others do not wait for it. Throws the error
// of the rank that failed first. Without `shares_memory` all goes over sockets, as between machines.
inline void run_ranks(const Mesh& mesh, const std::function<void(MeshGroups&)>& work, std::chrono::milliseconds timeout = std::chrono::seconds(60), bool shares_memory = true) {
  setenv("TORCH_FR_BUFFER_SIZE", "0", 1);  // c10d's record of collectives is one a process, and not safe among threads
  const auto store = c10::make_intrusive<c10d::HashStore>();
  const auto size = mesh.size();
  std::vector<std::thread> threads;
  std::exception_ptr first;
  std::mutex mutex;
  for (int64_t rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      at::set_num_threads(1);
      try {
        World world{.rank = rank, .size = size, .local_rank = rank, .local_size = size, .store = store, .device = gloo_device("127.0.0.1"), .timeout = timeout, .shares_memory = shares_memory};
        MeshGroups groups(std::move(world), mesh);
        work(groups);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!first) first = std::current_exception();
      }
    });
  for (std::thread& thread : threads) thread.join();
  if (first) std::rethrow_exception(first);
}

}  // namespace tessera
