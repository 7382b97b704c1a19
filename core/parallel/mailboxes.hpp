// Memory that ranks of one machine share: each has a box into which it puts what it sends, and from which the others take their parts.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace c10d {
class Store;
}

namespace tessera {

class Mailboxes {
 public:
  // Meets the other ranks through `store`. nullptr on all of them where not all are on this machine, or it does not let them share memory.
  static std::shared_ptr<Mailboxes> meet(c10::intrusive_ptr<c10d::Store> store, int64_t rank, int64_t size, std::chrono::milliseconds timeout);
  ~Mailboxes();
  Mailboxes(const Mailboxes&) = delete;

  // One exchange: sent[r], a piece of the contiguous `in`, goes to rank r, and received[r] comes from it; not this rank's own. Every rank must start the
  // same exchanges in the same order. What is sent is put down at once, so that no rank waits for another to take it, whatever else either is at: a box
  // grows to the most that was in flight. Returns the exchange's number. Throws std::runtime_error.
  uint64_t start(const at::Tensor& in, const std::vector<at::Tensor>& sent, std::vector<at::Tensor> received);
  // Until everything of this exchange has been received. Throws std::runtime_error where a rank is gone, does not come in time, or sends another size.
  void wait(uint64_t number);

 private:
  struct Box;
  struct Exchange {
    uint64_t number;
    at::Tensor into;
  };
  Mailboxes(int64_t rank, int64_t size, std::chrono::milliseconds timeout);
  Box* map(int fd) const;
  Box& box(int64_t rank) const { return *boxes_[static_cast<size_t>(rank)]; }
  void ring_bell(int64_t rank) const;
  uint64_t place(uint64_t bytes);
  bool take(int64_t source, uint64_t number);

  int64_t rank_, size_;
  std::chrono::milliseconds timeout_;
  std::vector<Box*> boxes_;     // by rank
  std::vector<int> processes_;  // by rank: a descriptor that tells when the process has ended; -1 for this rank
  uint64_t started_ = 0;
  std::map<uint64_t, std::pair<uint64_t, uint64_t>> lying_;  // in this rank's box, by where it begins: its end, and the exchange
  std::vector<std::deque<Exchange>> expected_;               // by source
};

}  // namespace tessera
