// Memory that ranks of one machine share: each has a ring into which it writes what it sends, and from which the others read their parts.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

namespace c10d {
class Store;
}

namespace tessera {

class SharedRings {
 public:
  struct Transfer;
  using TransferPtr = std::shared_ptr<Transfer>;

  // Meets the other ranks through `store`. nullptr on all of them where not all are on this machine, or it does not let them share memory.
  static std::shared_ptr<SharedRings> meet(c10::intrusive_ptr<c10d::Store> store, int64_t rank, int64_t size, std::chrono::milliseconds timeout);
  ~SharedRings();
  SharedRings(const SharedRings&) = delete;

  // One exchange: sent[r], a piece of the contiguous `in`, goes to rank r, and received[r] comes from it; not this rank's own. Every rank must start the
  // same exchanges in the same order. Throws std::runtime_error where a rank is gone, does not come in time, or sends other sizes than are expected.
  TransferPtr start(const at::Tensor& in, const std::vector<at::Tensor>& sent, const std::vector<at::Tensor>& received);
  void wait(Transfer& transfer);

 private:
  struct Ring;
  SharedRings(int64_t rank, int64_t size, std::chrono::milliseconds timeout);
  Ring* map(int fd) const;
  void pump();
  bool write_some();
  bool read_some(int64_t source);
  void ring_bell(int64_t rank);
  uint64_t most_unread() const;
  void check_others(const Transfer& transfer) const;

  int64_t rank_, size_;
  std::chrono::milliseconds timeout_;
  std::vector<Ring*> rings_;    // by rank
  std::vector<int> processes_;  // by rank: a descriptor that tells when the process has ended; -1 for this rank
  std::deque<TransferPtr> writing_;               // begun and not yet written whole
  std::vector<std::deque<TransferPtr>> reading_;  // by source
};

}  // namespace tessera
