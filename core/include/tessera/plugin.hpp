// The plugin's entry: TESSERA_PLUGIN(Type, ...) at the end of its one file.
#pragma once
#include <concepts>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "tessera/block.hpp"
#include "tessera/build_key.hpp"

namespace tessera {

// Build key of tessera_core itself; a plugin whose key differs is refused.
const char* core_build_key();

struct Manifest {
  std::vector<std::unique_ptr<BlockType>> blocks;
  std::vector<std::unique_ptr<HeadType>> heads;
};

// Read before any C++ type is touched: plain data, checked field by field.
struct PluginHead {
  uint32_t size = sizeof(PluginHead);
  uint32_t abi = TESSERA_ABI;
  const char* build_key = nullptr;
  uint32_t block_type_size = sizeof(BlockType), head_type_size = sizeof(HeadType), param_size = sizeof(Param), field_size = sizeof(Field);
  Manifest* (*make)() = nullptr;  // may throw; the loader catches
};

namespace detail {

template <class T, class Base>
class ElementTypeOf : public Base {
 public:
  using Config = typename T::Config;
  std::string_view type() const override { return T::kInfo.type; }
  int version() const override { return T::kInfo.version; }
  std::string_view source() const override { return T::kInfo.source; }
  const Fields& fields() const override { return schema_; }
  const HfTable& hf() const override { return hf_; }
  ConfigPtr make_config() const override { return std::make_shared<Config>(); }
  ConfigPtr copy_config(const ConfigPtr& c) const override { return std::make_shared<Config>(config(c)); }
  void check(const ConfigPtr& c, const Env& env, Issues& issues) const override { T::check(config(c), env, issues); }
  ParamTable params(const ConfigPtr& c, const Env& env) const override { return T::params(config(c), env); }
  Cost cost(const ConfigPtr& c, const Env& env, const Documents& documents) const override { return T::cost(config(c), env, documents); }

 protected:
  static const Config& config(const ConfigPtr& c) { return *static_cast<const Config*>(c.get()); }

 private:
  static HfTable hf_table() {
    if constexpr (requires { T::hf(); }) return T::hf();
    else return {};
  }
  Schema<Config> schema_ = T::schema();
  HfTable hf_ = hf_table();
};

template <class T>
class BlockTypeOf final : public ElementTypeOf<T, BlockType> {
  using Base = ElementTypeOf<T, BlockType>;
  using Config = typename T::Config;
  static constexpr bool kAfterStep = requires(const Config& c, Buffers& b, const Counts& n) { T::after_step(c, b, n); };

 public:
  const BlockInfo& info() const override { return T::kInfo; }
  BufferTable buffers(const ConfigPtr& c, const Env& env) const override {
    if constexpr (requires { T::buffers(Base::config(c), env); }) return T::buffers(Base::config(c), env);
    else return {};
  }
  StateTable state(const ConfigPtr& c, const Env& env) const override {
    if constexpr (requires { T::state(Base::config(c), env); }) return T::state(Base::config(c), env);
    else return {};
  }
  ExchangeTable exchanges(const ConfigPtr& c, const Env& env) const override {
    if constexpr (requires { T::exchanges(Base::config(c), env); }) return T::exchanges(Base::config(c), env);
    else return {};
  }
  bool has_after_step() const override { return kAfterStep; }
  void after_step(const ConfigPtr& c, Buffers& buffers, const Counts& counts) const override {
    if constexpr (kAfterStep) T::after_step(Base::config(c), buffers, counts);
  }
  std::unique_ptr<Block> make(const ConfigPtr& c, const Env& env) const override { return std::make_unique<T>(Base::config(c), env); }
};

template <class T>
class HeadTypeOf final : public ElementTypeOf<T, HeadType> {
  using Base = ElementTypeOf<T, HeadType>;

 public:
  const HeadInfo& info() const override { return T::kInfo; }
  std::vector<HeadPass> passes(const ConfigPtr& c) const override { return T::passes(Base::config(c)); }
  std::unique_ptr<Head> make(const ConfigPtr& c, const Env& env) const override { return std::make_unique<T>(Base::config(c), env); }
};

template <class T>
void add_to(Manifest& manifest) {
  if constexpr (std::derived_from<T, Head>) manifest.heads.push_back(std::make_unique<HeadTypeOf<T>>());
  else manifest.blocks.push_back(std::make_unique<BlockTypeOf<T>>());
}

template <class... T>
Manifest* make_manifest() {
  auto manifest = std::make_unique<Manifest>();
  (add_to<T>(*manifest), ...);
  return manifest.release();
}

}  // namespace detail

}  // namespace tessera

#define TESSERA_PLUGIN(...)                                                              \
  extern "C" __attribute__((visibility("default"))) const ::tessera::PluginHead* tessera_plugin_3() { \
    static const ::tessera::PluginHead head{.build_key = TESSERA_BUILD_KEY,              \
                                            .make = &::tessera::detail::make_manifest<__VA_ARGS__>}; \
    return &head;                                                                        \
  }
