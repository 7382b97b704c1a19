#include "parallel/backend_group.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

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

// Every rank has sent its part to whom it belongs: what is left is to add up.
class SummingFlight final : public Flight {
 public:
  SummingFlight(c10::intrusive_ptr<c10d::Work> work, at::Tensor out, at::Tensor parts) : work_(std::move(work)), out_(std::move(out)), parts_(std::move(parts)) {}
  void wait() override {
    work_->wait();
    const auto wide = out_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    out_.copy_(at::sum(parts_, {0}, false, wide));
  }

 private:
  c10::intrusive_ptr<c10d::Work> work_;
  at::Tensor out_, parts_;
};

class BackendGroup final : public Group {
 public:
  BackendGroup(std::string name, std::vector<int64_t> ranks, int64_t rank, std::shared_ptr<Whereabouts> whereabouts, c10::intrusive_ptr<c10d::Backend> backend, bool sums_itself)
      : Group(std::move(name), std::move(ranks), rank, std::move(whereabouts)), backend_(std::move(backend)), sums_itself_(sums_itself) {}

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
    if (sums_itself_) return std::make_unique<WorkFlight>(backend_->_reduce_scatter_base(out, from), std::vector<at::Tensor>{out, from});
    std::vector<int64_t> shape{size()};
    shape.insert(shape.end(), out.sizes().begin(), out.sizes().end());
    at::Tensor parts = at::empty(shape, out.options());
    std::vector<int64_t> even;
    return std::make_unique<SummingFlight>(backend_->alltoall_base(parts, from, even, even), out, parts);
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
  bool sums_itself_;
};

}  // namespace

std::unique_ptr<Group> make_backend_group(std::string name, std::vector<int64_t> ranks, int64_t rank, std::shared_ptr<Whereabouts> whereabouts,
                                          c10::intrusive_ptr<c10d::Backend> backend, bool sums_itself) {
  return std::make_unique<BackendGroup>(std::move(name), std::move(ranks), rank, std::move(whereabouts), std::move(backend), sums_itself);
}

}  // namespace tessera
