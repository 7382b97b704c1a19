// A search along the values of one key.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <optional>

namespace tessera {

// A function of 0..count-1 that is not defined everywhere and is expected to rise or to fall: what a configuration costs by the values of a key, where they are legal.
class Line {
 public:
  using Function = std::function<std::optional<double>(int64_t)>;
  // `home`: of equally near values the one nearest to it is taken.
  Line(int64_t count, double home, Function function) : count_(count), home_(home), function_(std::move(function)) {}

  std::optional<double> at(int64_t i);
  // Whether it has the same value at its first and last place, or is defined at one at most.
  bool flat();
  // About where it is nearest to `target`, by bisection alone; none where it is defined nowhere.
  std::optional<int64_t> guess(double target);
  // Where it is nearest to `target`. Up to `all` places are all looked at; else bisection, then `neighbours` defined places on either side and as many places spread
  // over the whole; where it both rises and falls over the places looked at, all are. None where it is defined nowhere.
  std::optional<int64_t> nearest(double target, int64_t all, int64_t neighbours);

  // 1 where it rises over the places looked at, -1 where it falls, 0 where it is constant; none where it does both.
  std::optional<int> direction() const;
  // Whether nearest() looked at all places.
  bool tried_all() const { return tried_all_; }
  // What was looked at and is defined.
  const std::map<int64_t, double>& seen() const { return seen_; }

 private:
  // The first place from `from` to `to`, both included, where it is defined; -1 where there is none.
  int64_t scan(int64_t from, int64_t to);
  bool find_ends();
  void bisect(double target);
  std::optional<int64_t> best(double target) const;

  int64_t count_;
  double home_;
  Function function_;
  std::map<int64_t, double> seen_;
  int64_t first_ = -1, last_ = -1;  // the outermost places where it is defined
  bool tried_all_ = false;
};

}  // namespace tessera
