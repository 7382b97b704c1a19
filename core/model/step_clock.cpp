#include "model/step_clock.hpp"

#include <ATen/record_function.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <utility>

#include "memory/tensor_bytes.hpp"

namespace tessera {

namespace {

struct Mark : public torch::autograd::Function<Mark> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, int64_t clock, const std::string& part, const std::string& label) {
    ctx->saved_data["clock"] = clock;
    ctx->saved_data["part"] = part, ctx->saved_data["label"] = label;
    return x.view_as(x);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    reinterpret_cast<StepClock*>(ctx->saved_data["clock"].toInt())->enter(ctx->saved_data["part"].toStringRef(), StepClock::kBackward, ctx->saved_data["label"].toStringRef());
    return {grads[0], at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

struct StepClock::Scope {
  explicit Scope(const std::string& name) : record(at::RecordScope::USER_SCOPE) {
    if (record.isActive()) record.before(name);
  }
  at::RecordFunction record;
};

StepClock::StepClock(at::Device device, Measure measure) : device_(device), measure_(measure) {}
StepClock::~StepClock() = default;

void StepClock::enter(const std::string& part, Phase phase, const std::string& label) {
  if (measure_ == kMemory) return enter_memory(part, phase);
  if (measure_ == kScopes) {
    constexpr const char* kPhases[] = {"forward", "recomputation", "backward"};
    scope_.reset();
    if (!part.empty()) scope_ = std::make_unique<Scope>((label.empty() ? part : label) + ", " + kPhases[phase]);
    return;
  }
  if (!device_.is_cpu()) c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).synchronize();
  const auto now = std::chrono::steady_clock::now();
  if (open_) *open_ += std::chrono::duration<double>(now - since_).count();
  since_ = now;
  open_ = &seconds_[part][phase];
}

void StepClock::enter_memory(const std::string& part, Phase phase) {
  const TensorBytes bytes = tensor_bytes(device_);
  if (held_by_) {
    if (phase_ == kForward) held_by_->kept += bytes.now - held_before_;
    held_by_->most = std::max(held_by_->most, bytes.most - held_before_);
  }
  forget_most_tensor_bytes(device_);
  held_by_ = part.empty() ? nullptr : &memory_[part];
  held_before_ = bytes.now, phase_ = phase;
}

std::map<std::string, StepClock::Memory> StepClock::stop_memory() {
  enter_memory("", kForward);
  return std::exchange(memory_, {});
}

std::map<std::string, StepClock::Seconds> StepClock::stop() {
  enter("", kForward);
  open_ = nullptr;
  seconds_.erase("");
  return std::exchange(seconds_, {});
}

at::Tensor StepClock::mark(const at::Tensor& x, const std::string& part, const std::string& label) { return Mark::apply(x, reinterpret_cast<int64_t>(this), part, label); }

}  // namespace tessera
