#include "layers/attention_cache.hpp"

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "layers/row_tiles.hpp"

namespace tessera {
namespace {

constexpr int64_t kBlock = 256;      // keys of a block
constexpr int64_t kGrain = 1 << 15;  // multiply-adds a thread takes at least

// One kv head's block of keys for one span; its results begin at row `partial`.
struct Task {
  int64_t span, head, first, last, partial;
};

// Query row i of a span is token i / repeats, head i % repeats of those that read one kv head.
template <class T>
class CacheAttention {
 public:
  CacheAttention(const at::Tensor& q_nhp, const Spans& spans, double scale, int64_t window, const at::Tensor& k_cache_slkp, const at::Tensor& v_cache_slkp)
      : wide_q_(q_nhp.to(at::kFloat).contiguous()), spans_(spans), scale_(static_cast<float>(scale)), window_(window), H_(q_nhp.size(1)), K_(k_cache_slkp.size(2)),
        P_(q_nhp.size(2)), L_(k_cache_slkp.size(1)), repeats_(H_ / K_), k_(k_cache_slkp.const_data_ptr<T>()), v_(v_cache_slkp.const_data_ptr<T>()) {}

  void run(T* out) {
    std::vector<Task> tasks;
    std::vector<int64_t> ends;  // tasks up to the end of each (span, kv head)
    int64_t rows = 0, keys = 0;
    for (int64_t s = 0; s < spans_.size(); ++s) {
      const Span& span = spans_.list()[s];
      const int64_t low = window_ > 0 ? std::max<int64_t>(0, span.start + 1 - window_) : 0, high = span.start + span.length;
      for (int64_t head = 0; head < K_; ++head) {
        for (int64_t first = low / kBlock * kBlock; first < high; first += kBlock) {
          tasks.push_back({s, head, std::max(first, low), std::min(first + kBlock, high), rows});
          rows += span.length * repeats_;
          keys += (tasks.back().last - tasks.back().first) * span.length;
        }
        ends.push_back(static_cast<int64_t>(tasks.size()));
      }
    }
    acc_.assign(static_cast<size_t>(rows * P_), 0.0f), top_.resize(static_cast<size_t>(rows)), sum_.resize(static_cast<size_t>(rows));
    const int64_t count = static_cast<int64_t>(tasks.size()), work = std::max<int64_t>(1, 2 * keys * repeats_ * P_ / std::max<int64_t>(1, count));
    at::parallel_for(0, count, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) block(tasks[i]);
    });
    int64_t begin = 0;
    for (const int64_t end : ends) join(tasks.data() + begin, end - begin, out), begin = end;
  }

 private:
  void block(const Task& task) {
    const Span& span = spans_.list()[task.span];
    const int64_t T_ = task.last - task.first, rows = span.length * repeats_, ld = K_ * P_;
    const int64_t offset = (span.state_slot * L_ + task.first) * ld + task.head * P_;
    thread_local std::vector<float> scores;
    scores.resize(static_cast<size_t>(rows * kBlock));
    for (int64_t t = 0; t < span.length; ++t)
      dot_rows(wide_q_.const_data_ptr<float>() + ((spans_.rows()[task.span] + t) * H_ + task.head * repeats_) * P_, P_, repeats_, k_ + offset, ld, T_, P_,
               scores.data() + t * repeats_ * kBlock, kBlock);
    for (int64_t r = 0; r < rows; ++r) {
      // What token r / repeats sees of this block.
      const int64_t position = span.start + r / repeats_;
      const int64_t from = window_ > 0 ? std::clamp<int64_t>(position + 1 - window_ - task.first, 0, T_) : 0, to = std::clamp<int64_t>(position + 1 - task.first, 0, T_);
      float* score = scores.data() + r * kBlock;
      float top = -std::numeric_limits<float>::infinity(), sum = 0;
      for (int64_t j = from; j < to; ++j) top = std::max(top, score[j] *= scale_);
      for (int64_t j = from; j < to; ++j) score[j] = vec::exp(score[j] - top);
      for (int64_t j = from; j < to; ++j) sum += score[j];
      std::fill(score, score + from, 0.0f), std::fill(score + to, score + T_, 0.0f);
      top_[task.partial + r] = top, sum_[task.partial + r] = sum;
    }
    add_mixed_rows(scores.data(), kBlock, rows, v_ + offset, ld, T_, P_, acc_.data() + task.partial * P_, P_);
  }

  // Blocks of one span and kv head: sum_b e^(top_b - top) acc_b over sum_b e^(top_b - top) sum_b.
  void join(const Task* tasks, int64_t count, T* out) {
    const Span& span = spans_.list()[tasks->span];
    std::vector<float> mixed(static_cast<size_t>(P_));
    for (int64_t r = 0; r < span.length * repeats_; ++r) {
      float top = -std::numeric_limits<float>::infinity(), sum = 0;
      for (int64_t b = 0; b < count; ++b) top = std::max(top, top_[tasks[b].partial + r]);
      std::fill(mixed.begin(), mixed.end(), 0.0f);
      for (int64_t b = 0; b < count; ++b) {
        const int64_t row = tasks[b].partial + r;
        const float scale = vec::exp(top_[row] - top);
        sum += scale * sum_[row];
        for (int64_t p = 0; p < P_; ++p) mixed[p] += scale * acc_[row * P_ + p];
      }
      T* to = out + ((spans_.rows()[tasks->span] + r / repeats_) * H_ + tasks->head * repeats_ + r % repeats_) * P_;
      for (int64_t p = 0; p < P_; ++p) vec::store(to + p, mixed[p] / sum);
    }
  }

  const at::Tensor wide_q_;
  const Spans& spans_;
  const float scale_;
  const int64_t window_, H_, K_, P_, L_, repeats_;
  const T *k_, *v_;
  std::vector<float> acc_, top_, sum_;  // of each task's query rows
};

}  // namespace

void attend_cache_cpu(const at::Tensor& q_nhp, const Spans& spans, double scale, int64_t window, const at::Tensor& k_cache_slkp,
                      const at::Tensor& v_cache_slkp, const at::Tensor& out_nhp) {
  if (q_nhp.scalar_type() == at::kBFloat16)
    CacheAttention<c10::BFloat16>(q_nhp, spans, scale, window, k_cache_slkp, v_cache_slkp).run(out_nhp.mutable_data_ptr<c10::BFloat16>());
  else CacheAttention<float>(q_nhp, spans, scale, window, k_cache_slkp, v_cache_slkp).run(out_nhp.mutable_data_ptr<float>());
}

}  // namespace tessera
