#include "plan/schedule.hpp"

#include <algorithm>
#include <utility>

namespace tessera {

namespace {

// The forward passes of a rank in the order in which it takes them: micro-batches in groups of num_ranks, each group through all of the rank's stages.
std::vector<PipelineAction> forward_order(int64_t num_ranks, int64_t num_stages, int64_t num_micro, int64_t rank) {
  std::vector<PipelineAction> order;
  for (int64_t first = 0; first < num_micro; first += num_ranks)
    for (int64_t stage = rank; stage < num_stages; stage += num_ranks)
      for (int64_t micro = first; micro < std::min(num_micro, first + num_ranks); ++micro) order.push_back({.forward = true, .micro = micro, .stage = stage});
  return order;
}

std::vector<PipelineAction> backward_order(int64_t num_ranks, int64_t num_stages, int64_t num_micro, int64_t rank) {
  std::vector<PipelineAction> order;
  for (int64_t first = 0; first < num_micro; first += num_ranks)
    for (int64_t stage = num_stages - num_ranks + rank; stage >= 0; stage -= num_ranks)
      for (int64_t micro = first; micro < std::min(num_micro, first + num_ranks); ++micro) order.push_back({.forward = false, .micro = micro, .stage = stage});
  return order;
}

// Plays the ranks against a clock: each takes its next backward pass when its gradient is there, else its next forward pass while it may keep more.
class Simulation {
 public:
  Simulation(int64_t num_ranks, int64_t num_stages, int64_t num_micro) : num_ranks_(num_ranks), num_stages_(num_stages), num_micro_(num_micro) {
    const int64_t chunks = num_stages / num_ranks;
    for (int64_t r = 0; r < num_ranks; ++r) {
      ranks_.push_back({.forwards = forward_order(num_ranks, num_stages, num_micro, r), .backwards = backward_order(num_ranks, num_stages, num_micro, r)});
      ranks_.back().may_keep = chunks == 1 ? num_ranks - r : 2 * (num_ranks - r - 1) + (chunks - 1) * num_ranks + 1;
    }
    done_.assign(static_cast<size_t>(2 * num_stages * num_micro), -1);
  }

  std::vector<std::vector<PipelineAction>> run() {
    size_t left = static_cast<size_t>(2 * num_stages_ * num_micro_);
    while (left > 0) {
      // The rank that can begin something first does.
      int64_t best = -1, best_time = 0;
      bool best_forward = false;
      for (int64_t r = 0; r < num_ranks_; ++r) {
        for (const bool forward : {false, true}) {
          const int64_t time = ready(r, forward);
          if (time < 0 || (best >= 0 && time >= best_time)) continue;
          best = r, best_time = time, best_forward = forward;
        }
      }
      if (best < 0) {  // every rank keeps what it may
        for (Rank& rank : ranks_) ++rank.may_keep;
        continue;
      }
      begin(best, best_forward, best_time);
      --left;
    }
    std::vector<std::vector<PipelineAction>> out;
    for (Rank& rank : ranks_) out.push_back(std::move(rank.taken));
    return out;
  }

 private:
  struct Rank {
    std::vector<PipelineAction> forwards, backwards, taken = {};
    size_t next_forward = 0, next_backward = 0;
    int64_t may_keep = 0, free_at = 0;
  };

  int64_t& done(const PipelineAction& a) { return done_[static_cast<size_t>(((a.forward ? 0 : 1) * num_stages_ + a.stage) * num_micro_ + a.micro)]; }

  // When the rank could begin its next pass of that kind; -1 when something it needs has not happened.
  int64_t ready(int64_t r, bool forward) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    const auto& order = forward ? rank.forwards : rank.backwards;
    const size_t next = forward ? rank.next_forward : rank.next_backward;
    if (next == order.size()) return -1;
    if (forward && static_cast<int64_t>(rank.next_forward - rank.next_backward) >= rank.may_keep) return -1;
    const PipelineAction& a = order[next];
    int64_t needs = 0;
    if (a.forward && a.stage > 0) needs = done({.forward = true, .micro = a.micro, .stage = a.stage - 1});
    if (!a.forward && a.stage < num_stages_ - 1) needs = done({.forward = false, .micro = a.micro, .stage = a.stage + 1});
    if (!a.forward && a.stage == num_stages_ - 1) needs = done({.forward = true, .micro = a.micro, .stage = a.stage});
    return needs < 0 ? -1 : std::max(needs, rank.free_at);
  }

  void begin(int64_t r, bool forward, int64_t time) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    const PipelineAction a = forward ? rank.forwards[rank.next_forward++] : rank.backwards[rank.next_backward++];
    rank.free_at = done(a) = time + (forward ? 1 : 2);
    rank.taken.push_back(a);
  }

  int64_t num_ranks_, num_stages_, num_micro_;
  std::vector<Rank> ranks_;
  std::vector<int64_t> done_;  // when a pass ends; -1: not begun
};

}  // namespace

std::vector<std::vector<PipelineAction>> pipeline_schedule(int64_t num_ranks, int64_t num_stages, int64_t num_micro) {
  return Simulation(num_ranks, num_stages, num_micro).run();
}

}  // namespace tessera
