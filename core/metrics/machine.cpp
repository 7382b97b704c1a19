#include "metrics/machine.hpp"

#include "layers/matmul.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <functional>
#include <limits>
#include <string>
#include <thread>

namespace tessera {

namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Work on a GPU is done when one of its numbers has reached the host.
void wait_for(const at::Tensor& tensor) {
  if (!tensor.is_cpu()) tensor.view(-1).narrow(0, 0, 1).cpu();
}

double time_of(const std::function<at::Tensor()>& work) {
  const double start = seconds();
  wait_for(work());
  return seconds() - start;
}

struct Product {
  at::Tensor a, b, out;
  Product(int64_t n, at::ScalarType dtype, at::Device device) {
    const auto options = at::TensorOptions().dtype(dtype).device(device);
    // A GPU draws less power, and runs faster, where all numbers are alike.
    a = device.is_cpu() ? at::ones({n, n}, options) : at::randn({n, n}, options);
    b = device.is_cpu() ? at::ones({n, n}, options) : at::randn({n, n}, options);
    out = at::empty({n, n}, options);
  }
  at::Tensor operator()() {
    product_into(out, a, b);
    return out;
  }
};

}  // namespace

double measure_matrix_peak(at::ScalarType dtype, at::Device device) {
  const at::NoGradGuard no_grad;
  const bool cpu = device.is_cpu();
  // Sizes grow from one that even an emulated dtype finishes at once, as far as several products fit into the time.
  constexpr double kSeconds = 0.2;
  const int64_t largest = cpu ? 2048 : 8192;
  // A GPU needs several in flight for the launch not to count.
  const int in_flight = cpu ? 1 : 8;
  double best = 0;
  for (int64_t n = 128; n <= largest; n *= 2) {
    const double flops = 2.0 * static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n) * in_flight;
    // The time of a small product says little on a busy machine, so it stops the search only where it is hopeless.
    if (best > 0 && (n <= 512 ? flops / best > 0.5 : 4 * flops / best > kSeconds)) break;
    Product product(n, dtype, device);
    const auto several = [&] {
      for (int i = 1; i < in_flight; ++i) product();
      return product();
    };
    time_of(several);
    const double start = seconds();
    for (int tries = 0; tries < 3 || seconds() - start < kSeconds / 5; ++tries) best = std::max(best, flops / time_of(several));
  }
  return best;
}

double measure_memory_peak(at::Device device) {
  const at::NoGradGuard no_grad;
  const int64_t bytes = device.is_cpu() ? int64_t{128} << 20 : int64_t{1} << 30;
  const auto options = at::TensorOptions().dtype(at::kByte).device(device);
  const at::Tensor from = at::ones({bytes}, options), to = at::zeros({bytes}, options);
  double best = 0;
  const double start = seconds();
  for (int tries = 0; tries < 3 || seconds() - start < 0.2; ++tries)
    best = std::max(best, 2 * static_cast<double>(bytes) / time_of([&] { return to.copy_(from); }));
  return best;
}

bool supports_fast_bf16() {
  const at::NoGradGuard no_grad;
  constexpr int64_t kSize = 256;
  Product narrow(kSize, at::kBFloat16, at::kCPU), wide(kSize, at::kFloat, at::kCPU);
  narrow(), wide();
  double narrow_time = std::numeric_limits<double>::infinity(), wide_time = narrow_time;
  for (int i = 0; i < 7; ++i) {
    narrow_time = std::min(narrow_time, time_of([&] { return narrow(); }));
    wide_time = std::min(wide_time, time_of([&] { return wide(); }));
  }
  return narrow_time < wide_time;
}

void forget_peak_memory() { std::ofstream("/proc/self/clear_refs") << "5"; }

int64_t peak_memory_bytes() {
  // VmHWM is of this program; ru_maxrss also counts what ran in the process before it.
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    int64_t kib = 0;
    if (word == "VmHWM:" && status >> kib) return kib * 1024;
  }
  struct rusage usage;
  ::getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss * 1024;
}

int64_t current_memory_bytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("model name"))
      if (const size_t colon = line.find(": "); colon != std::string::npos) return line.substr(colon + 2);
  return "unknown processor";
}

std::string machine_text() {
  return fmt::format("{}, {} cores, tessera {}", processor_name(), std::thread::hardware_concurrency(), TESSERA_VERSION);
}

}  // namespace tessera
