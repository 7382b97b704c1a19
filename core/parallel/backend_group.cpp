#include "parallel/backend_group.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <functional>
#include <utility>

#include "parallel/mailboxes.hpp"

namespace tessera {

namespace {

class WorkFlight final : public Flight {
 public:
  WorkFlight(c10::intrusive_ptr<c10d::Work> work, std::vector<at::Tensor> tensors) : work_(std::move(work)), tensors_(std::move(tensors)) {}
  void wait() override { work_->wait(); }

 private:
  c10::intrusive_ptr<c10d::Work> work_;
  std::vector<at::Tensor> tensors_;
};

// Several at once, and what is left to do when all have ended.
class Flights final : public Flight {
 public:
  Flights(std::vector<FlightPtr> list, std::function<void()> finish) : list_(std::move(list)), finish_(std::move(finish)) {}
  void wait() override {
    for (const FlightPtr& flight : list_) flight->wait();
    if (finish_) std::exchange(finish_, {})();
  }

 private:
  std::vector<FlightPtr> list_;
  std::function<void()> finish_;
};

class BackendGroup : public Group {
 public:
  BackendGroup(std::string name, std::vector<int64_t> ranks, int64_t rank, std::shared_ptr<Whereabouts> whereabouts, c10::intrusive_ptr<c10d::Backend> backend)
      : Group(std::move(name), std::move(ranks), rank, std::move(whereabouts)), backend_(std::move(backend)) {}

 protected:
  FlightPtr do_all_reduce(at::Tensor& x, Reduce reduce) const override {
    std::vector<at::Tensor> tensors{x};
    c10d::AllreduceOptions options;
    options.reduceOp = reduce == Reduce::kSum ? c10d::ReduceOp::SUM : c10d::ReduceOp::MAX;
    return std::make_unique<WorkFlight>(backend_->allreduce(tensors, options), tensors);
  }
  FlightPtr do_all_gather(at::Tensor& out, const at::Tensor& in) const override {
    at::Tensor from = in.contiguous();
    return std::make_unique<WorkFlight>(backend_->_allgather_base(out, from), std::vector<at::Tensor>{out, from});
  }
  FlightPtr do_reduce_scatter(at::Tensor& out, const at::Tensor& in) const override {
    at::Tensor from = in.contiguous();
    return std::make_unique<WorkFlight>(backend_->_reduce_scatter_base(out, from), std::vector<at::Tensor>{out, from});
  }
  FlightPtr do_all_to_all(at::Tensor& out, const at::Tensor& in, const std::vector<int64_t>& out_rows, const std::vector<int64_t>& in_rows) const override {
    at::Tensor from = in.contiguous();
    std::vector<int64_t> outs = out_rows, ins = in_rows;
    return std::make_unique<WorkFlight>(backend_->alltoall_base(out, from, outs, ins), std::vector<at::Tensor>{out, from});
  }
  FlightPtr do_send(const at::Tensor& x, int64_t to) const override {
    std::vector<at::Tensor> tensors{x};
    return std::make_unique<WorkFlight>(backend_->send(tensors, static_cast<int>(to), 0), tensors);
  }
  FlightPtr do_receive(at::Tensor& x, int64_t from) const override {
    std::vector<at::Tensor> tensors{x};
    return std::make_unique<WorkFlight>(backend_->recv(tensors, static_cast<int>(from), 0), tensors);
  }

 private:
  c10::intrusive_ptr<c10d::Backend> backend_;
};

class MailboxFlight final : public Flight {
 public:
  MailboxFlight(std::shared_ptr<Mailboxes> boxes, uint64_t number) : boxes_(std::move(boxes)), number_(number) {}
  void wait() override { boxes_->wait(number_); }

 private:
  std::shared_ptr<Mailboxes> boxes_;
  uint64_t number_;
};

// Gathers and scatters made of what each rank has for each other: through memory where they share it, else by sends. c10d's own over Gloo copy the
// gathered tensor once more, and know no reduce-scatter of tensors.
class PairwiseGroup final : public BackendGroup {
 public:
  PairwiseGroup(std::string name, std::vector<int64_t> ranks, int64_t rank, std::shared_ptr<Whereabouts> whereabouts, c10::intrusive_ptr<c10d::Backend> backend, std::shared_ptr<Mailboxes> boxes)
      : BackendGroup(std::move(name), std::move(ranks), rank, std::move(whereabouts), std::move(backend)), boxes_(std::move(boxes)) {}

