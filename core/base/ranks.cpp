#include "tessera/ranks.hpp"

#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <chrono>
#include <utility>

#include "tessera/error.hpp"

namespace tessera {

Flight::~Flight() = default;
Group::~Group() = default;
BlockGroups::~BlockGroups() = default;

Group::Group(std::string name, std::vector<int64_t> ranks, int64_t rank, std::shared_ptr<Whereabouts> whereabouts)
    : name_(std::move(name)), ranks_(std::move(ranks)), rank_(rank), whereabouts_(std::move(whereabouts)) {}

void Group::fail(const char* collective, uint64_t number, const std::string& why) const {
  const std::string place = whereabouts_->place.empty() ? "" : fmt::format(" in {}", whereabouts_->place);
  const std::string missing = whereabouts_->missing ? whereabouts_->missing(*this, number) : "";
  std::string reason = why.substr(0, why.find('\n'));
  if (const size_t end = reason.find("] "); reason.starts_with('[') && end != std::string::npos) reason.erase(0, end + 2);  // the place in Gloo's sources
  throw Error(ExitCode::kCollective, fmt::format("{} over {} (ranks {}){}, number {}: {}", collective, name_, fmt::join(ranks_, ", "), place, number,
                                                 missing.empty() ? reason : fmt::format("{} ({})", missing, reason)));
}

// Adds to the backend's flight what an error says, and the time spent waiting.
class Group::Guarded final : public Flight {
 public:
  Guarded(const Group& group, const char* collective, uint64_t number, FlightPtr flight) : group_(group), collective_(collective), number_(number), flight_(std::move(flight)) {}
  void wait() override {
    const auto began = std::chrono::steady_clock::now();
    try {
      flight_->wait();
    } catch (const std::exception& error) {
      group_.fail(collective_, number_, error.what());
    }
    group_.waited_s_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  }

 private:
  const Group& group_;
  const char* collective_;
  uint64_t number_;
  FlightPtr flight_;
};

template <class F>
FlightPtr Group::start(const char* collective, int64_t bytes, F run) const {
  const at::NoGradGuard no_grad;
  const uint64_t number = number_++;
  sent_bytes_ += bytes;
  if (whereabouts_->arrived) whereabouts_->arrived(*this, number, collective);
  try {
    return std::make_unique<Guarded>(*this, collective, number, run());
  } catch (const std::exception& error) {
    fail(collective, number, error.what());
  }
}

void Group::all_reduce(at::Tensor x, Reduce reduce) const {
  start("all_reduce", 2 * (size() - 1) * static_cast<int64_t>(x.nbytes()) / size(), [&] { return do_all_reduce(x, reduce); })->wait();
}

FlightPtr Group::start_all_gather(at::Tensor out, const at::Tensor& in) const {
  return start("all_gather", (size() - 1) * static_cast<int64_t>(in.nbytes()), [&] { return do_all_gather(out, in); });
}

FlightPtr Group::start_reduce_scatter(at::Tensor out, const at::Tensor& in) const {
  return start("reduce_scatter", (size() - 1) * static_cast<int64_t>(in.nbytes()) / size(), [&] { return do_reduce_scatter(out, in); });
}

void Group::all_to_all(at::Tensor out, const at::Tensor& in, const std::vector<int64_t>& out_rows, const std::vector<int64_t>& in_rows) const {
  int64_t total = 0;
  for (const int64_t rows : in_rows) total += rows;
  const int64_t others = total - in_rows[static_cast<size_t>(rank_)], row_bytes = total ? static_cast<int64_t>(in.nbytes()) / total : 0;
  start("all_to_all", others * row_bytes, [&] { return do_all_to_all(out, in, out_rows, in_rows); })->wait();
}

FlightPtr Group::start_send(const at::Tensor& x, int64_t to) const {
  return start("send", static_cast<int64_t>(x.nbytes()), [&] { return do_send(x, to); });
}

FlightPtr Group::start_receive(at::Tensor x, int64_t from) const {
  return start("receive", 0, [&] { return do_receive(x, from); });
}

}  // namespace tessera
