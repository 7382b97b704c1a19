// The block contract. A block is a class without tensors: pure functions of (config, env) declare what it needs, `forward` wires operators.
//
//   class Mixer final : public Block {
//    public:
//     static constexpr BlockInfo kInfo{.type = "mixer", .version = 1, ...};
//     struct Config { ... };                                             // plain, with defaults
//     static Schema<Config> schema();                                    // its keys
//     static void check(const Config&, const Env&, Issues&);             // rules across fields; collects, never throws
//     static ParamTable params(const Config&, const Env&);
//     static BufferTable buffers(const Config&, const Env&);             // optional
//     static StateTable state(const Config&, const Env&);                // optional
//     static Cost cost(const Config&, const Env&, const Documents&);
//     static ExchangeTable exchanges(const Config&, const Env&);         // optional: with which ranks of env.mesh it exchanges what, by itself
//     static HfTable hf();                                               // optional: HF words and keys beyond the schema's
//     static void after_step(const Config&, Buffers&, const Counts&);        // optional: once an optimizer step
//     Mixer(const Config&, const Env&);                                  // sizes only
//     at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const override;
//   };
//   TESSERA_PLUGIN(Mixer)                                                // tessera/plugin.hpp
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/context.hpp"
#include "tessera/env.hpp"
#include "tessera/error.hpp"
#include "tessera/exchange.hpp"
#include "tessera/schema.hpp"
#include "tessera/tables.hpp"
#include "tessera/weights.hpp"

namespace tessera {

// How a block's input and output lie over the tensor-parallel ranks. Between blocks tokens are cut over them; the core gathers and reduces at a block's edges.
enum class Layout {
  kFull,            // every rank holds all tokens and all of D; as an output: every rank computed the same
  kSequenceShard,   // every rank holds its share of the tokens
  kPartialSum,      // every rank holds a summand (output only)
};

// The letter of a block in a pattern dialect. Two types may share a letter: `when` names the HF key whose presence (not null) picks this one.
struct Symbol {
  const char* dialect = nullptr;  // "card" or "nemotron"
  char symbol = 0;
  const char* when = nullptr;
};

struct BlockInfo {
  const char* type = nullptr;
  int version = 1;
  Symbol symbols[4] = {};
  Layout input = Layout::kFull;
  Layout output = Layout::kPartialSum;
  // Under context parallelism x_nd holds this rank's pieces of documents: true for a block that treats tokens apart or mixes them through operators
  // that take the Context. Else the core gives it all tokens of the micro-batch, on every context rank, and keeps this rank's part of the result.
  bool takes_pieces = false;
  bool pre_norm = true;   // the core applies RMSNorm before the block
  bool residual = true;   // and adds the block's input to its output
  const char* source = "";
};

// What HF's config.json says of a block beyond its schema's keys.
struct HfTable {
  std::vector<std::string> layer_words;                    // of layers_block_type and layer_types; the first is written
  std::vector<std::string> inert;                          // keys that do not change the mathematics: consumed and kept as found
  std::vector<std::pair<std::string, Value>> must_be;      // keys refused unless they hold this value (or null, or are absent)
  std::vector<std::pair<std::string, Value>> set;          // own keys that an import sets, since HF means this value: {"router_input", "hidden"}
  std::vector<std::string> unsaid;                         // own keys without an HF key that HF's results do not depend on: a chunk length, a loss coefficient
};

using Buffers = std::map<std::string, at::Tensor, std::less<>>;
using Counts = std::map<std::string, at::Tensor, std::less<>>;

class Block {
 public:
  virtual ~Block();
  // x_nd: [N, D] in the compute dtype, normed where BlockInfo says so -> [N, D]. Training, prefill and decoding alike: ctx says which.
  virtual at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const = 0;
};

// A prediction head: passes run after the main stack, each with own input, inner stack (the pattern's `/` part) and target offset.
// Its own two parts treat tokens apart: over several ranks each has its tokens only, and its parameters are `replicated()`.
struct HeadInfo {
  const char* type = nullptr;
  int version = 1;
  const char* source = "";
};

struct HeadPass {
  int64_t shift = 1;          // embeds the id `shift` tokens ahead; token id 0 beyond the document's end
  int64_t offset = 2;         // predicts the id `offset` tokens ahead
  int64_t weight_set = 0;     // which set of parameters (and of inner layers) this pass uses
  double loss_weight = 0;     // of this pass's mean loss in the total
  double aux_weight = 1;      // of its inner layers' auxiliary losses
  std::string name;           // "mtp.1"
};

class Head {
 public:
  virtual ~Head();
  // hidden_nd: the previous pass's result, or the main stack after its final norm; embedded_nd: embeddings of the shifted ids. -> input of the inner stack.
  virtual at::Tensor before(const at::Tensor& hidden_nd, const at::Tensor& embedded_nd, const Weights& w, Context& ctx) const = 0;
  // Output of the inner stack -> what the shared lm_head reads and the next pass takes.
  virtual at::Tensor after(const at::Tensor& x_nd, const Weights& w, Context& ctx) const = 0;
};

using ConfigPtr = std::shared_ptr<void>;  // a plugin's own Config

// A block or head type as the core sees it: the static functions of the class behind one virtual table.
class ElementType {
 public:
  virtual ~ElementType();
  virtual std::string_view type() const = 0;
  virtual int version() const = 0;
  virtual std::string_view source() const = 0;
  virtual const Fields& fields() const = 0;
  virtual const HfTable& hf() const = 0;
  virtual ConfigPtr make_config() const = 0;
  virtual ConfigPtr copy_config(const ConfigPtr&) const = 0;
  virtual void check(const ConfigPtr&, const Env&, Issues&) const = 0;
  virtual ParamTable params(const ConfigPtr&, const Env&) const = 0;
  virtual Cost cost(const ConfigPtr&, const Env&, const Documents&) const = 0;
};

class BlockType : public ElementType {
 public:
  ~BlockType() override;
  virtual const BlockInfo& info() const = 0;
  virtual BufferTable buffers(const ConfigPtr&, const Env&) const = 0;
  virtual StateTable state(const ConfigPtr&, const Env&) const = 0;
  virtual bool has_after_step() const = 0;
  virtual void after_step(const ConfigPtr&, Buffers&, const Counts&) const = 0;
  virtual std::unique_ptr<Block> make(const ConfigPtr&, const Env&) const = 0;
  virtual ExchangeTable exchanges(const ConfigPtr&, const Env&) const = 0;
};

class HeadType : public ElementType {
 public:
  ~HeadType() override;
  virtual const HeadInfo& info() const = 0;
  virtual std::vector<HeadPass> passes(const ConfigPtr&) const = 0;
  virtual std::unique_ptr<Head> make(const ConfigPtr&, const Env&) const = 0;
};

}  // namespace tessera
