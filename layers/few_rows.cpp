#include "layers/few_rows.hpp"

#include <ATen/Parallel.h>

#include <algorithm>

#include "layers/row_tiles.hpp"

namespace tessera {
namespace {

constexpr int64_t kBlock = 16;       // columns of a piece of work
constexpr int64_t kGrain = 1 << 16;  // multiply-adds a thread takes at least

// Rows [row, row + rows) of x times one weight.
template <class T>
struct Task {
  const T* w;
  int64_t row, rows;
};

template <class T>
void run(at::Tensor& out_mo, const at::Tensor& x_mk, const std::vector<Task<T>>& tasks, int64_t O, int64_t ldw) {
  const at::Tensor wide_mk = x_mk.to(at::kFloat);
  const int64_t M = x_mk.size(0), K = x_mk.size(1), ldx = wide_mk.stride(0), ldo = out_mo.stride(0), num_tasks = static_cast<int64_t>(tasks.size());
  const float* x = wide_mk.const_data_ptr<float>();
  T* out = out_mo.mutable_data_ptr<T>();
  const int64_t blocks = (O + kBlock - 1) / kBlock, work = std::max<int64_t>(1, kBlock * K * M / std::max<int64_t>(1, num_tasks));
  at::parallel_for(0, blocks * num_tasks, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task<T>& task = tasks[i / blocks];
      const int64_t o = i % blocks * kBlock;
      dot_rows(x + task.row * ldx, ldx, task.rows, task.w + o * ldw, ldw, std::min(kBlock, O - o), K, out + task.row * ldo + o, ldo);
    }
  });
}

template <class F>
void by_type(at::ScalarType type, F f) {
  if (type == at::kBFloat16) f.template operator()<c10::BFloat16>();
  else f.template operator()<float>();
}

}  // namespace

bool few_rows_fit(const at::Tensor& out_mo, const at::Tensor& x_mk, const at::Tensor& w_ok) {
  const auto type = w_ok.scalar_type();
  return x_mk.is_cpu() && (type == at::kFloat || type == at::kBFloat16) && x_mk.scalar_type() == type && out_mo.scalar_type() == type &&
         x_mk.stride(-1) == 1 && w_ok.stride(-1) == 1 && out_mo.stride(-1) == 1;
}

void few_rows(at::Tensor& out_mo, const at::Tensor& x_mk, const at::Tensor& w_ok) {
  by_type(w_ok.scalar_type(), [&]<class T>() {
    run<T>(out_mo, x_mk, {{w_ok.const_data_ptr<T>(), 0, x_mk.size(0)}}, w_ok.size(0), w_ok.stride(0));
  });
}

void few_rows_grouped(at::Tensor& out_mo, const at::Tensor& x_mk, const at::Tensor& w_eok, const std::vector<int64_t>& counts) {
  by_type(w_eok.scalar_type(), [&]<class T>() {
    std::vector<Task<T>> tasks;
    int64_t row = 0;
    for (size_t e = 0; e < counts.size(); row += counts[e++])
      if (counts[e] > 0) tasks.push_back({w_eok.const_data_ptr<T>() + static_cast<int64_t>(e) * w_eok.stride(0), row, counts[e]});
    run<T>(out_mo, x_mk, tasks, w_eok.size(1), w_eok.stride(1));
  });
}

}  // namespace tessera
