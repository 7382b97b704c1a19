// A run ends when one of its ranks does: every rank's watch tells the others that it lives, where it is, and why it ended.
#pragma once
#include <functional>
#include <memory>

#include "parallel/mesh_groups.hpp"

namespace tessera {

// A thread with a connection of its own to the store. About twice a second it says that this rank lives and which collectives it has reached, and asks
// whether another rank has failed or has given no sign of life for ten seconds. Then this rank ends too, with exit code 5, whatever it is doing: it
// first gets two seconds to fail by itself. The store's end is such a failure. In a world of one, or without a store, nothing is done.
//
// Fills World.whereabouts: `arrived` remembers a collective; `missing` says of the others what it can find out in three seconds: "rank 3 (tp 1) ended:
// <reason>", "rank 2 (tp 0) has not arrived, it is at all_gather number 12 over dp_shard in layers.3 (moe), backward".
//
// One failure is told once: by the rank that failed; or, where that one cannot, by the rank that noticed. Of the others, those with local rank 0 name it
// in one line, the rest end silently: they throw an Error without a message.
class Watch {
 public:
  // After rendezvous(), before the groups are made. `world`'s whereabouts is shared with the groups.
  explicit Watch(const World& world);
  ~Watch();
  Watch(const Watch&) = delete;

  // Ranks are named by their place in it from now on.
  void set_mesh(const Mesh& mesh);

  // Does the rank's work. What it throws is told to the others first and thrown on; where another rank failed before, Error(kCollective) that names it.
  // Objects that the work makes and that wait for other ranks when they end, such as groups, should outlive it. Rank 0 stays until the others are done,
  // since it may serve the store.
  int run(const std::function<int()>& work);

  // For a launcher, which sees at once that a process ended: tells the ranks "rank 2 <reason>", unless a failure was told before.
  static void tell(const c10::intrusive_ptr<c10d::Store>& store, int64_t rank, const std::string& reason);

 private:
  struct Shared;
  std::unique_ptr<Shared> shared_;
};

}  // namespace tessera
