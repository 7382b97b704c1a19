// A block that does next to nothing, and in which one rank is killed, stopped or hangs, in the forward or backward pass that its table names. Or it waits for
// a file `victim`, kills the process whose number is in it, and goes on.
// Letters: N tokens, D hidden.
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iostream>

#include "tessera/plugin.hpp"

namespace {

using namespace tessera;

void stop(const std::string& act, const char* pass) {
  std::cerr << "rank " + std::string(std::getenv("RANK")) + " reached the " + pass + " pass\n" << std::flush;
  if (act == "kill") ::raise(SIGKILL);
  if (act == "stop") ::raise(SIGSTOP);
  for (pid_t victim; true; ::usleep(5000))
    if (act == "kill_other" && std::ifstream("victim") >> victim) {
      ::kill(victim, SIGKILL);
      return;
    }
}

struct StopInBackward : torch::autograd::Function<StopInBackward> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x_nd, const std::string& act) {
    ctx->saved_data["act"] = act;
    return x_nd.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    stop(ctx->saved_data["act"].toStringRef(), "backward");
    return {grads[0], {}};
  }
};

class Stopping final : public Block {
 public:
  static constexpr BlockInfo kInfo{.type = "stopping", .input = Layout::kSequenceShard, .output = Layout::kSequenceShard, .takes_pieces = true, .source = "made up"};
  struct Config {
    std::string act = "hang", pass = "forward";
    int64_t rank = -1, after = 0;
  };
  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("act", &Config::act, "what becomes of the rank").choices({"kill", "kill_other", "stop", "hang"});
    s.field("pass", &Config::pass, "where").choices({"forward", "backward"});
    s.field("rank", &Config::rank, "the rank; -1: none").range(-1);
    s.field("after", &Config::after, "micro-batches that it is left alone for");
    return s;
  }
  static void check(const Config&, const Env&, Issues&) {}
  static ParamTable params(const Config&, const Env& env) { return {{.name = "gain", .shape = {env.hidden_size}, .shards = replicated(), .init = Init::constant(1)}}; }
  static Cost cost(const Config&, const Env& env, const Documents& documents) {
    const double n = static_cast<double>(num_tokens(documents) * env.hidden_size);
    return {.elementwise = n, .bytes = 2 * n, .activations = n};
  }
  Stopping(const Config& config, const Env&) : c_(config) {}

  at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const override {
    const at::Tensor y_nd = at::mul(x_nd, w["gain"].tensor());
    const char* rank = std::getenv("RANK");
    if (!ctx.training() || ctx.replaying() || !rank || std::to_string(c_.rank) != rank || seen_++ != c_.after) return y_nd;
    if (c_.pass == "backward") return StopInBackward::apply(y_nd, c_.act);
    stop(c_.act, "forward");
    return y_nd;
  }

 private:
  Config c_;
  mutable int64_t seen_ = 0;
};

}  // namespace

TESSERA_PLUGIN(Stopping)
