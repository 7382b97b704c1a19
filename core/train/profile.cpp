#include "train/profile.hpp"

#include <ATen/Context.h>
#include <torch/csrc/autograd/profiler_kineto.h>

namespace tessera {

namespace profiler = torch::autograd::profiler;
namespace implementation = torch::profiler::impl;

Profile::Profile(bool on, std::filesystem::path file) : on_(on), file_(std::move(file)) {
  if (!on_) return;
  const implementation::ProfilerConfig config(implementation::ProfilerState::KINETO, /*report_input_shapes=*/true);
  std::set<implementation::ActivityType> activities{implementation::ActivityType::CPU};
  if (at::globalContext().hasCUDA()) activities.insert(implementation::ActivityType::CUDA);
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities);
}

Profile::~Profile() {
  if (on_) profiler::disableProfiler()->save(file_.string());
}

}  // namespace tessera
