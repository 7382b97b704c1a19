// Block and head types without mathematics, for tests of what the core reads from them.
#pragma once
#include "plugin/registry.hpp"
#include "tessera/plugin.hpp"

namespace tessera::fake {

struct Nothing : Block {
  static ParamTable params(const auto&, const Env&) { return {}; }
  static Cost cost(const auto&, const Env&, const Documents&) { return {}; }
  at::Tensor forward(const at::Tensor& x_nd, const Weights&, Context&) const override { return x_nd; }
};

struct Scan final : Nothing {
  static constexpr BlockInfo kInfo{.type = "scan", .symbols = {{"card", 'M'}, {"nemotron", 'M'}}, .source = "arXiv:0000.00000"};
  struct Config {
    int64_t num_heads = 0, num_groups = 1, state_size = 128;
    std::vector<double> limit{0, std::numeric_limits<double>::infinity()};
    bool bias = false;
    std::string norm = "rms";
  };
  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("num_heads", &Config::num_heads, "heads").required().range(1).hf({"mamba_num_heads", "num_heads"});
    s.field("num_groups", &Config::num_groups, "groups").range(1);
    s.field("state_size", &Config::state_size, "state of a channel").range(1, 4096);
    s.field("limit", &Config::limit, "clamp of the step").length(2).range(0).may_be_infinite();
    s.field("bias", &Config::bias, "adds a bias");
    s.field("norm", &Config::norm, "the norm").choices({"rms", "layer"});
    return s;
  }
  static void check(const Config& c, const Env& env, Issues& issues) {
    if (c.num_heads % c.num_groups != 0)
      issues.add("num_heads", "must be a multiple of num_groups, got " + std::to_string(c.num_heads) + " % " + std::to_string(c.num_groups) + " = " +
                                  std::to_string(c.num_heads % c.num_groups));
  }
  static ParamTable params(const Config& c, const Env& env) {
    return {{.name = "in.weight", .shape = {c.num_heads, env.hidden_size}, .shards = {{Axis::kTensor, 0, 1}}, .init = Init::normal(env.init_std)},
            {.name = "A", .shape = {c.num_heads}, .shards = replicated(), .init = Init::constant(1), .decay = false, .fp32 = true, .hf_name = "mixer.A_log"}};
  }
  Scan(const Config&, const Env&) {}
};

// One field, one letter per dialect.
template <int kKind>
struct Small final : Nothing {
  static constexpr BlockInfo kInfo = kKind == 0   ? BlockInfo{.type = "attn", .symbols = {{"card", '*'}, {"nemotron", '*'}}}
                                     : kKind == 1 ? BlockInfo{.type = "dense", .symbols = {{"card", 'E'}, {"nemotron", '-'}}}
                                     : kKind == 2 ? BlockInfo{.type = "experts", .symbols = {{"card", 'O'}, {"nemotron", 'E'}}}
                                                  : BlockInfo{.type = "latent_experts", .symbols = {{"card", 'L'}, {"nemotron", 'E', "moe_latent_size"}}};
  struct Config {
    int64_t width = 4;
  };
  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("width", &Config::width, "width").range(1);
    return s;
  }
  static void check(const Config& c, const Env&, Issues&) {
    if (c.width == 13) throw std::runtime_error("thirteen");
  }
  Small(const Config&, const Env&) {}
};

template <int kKind>
struct SmallHead final : Head {
  static constexpr HeadInfo kInfo{.type = kKind == 0 ? "ahead" : "other"};
  struct Config {
    int64_t depths = 1;
    double loss_scale = 0.1;
  };
  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("depths", &Config::depths, "passes").range(1);
    s.field("loss_scale", &Config::loss_scale, "share of the loss").range(0);
    return s;
  }
  static void check(const Config&, const Env&, Issues&) {}
  static ParamTable params(const Config&, const Env&) { return {}; }
  static Cost cost(const Config&, const Env&, const Documents&) { return {}; }
  static std::vector<HeadPass> passes(const Config&) { return {HeadPass{}}; }
  SmallHead(const Config&, const Env&) {}
  at::Tensor before(const at::Tensor& hidden_nd, const at::Tensor&, const Weights&, Context&) const override { return hidden_nd; }
  at::Tensor after(const at::Tensor& x_nd, const Weights&, Context&) const override { return x_nd; }
};

template <class... T>
Registry registry_of() {
  return Registry::of(std::unique_ptr<Manifest>(detail::make_manifest<T...>()));
}

inline Registry registry() { return registry_of<Scan, Small<0>, Small<1>, Small<2>, Small<3>, SmallHead<0>>(); }

}  // namespace tessera::fake
