#include "train/profile.hpp"

#include <ATen/Context.h>
#include <torch/csrc/autograd/profiler_kineto.h>

namespace tessera {

namespace profiler = torch::autograd::profiler;
namespace implementation = torch::profiler::impl;

Profile::Profile(std::filesystem::path file) : file_(std::move(file)) {
  const implementation::ProfilerConfig config(implementation::ProfilerState::KINETO, /*report_input_shapes=*/true);
  std::set<implementation::ActivityType> activities{implementation::ActivityType::CPU};
  if (at::globalContext().hasCUDA()) activities.insert(implementation::ActivityType::CUDA);
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities, {at::RecordScope::FUNCTION, at::RecordScope::USER_SCOPE, at::RecordScope::BACKWARD_FUNCTION});
}

Profile::~Profile() {
  profiler::disableProfiler()->save(file_.string());
}

}  // namespace tessera
