// A work that all ranks of a run do at once beside their steps.
#pragma once
#include <c10/util/intrusive_ptr.h>
#include <nlohmann/json.hpp>

#include <chrono>
#include <functional>
#include <vector>

#include "parallel/mesh_groups.hpp"

namespace tessera {

// Ranks that meet through the run's store, on a connection of their own, and not by the groups' collectives: so another thread may do it while the main
// thread trains. One work at a time; its messages are taken out of the store as they are read.
class Together {
 public:
  explicit Together(const MeshGroups* ranks);  // nullptr: there is one rank
  ~Together();
  Together(const Together&) = delete;
  int64_t rank() const { return rank_; }
  int64_t size() const { return size_; }
  // Does this rank's part and waits for the others'. Returns what each rank's part returned. Where one failed, all throw the first one's error, as
  // Error(kRuntime). Throws Error(kCollective) where the others do not come within the run's timeout.
  std::vector<nlohmann::json> round(const std::function<nlohmann::json()>& part) const;

 private:
  nlohmann::json exchange(const nlohmann::json& own) const;
  nlohmann::json take(const std::string& key, std::chrono::milliseconds timeout) const;

  int64_t rank_ = 0, size_ = 1;
  std::chrono::milliseconds timeout_{0};
  c10::intrusive_ptr<c10d::Store> store_;
};

}  // namespace tessera
