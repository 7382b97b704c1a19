#include "cli/describe.hpp"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "config/config.hpp"
#include "sweep/patterns.hpp"
#include "sweep/sweep.hpp"

namespace tessera {

namespace {
constexpr auto kSweep = "sweep";
using Row = std::vector<std::string>;

struct Grid {
  std::string title;
  Row header;
  std::vector<Row> rows;
};
// A type or table as facts and grids, before it is text of either kind.
struct Sheet {
  std::string title;
  std::vector<std::pair<std::string, std::string>> facts;
  std::vector<Grid> grids;
};

template <class T, class F>
std::string join(const T& list, F text) {
  std::string out;
  for (const auto& item : list) out += (out.empty() ? "" : ", ") + text(item);
  return out;
}
std::string join(const std::vector<std::string>& list) {
  return join(list, [](const std::string& s) { return s; });
}
std::string shape_text(const std::vector<int64_t>& shape) {
  return "[" + join(shape, [](int64_t n) { return std::to_string(n); }) + "]";
}

Grid key_grid(const std::string& title, const Fields& fields, bool of_type) {
  Grid grid{title, {"key", "values", "default", "unit", "meaning"}, {}};
  if (of_type) grid.header.push_back("HF key");
  for (const Field& f : fields.list) {
    Row row{f.key, domain(f), f.required_ ? "required" : to_toml(f.default_value), f.unit_, f.doc + (f.source_.empty() ? "" : " (" + f.source_ + ")")};
    if (of_type) row.push_back(join(f.hf_keys_));
    grid.rows.push_back(std::move(row));
  }
  return grid;
}

std::string init_text(const Init& init) {
  if (init.kind == Init::Kind::kConstant) return fmt::format("{:g}", init.mean);
  const std::string drawn = init.kind == Init::Kind::kNormal ? fmt::format("normal({:.4g}, {:.4g})", init.mean, init.std) : fmt::format("uniform({:.4g}, {:.4g})", init.low, init.high);
  return drawn + (init.map ? ", mapped" : "");
}

std::string shard_text(const std::vector<Shard>& shards, const std::vector<Segment>& segments) {
  if (shards.empty()) return "replicated";
  std::string out = join(shards, [](const Shard& s) { return fmt::format("{} dim {}", axis_name(s.axis), s.dim) + (s.unit > 1 ? fmt::format(" by {}", s.unit) : ""); });
  if (!segments.empty())
    out += ": " + join(segments, [](const Segment& s) { return fmt::format("{} {}", s.name, s.size) + (s.unit > 1 ? fmt::format(" by {}", s.unit) : ""); });
  return out;
}

}  // namespace

ConfigPtr example_config(const ElementType& type, const Env& env, std::vector<std::pair<std::string, Value>>& given) {
  for (const int64_t n : {8, 4, 2, 16, 1, 32}) {
    ConfigPtr config = type.make_config();
    given.clear();
    bool legal = true;
    for (const Field& f : type.fields().list) {
      if (!f.required_) continue;
      Value value = n;
      if (std::holds_alternative<double>(f.default_value)) value = static_cast<double>(n);
      if (std::holds_alternative<std::string>(f.default_value)) value = f.choices_.empty() ? "x" : f.choices_[0];
      legal = legal && broken_rule(f, value).empty();
      if (!legal) break;
      f.set(config.get(), value);
      given.emplace_back(f.key, value);
    }
    Issues issues;
    if (legal) type.check(config, env, issues);
    if (legal && issues.empty()) return config;
  }
  return nullptr;
}

namespace {

void add_rows(Sheet& sheet, const ElementType& type, const BlockType* block) {
  const Env env{.hidden_size = 64, .vocab_size = 256, .num_layers = 4};
  std::vector<std::pair<std::string, Value>> given;
  const ConfigPtr config = example_config(type, env, given);
  if (!config) return;
  std::string sizes = fmt::format("hidden_size = {}", env.hidden_size);
  for (const auto& [key, value] : given) sizes += fmt::format(", {} = {}", key, to_toml(value));
  Grid params{"parameters, with " + sizes, {"name", "shape", "cut", "dtype", "weight decay", "initial values", "HF name"}, {}};
  const auto hf = [&](const std::string& name, const std::string& given) { return given.empty() ? (block ? "mixer." + name : name) : given; };
  for (const Param& p : type.params(config, env))
    params.rows.push_back({p.name, shape_text(p.shape), shard_text(p.shards, p.segments), p.fp32 ? "float32" : "compute", p.decay ? "yes" : "no", init_text(p.init), hf(p.name, p.hf_name)});
  if (!params.rows.empty()) sheet.grids.push_back(std::move(params));
  if (!block) return;
  Grid buffers{"buffers", {"name", "shape", "initial value", "HF name"}, {}};
  for (const Buffer& b : block->buffers(config, env)) buffers.rows.push_back({b.name, shape_text(b.shape), fmt::format("{:g}", b.init), hf(b.name, b.hf_name)});
  if (!buffers.rows.empty()) sheet.grids.push_back(std::move(buffers));
  Grid state{"decode state", {"name", "shape", "kept per", "cut", "dtype"}, {}};
  for (const State& s : block->state(config, env))
    state.rows.push_back({s.name, shape_text(s.shape), s.per == State::Per::kToken ? "token" : "sequence", shard_text(s.shards, {}), s.fp32 ? "float32" : "compute"});
  if (!state.rows.empty()) sheet.grids.push_back(std::move(state));
}

const char* layout_name(Layout layout) {
  switch (layout) {
    case Layout::kFull: return "all tokens and channels on every tensor rank";
    case Layout::kSequenceShard: return "tokens cut over the tensor ranks";
    case Layout::kPartialSum: return "a summand on every tensor rank";
  }
  return "";
}

void add_hf(Sheet& sheet, const HfTable& hf) {
  const auto pairs = [](const auto& list) {
    return join(list, [](const auto& pair) { return pair.first + " = " + to_toml(pair.second); });
  };
  const auto fact = [&](const char* name, std::string text) {
    if (!text.empty()) sheet.facts.emplace_back(name, std::move(text));
  };
  fact("HF layer words", join(hf.layer_words));
  fact("HF keys that must be", pairs(hf.must_be));
  fact("set by an import", pairs(hf.set));
  fact("HF keys without effect", join(hf.inert));
}

Sheet sheet_of(const BlockType& type) {
  const BlockInfo& info = type.info();
  Sheet sheet{.title = fmt::format("block {}, version {}", info.type, info.version)};
  std::string letters;
  for (const Symbol& s : info.symbols)
    if (s.dialect) letters += fmt::format("{}'{}' in dialect {}{}", letters.empty() ? "" : ", ", s.symbol, s.dialect, s.when ? fmt::format(" where HF has {}", s.when) : "");
  if (*type.source().data()) sheet.facts.emplace_back("source", type.source());
  sheet.facts.emplace_back("letters", letters.empty() ? "none: bind one in [symbols]" : letters);
  sheet.facts.emplace_back("takes", layout_name(info.input));
  sheet.facts.emplace_back("gives", layout_name(info.output));
  sheet.facts.emplace_back("around it", fmt::format("{}, {}", info.pre_norm ? "RMSNorm before" : "no norm", info.residual ? "residual" : "no residual"));
  add_hf(sheet, type.hf());
  sheet.grids.push_back(key_grid(fmt::format("keys of [blocks.{}]", info.type), type.fields(), true));
  add_rows(sheet, type, &type);
  return sheet;
}

Sheet sheet_of(const HeadType& type) {
  Sheet sheet{.title = fmt::format("head {}, version {}", type.type(), type.version())};
  if (*type.source().data()) sheet.facts.emplace_back("source", type.source());
  add_hf(sheet, type.hf());
  sheet.grids.push_back(key_grid(fmt::format("keys of [heads.{}]", type.type()), type.fields(), true));
  add_rows(sheet, type, nullptr);
  return sheet;
}

Grid grid_of(const ConfigTable& table) { return key_grid(fmt::format("[{}]: {}", table.name, table.doc), table.fields, false); }

// Columns that are empty everywhere say nothing.
std::vector<size_t> used_columns(const Grid& grid) {
  std::vector<size_t> used;
  for (size_t i = 0; i < grid.header.size(); ++i)
    if (std::any_of(grid.rows.begin(), grid.rows.end(), [&](const Row& row) { return !row[i].empty(); })) used.push_back(i);
  return used;
}

std::string text_of(const Grid& grid) {
  const auto used = used_columns(grid);
  std::vector<size_t> width(grid.header.size(), 0);
  const auto widen = [&](const Row& row) { for (size_t i : used) width[i] = std::max(width[i], row[i].size()); };
  widen(grid.header);
  for (const Row& row : grid.rows) widen(row);
  const auto line = [&](const Row& row) {
    std::string out = " ";
    for (size_t i : used) out += fmt::format(" {:{}} ", row[i], width[i]);
    return out.substr(0, out.find_last_not_of(' ') + 1) + "\n";
  };
  std::string out = "\n" + grid.title + "\n";
  if (grid.rows.empty()) return out + "  none\n";
  out += line(grid.header);
  for (const Row& row : grid.rows) out += line(row);
  return out;
}

std::string markdown_of(const Grid& grid) {
  const auto used = used_columns(grid);
  const auto line = [&](const Row& row) {
    std::string out = "|";
    for (size_t i : used) {
      out += ' ';
      for (char c : row[i]) out += c == '|' ? "\\|" : std::string(1, c);
      out += " |";
    }
    return out + "\n";
  };
  std::string out = "\n## " + grid.title + "\n\n";
  if (grid.rows.empty()) return out + "None.\n";
  out += line(grid.header) + "|";
  for (size_t i = 0; i < used.size(); ++i) out += "---|";
  out += "\n";
  for (const Row& row : grid.rows) out += line(row);
  return out;
}

std::string text_of(const Sheet& sheet) {
  std::string out = sheet.title + "\n";
  for (const auto& [name, text] : sheet.facts) out += fmt::format("  {}: {}\n", name, text);
  for (const Grid& grid : sheet.grids) out += text_of(grid);
  return out;
}

std::string markdown_of(const Sheet& sheet) {
  std::string out = "# " + sheet.title + "\n\n";
  for (const auto& [name, text] : sheet.facts) out += fmt::format("- {}: {}\n", name, text);
  for (const Grid& grid : sheet.grids) out += markdown_of(grid);
  return out;
}

Grid mixture_grid() { return key_grid("[[data.mixture]]: the components of source = \"mixture\"", data_component_schema(), false); }

// What a sweep's file has beside [set] and [[axes]], which take any key of a configuration.
std::vector<Grid> sweep_grids() {
  return {key_grid("[sweep]: what is swept", sweep_schema(), false),
          key_grid("[halving]: successive halving", halving_schema(), false),
          key_grid("[match]: sizes that make trials cost the same; beside these keys target, a number or \"base\", and bend", match_schema(), false),
          key_grid("bend of [match]: a key, a table of these, or an array of one or two", bend_schema(), false),
          key_grid("patterns of [[axes]]: tables that make patterns, beside these keys with ratio, every and at", pattern_schema(), false)};
}
}  // namespace

std::string describe_text(const Registry& registry, const std::string& name) {
  if (const BlockType* block = registry.block(name)) return text_of(sheet_of(*block)) + "\nplugin: " + registry.file_of(name).string() + "\n";
  if (const HeadType* head = registry.head(name)) return text_of(sheet_of(*head)) + "\nplugin: " + registry.file_of(name).string() + "\n";
  std::vector<std::string> types, tables;
  for (const ConfigTable& table : config_tables()) {
    if (table.name == name) return text_of(grid_of(table)).substr(1) + (name == "data" ? text_of(mixture_grid()) : "");
    tables.push_back(table.name);
  }
  if (name == kSweep) {
    std::string out;
    for (const Grid& grid : sweep_grids()) out += text_of(grid);
    return out.substr(1);
  }
  tables.emplace_back(kSweep);
  for (const BlockType* block : registry.blocks()) types.emplace_back(block->type());
  for (const HeadType* head : registry.heads()) types.emplace_back(head->type());
  auto all = types;
  all.insert(all.end(), tables.begin(), tables.end());
  const std::string near = nearest(name, all);
  throw Error(ExitCode::kUsage, fmt::format("no block, head or table {}", shorten(to_toml(Value(name)))),
              fmt::format("{}types: {}; tables: {}", near.empty() ? "" : fmt::format("did you mean '{}'? ", near), types.empty() ? "none" : join(types), join(tables)));
}

std::map<std::string, std::string> reference_markdown(const Registry& registry) {
  const std::string note = "\nMade by `tessera describe --markdown docs/reference`.\n";
  std::map<std::string, std::string> files;
  for (const BlockType* block : registry.blocks()) files[fmt::format("{}.md", block->type())] = markdown_of(sheet_of(*block)) + note;
  for (const HeadType* head : registry.heads()) files[fmt::format("{}.md", head->type())] = markdown_of(sheet_of(*head)) + note;
  std::string& core = files["configuration.md"];
  core = "# Configuration: the core's tables\n";
  for (const ConfigTable& table : config_tables()) {
    core += markdown_of(grid_of(table));
    if (table.name == "data") core += markdown_of(mixture_grid());
  }
  core += note;
  std::string& sweep = files["sweep.md"];
  sweep = "# Sweep: the tables of its file\n\nWhat they mean: [sweeps](../sweeps.md), with [set] and [[axes]], which take any key of a configuration.\n";
  for (const Grid& grid : sweep_grids()) sweep += markdown_of(grid);
  sweep += note;
  return files;
}

}  // namespace tessera
