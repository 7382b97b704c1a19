// tessera new-plugin: a block that builds and trains as it is, to be changed into another one.
#include <fmt/format.h>

#include <cctype>
#include <filesystem>
#include <string_view>

#include "checkpoint/file.hpp"
#include "cli/verbs.hpp"

namespace tessera {

namespace {

namespace fs = std::filesystem;

constexpr const char* kTemplate = R"(// @CLASS@: a gated feed-forward block, y = down_proj(silu(gate x) * (up x)), as a start.
// Letters: N tokens, D hidden, F intermediate width.
#include <ATen/ops/mul.h>
#include <ATen/ops/silu.h>

#include <cmath>

#include "layers/linear.hpp"
#include "tessera/plugin.hpp"

namespace {

using namespace tessera;

class @CLASS@ final : public Block {
 public:
  static constexpr BlockInfo kInfo{.type = "@NAME@", .version = 1, .symbols = {{"card", '@SYMBOL@'}}, .source = "arXiv:2002.05202"};

  struct Config {
    int64_t intermediate_size = 0;
  };

  static Schema<Config> schema() {
    Schema<Config> s;
    s.field("intermediate_size", &Config::intermediate_size, "width of the hidden layer").required().range(1);
    return s;
  }

  // Rules across fields: issues.add("intermediate_size", "must ..., got ...").
  static void check(const Config&, const Env&, Issues&) {}

  // One packed matrix of two segments; every tensor-parallel rank gets its share of each.
  static ParamTable params(const Config& c, const Env& env) {
    const int64_t F = c.intermediate_size, D = env.hidden_size;
    const double out_std = env.init_std / std::sqrt(static_cast<double>(env.num_layers));
    return {
        {.name = "gate_up_proj.weight", .shape = {2 * F, D}, .shards = {{Axis::kTensor, 0}}, .segments = {{"gate", F}, {"up", F}},
         .init = Init::normal(env.init_std)},
        {.name = "down_proj.weight", .shape = {D, F}, .shards = {{Axis::kTensor, 1}}, .init = Init::normal(out_std)},
    };
  }

  static Cost cost(const Config& c, const Env& env, const Documents& documents) {
    const double N = static_cast<double>(num_tokens(documents)), D = static_cast<double>(env.hidden_size), F = static_cast<double>(c.intermediate_size);
    return {.matmul = 6 * N * D * F, .elementwise = 5 * N * F, .bytes = N * (2 * D + 6 * F), .activations = N * (D + 4 * F)};
  }

  @CLASS@(const Config&, const Env&) {}

  at::Tensor forward(const at::Tensor& x_nd, const Weights& w, Context& ctx) const override {
    const at::Tensor gate_up = linear(ctx, x_nd, w["gate_up_proj.weight"]);
    const int64_t half = gate_up.size(1) / 2;
    const at::Tensor h_nf = at::mul(at::silu(gate_up.narrow(1, 0, half)), gate_up.narrow(1, half, half));
    return partial_sum_linear(ctx, h_nf, w["down_proj.weight"]);
  }
};

}  // namespace

TESSERA_PLUGIN(@CLASS@)
)";

// "gated_mlp" -> "GatedMlpBlock": the ending keeps it apart from the names of the contract.
std::string class_name(const std::string& name) {
  std::string out;
  bool upper = true;
  for (const char c : name) {
    if (c != '_') out += upper ? static_cast<char>(std::toupper(static_cast<unsigned char>(c))) : c;
    upper = c == '_';
  }
  return out + "Block";
}

void replace_all(std::string& text, const std::string& from, const std::string& to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) text.replace(at, from.size(), to);
}

// What `symbol` is in the card dialect, or "".
std::string holder(const Registry& registry, char symbol) {
  for (const BlockType* type : registry.blocks())
    for (const Symbol& used : type->info().symbols)
      if (used.dialect && used.symbol == symbol && std::string_view(used.dialect) == "card") return std::string(type->type());
  return {};
}

std::string free_letters(const Registry& registry) {
  std::string letters;
  for (char c = 'A'; c <= 'Z'; ++c)
    if (holder(registry, c).empty()) letters += fmt::format("{}{}", letters.empty() ? "" : " ", c);
  return letters;
}

int write_plugin(const std::string& name, const std::string& symbol, const std::string& folder) {
  const auto lower = [](unsigned char c) { return c >= 'a' && c <= 'z'; };
  bool good = !name.empty() && lower(name[0]);
  for (unsigned char c : name) good = good && (lower(c) || (c >= '0' && c <= '9') || c == '_');
  if (!good) throw Error(ExitCode::kUsage, fmt::format("NAME: must be lower case letters, digits and '_', beginning with a letter, got {}", to_toml(Value(name))));
  const bool printable = symbol.size() == 1 && symbol[0] > 0x20 && symbol[0] < 0x7f;
  if (!printable || std::string_view("|/'\\").find(symbol[0]) != std::string_view::npos)
    throw Error(ExitCode::kUsage, fmt::format("--symbol: must be one printable ASCII character other than | / ' and \\, got {}", to_toml(Value(symbol))));
  if (!fs::is_directory(folder))
    throw Error(ExitCode::kUsage, fmt::format("--folder: no folder {}", to_toml(Value(folder))), "run it where plugins/ is, or name a folder that exists");
  const fs::path file = fs::path(folder) / (name + ".cpp");
  if (fs::exists(file)) throw Error(ExitCode::kUsage, fmt::format("{}: exists already", file.string()), "choose another NAME");
  const Registry registry = load_registry();
  if (const fs::path& other = registry.file_of(name); !other.empty())
    throw Error(ExitCode::kUsage, fmt::format("NAME: type '{}' is there already, from {}", name, other.string()), "choose another NAME");
  if (const std::string type = holder(registry, symbol[0]); !type.empty())
    throw Error(ExitCode::kUsage, fmt::format("--symbol: '{}' is {} in the card dialect", symbol, type),
                fmt::format("free: {}; [symbols] of a configuration can bind any letter to any block", free_letters(registry)));
  std::string text = kTemplate;
  replace_all(text, "@CLASS@", class_name(name));
  replace_all(text, "@NAME@", name);
  replace_all(text, "@SYMBOL@", symbol);
  write_file(file, text);
  fmt::print("{}: written, a gated feed-forward block to change into yours. The next ./tessera command builds it:\n"
             "  ./tessera describe {}\n"
             "  ./tessera train configs/debug_model.toml --set 'model.hybrid_override_pattern=M{}*{}' --set blocks.{}.intermediate_size=256 --set run.name={}\n"
             "docs/adding_a_block.md explains each part.\n",
             file.string(), name, symbol, symbol, name, name);
  return 0;
}

}  // namespace

void add_new_plugin(CLI::App& app, Run& run) {
  struct Options {
    std::string name, symbol, folder = "plugins";
  };
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("new-plugin", "writes a new block's file, which builds and trains as it is");
  verb->add_option("NAME", o->name, "the block type")->required();
  verb->add_option("--symbol", o->symbol, "its letter in the card dialect")->required();
  verb->add_option("--folder", o->folder, "where plugins are built from")->capture_default_str();
  verb->callback([o, &run] { run = [o] { return write_plugin(o->name, o->symbol, o->folder); }; });
}

}  // namespace tessera