 protected:
  FlightPtr do_all_gather(at::Tensor& out, const at::Tensor& in) const override {
    const at::Tensor from = in.contiguous().view({-1}), rows = out.view({size(), in.numel()});
    auto flights = exchange(from, std::vector<at::Tensor>(static_cast<size_t>(size()), from), rows.unbind(0));
    rows[rank()].copy_(from);
    return std::make_unique<Flights>(std::move(flights), nullptr);
  }
  FlightPtr do_reduce_scatter(at::Tensor& out, const at::Tensor& in) const override {
    const at::Tensor rows = in.contiguous().view({size(), out.numel()}), parts = at::empty({size() - 1, out.numel()}, out.options());
    std::vector<at::Tensor> received = parts.unbind(0);
    received.insert(received.begin() + rank(), at::Tensor());
    return std::make_unique<Flights>(exchange(rows, rows.unbind(0), received), [out, parts, own = rows[rank()]] {
      at::Tensor sum = out.view({-1});
      if (parts.size(0) == 1) at::add_out(sum, own, parts[0]);  // rounded once in every dtype
      else sum.copy_(at::sum(parts, {0}, false, out.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).add_(own));
    });
  }
  FlightPtr do_all_to_all(at::Tensor& out, const at::Tensor& in, const std::vector<int64_t>& out_rows, const std::vector<int64_t>& in_rows) const override {
    if (!boxes_) return BackendGroup::do_all_to_all(out, in, out_rows, in_rows);
    const at::Tensor from = in.contiguous();
    const std::vector<at::Tensor> sent = from.split_with_sizes(in_rows), received = out.split_with_sizes(out_rows);
    auto flights = exchange(from, sent, received);
    received[static_cast<size_t>(rank())].copy_(sent[static_cast<size_t>(rank())]);
    return std::make_unique<Flights>(std::move(flights), nullptr);
  }

 private:
  // By sends, all of them come before what is received: what a rank that was here before has to send then waits until this rank is done writing. Gloo's
  // thread spins while there is something to read on a connection that another thread writes to.
  std::vector<FlightPtr> exchange(const at::Tensor& in, const std::vector<at::Tensor>& sent, const std::vector<at::Tensor>& received) const {
    std::vector<FlightPtr> flights;
    if (boxes_) {
      flights.push_back(std::make_unique<MailboxFlight>(boxes_, boxes_->start(in, sent, received)));
      return flights;
    }
    for (int64_t step = 1; step < size(); ++step) {
      const int64_t to = (rank() + step) % size();
      if (const at::Tensor& x = sent[static_cast<size_t>(to)]; x.numel()) flights.push_back(do_send(x, to));
    }
    for (int64_t step = 1; step < size(); ++step) {
      const int64_t from = (rank() - step + size()) % size();
      if (at::Tensor x = received[static_cast<size_t>(from)]; x.numel()) flights.push_back(do_receive(x, from));
    }
    return flights;
  }

  std::shared_ptr<Mailboxes> boxes_;
};

}  // namespace

std::unique_ptr<Group> make_backend_group(std::string name, std::vector<int64_t> ranks, int64_t rank, std::shared_ptr<Whereabouts> whereabouts,
                                          c10::intrusive_ptr<c10d::Backend> backend) {
  return std::make_unique<BackendGroup>(std::move(name), std::move(ranks), rank, std::move(whereabouts), std::move(backend));
}

std::unique_ptr<Group> make_pairwise_group(std::string name, std::vector<int64_t> ranks, int64_t rank, std::shared_ptr<Whereabouts> whereabouts,
                                           c10::intrusive_ptr<c10d::Backend> backend, std::shared_ptr<Mailboxes> boxes) {
  return std::make_unique<PairwiseGroup>(std::move(name), std::move(ranks), rank, std::move(whereabouts), std::move(backend), std::move(boxes));
}

}  // namespace tessera
