#include "sweep/line.hpp"

#include <cmath>

namespace tessera {

std::optional<double> Line::at(int64_t i) {
  if (const auto found = seen_.find(i); found != seen_.end()) return found->second;
  const std::optional<double> value = function_(i);
  if (value) seen_.emplace(i, *value);
  return value;
}

int64_t Line::scan(int64_t from, int64_t to) {
  const int64_t step = from <= to ? 1 : -1;
  for (int64_t i = from; i != to + step; i += step)
    if (at(i)) return i;
  return -1;
}

bool Line::find_ends() {
  if (first_ < 0) first_ = scan(0, count_ - 1);
  if (first_ >= 0 && last_ < 0) last_ = scan(count_ - 1, first_);
  return first_ >= 0;
}

bool Line::flat() { return !find_ends() || *at(first_) == *at(last_); }

void Line::bisect(double target) {
  int64_t low = first_, high = last_;
  const double sign = *at(high) < *at(low) ? -1 : 1;
  const auto reaches = [&](int64_t i) { return sign * *at(i) >= sign * target; };
  if (reaches(low) || !reaches(high)) return;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (const int64_t above = scan(middle, high - 1); above >= 0) {
      (reaches(above) ? high : low) = above;
      continue;
    }
    const int64_t below = middle - 1 > low ? scan(middle - 1, low + 1) : -1;
    if (below < 0 || !reaches(below)) return;  // it is not defined between that place and `high`
    high = below;
  }
}

std::optional<int> Line::direction() const {
  bool rises = false, falls = false;
  const double* last = nullptr;
  for (const auto& [place, value] : seen_) {
    if (last && value < *last) falls = true;
    if (last && value > *last) rises = true;
    last = &value;
  }
  if (rises && falls) return {};
  return rises ? 1 : falls ? -1 : 0;
}

std::optional<int64_t> Line::best(double target) const {
  std::optional<int64_t> best;
  const auto distance = [&](int64_t i) { return std::make_pair(std::abs(seen_.at(i) - target), std::abs(static_cast<double>(i) - home_)); };
  for (const auto& [place, value] : seen_)
    if (!best || distance(place) < distance(*best)) best = place;
  return best;
}

std::optional<int64_t> Line::guess(double target) {
  if (!find_ends()) return {};
  bisect(target);
  return best(target);
}

std::optional<int64_t> Line::nearest(double target, int64_t all, int64_t neighbours) {
  tried_all_ = count_ <= all;
  if (!tried_all_) {
    const auto start = guess(target);
    if (!start) {
      tried_all_ = true;
      return {};
    }
    int64_t low = *start, high = *start;
    for (int64_t i = 0; i < neighbours; ++i) {
      if (low > first_) low = scan(low - 1, first_);
      if (high < last_) high = scan(high + 1, last_);
      at(first_ + (last_ - first_) / (neighbours + 1) * (i + 1));
    }
    tried_all_ = !direction();
  }
  if (tried_all_)
    for (int64_t i = 0; i < count_; ++i) at(i);
  return best(target);
}

}  // namespace tessera
