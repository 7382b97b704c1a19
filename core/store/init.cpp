#include "store/init.hpp"

#include <ATen/Parallel.h>
#include <ATen/core/PhiloxRNGEngine.h>

#include <cmath>
#include <numbers>

namespace tessera {

namespace {

uint64_t fnv1a(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (unsigned char c : text) hash = (hash ^ c) * 0x100000001b3u;
  return hash;
}

// (0, 1], 32 bits.
double unit(uint32_t bits) { return (static_cast<double>(bits) + 1.0) / 4294967296.0; }

}  // namespace

void fill_initial(at::Tensor& out, const Init& init, int64_t seed, std::string_view name, int64_t begin) {
  float* data = out.mutable_data_ptr<float>();
  const int64_t n = out.numel();
  const uint64_t stream = fnv1a(name);
  at::parallel_for(0, n, 1 << 14, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      double value = init.mean;
      if (init.kind != Init::Kind::kConstant) {
        at::Philox4_32 engine(static_cast<uint64_t>(seed), stream, static_cast<uint64_t>(begin + i));
        const double u = unit(engine());
        if (init.kind == Init::Kind::kUniform) value = init.low + (init.high - init.low) * u;
        else value = init.mean + init.std * std::sqrt(-2 * std::log(u)) * std::cos(2 * std::numbers::pi * unit(engine()));
      }
      data[i] = static_cast<float>(init.map ? init.map(value) : value);
    }
  });
}

}  // namespace tessera
