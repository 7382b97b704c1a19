// Groups of ranks and what they exchange. Blocks reach them through operators that take the Context; see layers/collectives.hpp.
//
// One rule holds everywhere: every rank has a loss of its own, the model's loss is their sum, and a rank's gradient is that of the sum by its own
// copy of a value. So gathering and reduce-scattering are each other's gradient, summing is its own, and the gradient of a parameter that several
// ranks hold is the sum of theirs. What several ranks compute alike may enter the loss once.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tessera/env.hpp"

namespace tessera {

// What a collective's error says: where the rank is, and who did not come.
struct Whereabouts {
  std::string place;  // "layers.3 (moe), forward": set by the model
  // Called before each collective: the group, how many came before it in the group, and its name. May be empty.
  std::function<void(const class Group&, uint64_t number, const char* collective)> arrived;
  // Why a collective failed, as text: "rank 3 (dp_shard 1, tp 1) has not arrived, it is at all_gather number 12 over tp"; "" when that is not known. May be empty.
  std::function<std::string(const class Group&, uint64_t number)> missing;
};

// A collective in flight. Its tensors live until it ends.
class Flight {
 public:
  virtual ~Flight();
  // On the CPU until the result is there; on a GPU the current stream waits, not the host. Throws Error(kCollective).
  virtual void wait() = 0;
};
using FlightPtr = std::unique_ptr<Flight>;

enum class Reduce { kSum, kMax };

// Ranks that exchange tensors; every one of them must call the same collectives in the same order. All tensors are contiguous, on the group's device.
// No gradient is recorded. Throws Error(kCollective) that names the collective, the group, the place and the ranks that are missing.
class Group {
 public:
  // `name`: "tp", "dp_shard x cp". `ranks`: the members' ranks in the world, in the order of the group.
  Group(std::string name, std::vector<int64_t> ranks, int64_t rank, std::shared_ptr<Whereabouts> whereabouts);
  virtual ~Group();
  Group(const Group&) = delete;

  const std::string& name() const { return name_; }
  int64_t size() const { return static_cast<int64_t>(ranks_.size()); }
  int64_t rank() const { return rank_; }
  const std::vector<int64_t>& ranks() const { return ranks_; }

  // x becomes the sum (greatest) over the ranks.
  void all_reduce(at::Tensor x, Reduce reduce = Reduce::kSum) const;
  // out [size * n, ...] becomes the ranks' in [n, ...] one after the other.
  void all_gather(at::Tensor out, const at::Tensor& in) const { start_all_gather(std::move(out), in)->wait(); }
  FlightPtr start_all_gather(at::Tensor out, const at::Tensor& in) const;
  // out [n, ...] becomes the sum over the ranks of their part number rank() of in [size * n, ...]; bf16 is summed in fp32 where the backend lets us.
  void reduce_scatter(at::Tensor out, const at::Tensor& in) const { start_reduce_scatter(std::move(out), in)->wait(); }
  FlightPtr start_reduce_scatter(at::Tensor out, const at::Tensor& in) const;
  // Rows of `in`, in_rows[r] for rank r, one after the other; out gets out_rows[r] from rank r.
  void all_to_all(at::Tensor out, const at::Tensor& in, const std::vector<int64_t>& out_rows, const std::vector<int64_t>& in_rows) const;
  // Point to point; `to` and `from` are ranks of the group. Matching calls come in the same order on both sides.
  FlightPtr start_send(const at::Tensor& x, int64_t to) const;
  FlightPtr start_receive(at::Tensor x, int64_t from) const;

  // Bytes that this rank handed to others since the start, by the least that the collective needs: (size - 1) x n for gathering n bytes, the same for
  // scattering 'size' parts of n, 2 (size - 1) / size x n for a sum, the rows of others, n for a send.
  int64_t sent_bytes() const { return sent_bytes_; }
  // Seconds that the host spent waiting in collectives; zero on a GPU, where streams wait.
  double waited_s() const { return waited_s_; }

 protected:
  virtual FlightPtr do_all_reduce(at::Tensor& x, Reduce reduce) const = 0;
  virtual FlightPtr do_all_gather(at::Tensor& out, const at::Tensor& in) const = 0;
  virtual FlightPtr do_reduce_scatter(at::Tensor& out, const at::Tensor& in) const = 0;
  virtual FlightPtr do_all_to_all(at::Tensor& out, const at::Tensor& in, const std::vector<int64_t>& out_rows, const std::vector<int64_t>& in_rows) const = 0;
  virtual FlightPtr do_send(const at::Tensor& x, int64_t to) const = 0;
  virtual FlightPtr do_receive(at::Tensor& x, int64_t from) const = 0;

 private:
  class Guarded;
  template <class F>
  FlightPtr start(const char* collective, int64_t bytes, F run) const;
  [[noreturn]] void fail(const char* collective, uint64_t number, const std::string& why) const;

  std::string name_;
  std::vector<int64_t> ranks_;
  int64_t rank_;
  std::shared_ptr<Whereabouts> whereabouts_;
  mutable uint64_t number_ = 0;
  mutable int64_t sent_bytes_ = 0;
  mutable double waited_s_ = 0;
};

// The groups that a block may exchange with. A group of one rank is nullptr.
class BlockGroups {
 public:
  virtual ~BlockGroups();
  virtual const Group* tensor() const = 0;    // tp
  virtual const Group* context() const = 0;   // cp
  virtual const Group* sequence() const = 0;  // cp x tp: together they hold every token of a micro-batch once where blocks run on sequence shards
  virtual const Group* experts() const = 0;   // ep x etp, etp innermost: expert part i lies on ranks [i * etp, (i + 1) * etp)
  // `size` neighbouring tensor ranks, which share a unit of a parameter that has fewer units than there are ranks (see Shard). `size` divides tp.
  virtual const Group* tensor_part(int64_t size) const = 0;
};

}  // namespace tessera
