#include <fmt/format.h>

#include <charconv>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "cli/verbs.hpp"
#include "parallel/agree.hpp"
#include "parallel/rendezvous.hpp"
#include "parallel/watch.hpp"
#include "tessera/build_key.hpp"
#include "train/setup.hpp"

namespace tessera {

void add_sets(CLI::App& verb, std::vector<std::string>& sets) {
  verb.add_option("--set", sets, "a.b=c on top of the configuration, c as in TOML; as often as wanted")->take_all()->expected(1)->allow_extra_args(false)->type_name("KEY=VALUE");
}

Registry load_registry(const std::vector<std::string>& extra) { return Registry::load(Registry::search_paths(extra)); }

Loaded load_with_plugins(const std::string& file, const std::vector<std::string>& sets) {
  Loaded loaded{.registry = load_registry(plugin_paths(file, sets))};
  loaded.config = load_config(file, sets, loaded.registry);
  return loaded;
}

std::unique_ptr<Runnable> open_runnable(const std::string& folder, const std::vector<std::string>& sets, const MeshGroups* ranks) {
  auto checkpoint = open_checkpoint(folder, /*optimizer=*/false);
  auto loaded = load_with_plugins((checkpoint.folder / "config.toml").string(), sets);
  apply_runtime(loaded.config.training, ranks ? ranks->world().local_size : 1);
  const Mesh mesh = ranks ? ranks->mesh() : Mesh{};
  Issues issues;
  if (ranks) check_config(loaded.config, mesh, issues);
  issues.raise();
  const at::Device device = choose_device(loaded.config.training.device, ranks);
  auto runnable = std::make_unique<Runnable>(Runnable{.registry = std::move(loaded.registry), .checkpoint = std::move(checkpoint), .config = std::move(loaded.config)});
  runnable->plan = make_plan(runnable->config, mesh);
  runnable->store = std::make_unique<Store>(runnable->plan, device, choose_dtype(runnable->config.training.dtype, device, ranks), std::vector<std::string>{}, ranks);
  load_weights(runnable->checkpoint.model, *runnable->store);
  runnable->model = std::make_unique<Model>(runnable->plan, *runnable->store);
  return runnable;
}

Mesh parse_mesh(const std::string& text) {
  constexpr int64_t kMostRanks = 1 << 20;  // of one axis, as in [parallelism]
  Mesh mesh;
  const std::vector<std::pair<std::string, int64_t*>> axes{{"pp", &mesh.pp}, {"dp_replicate", &mesh.dp_replicate}, {"dp_shard", &mesh.dp_shard}, {"cp", &mesh.cp},
                                                           {"tp", &mesh.tp}, {"ep", &mesh.ep}, {"etp", &mesh.etp}};
  size_t begin = 0;
  while (begin <= text.size() && !text.empty()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    const size_t equals = part.find('=');
    int64_t* to = nullptr;
    for (const auto& [name, field] : axes)
      if (equals != std::string::npos && part.substr(0, equals) == name) to = field;
    int64_t value = 0;
    const char* last = part.data() + part.size();
    if (!to) throw Error(ExitCode::kUsage, fmt::format("--mesh: \"{}\" must be AXIS=DEGREE", part), "axes: pp, dp_replicate, dp_shard, cp, tp, ep, etp");
    if (auto [stop, error] = std::from_chars(part.data() + equals + 1, last, value); error != std::errc() || stop != last || value < 1 || value > kMostRanks)
      throw Error(ExitCode::kUsage, fmt::format("--mesh: {} must be an integer in [1, {}], got \"{}\"", part.substr(0, equals), kMostRanks, part.substr(equals + 1)));
    *to = value;
    begin = end + 1;
  }
  const int64_t ranks = mesh.dp_shard * mesh.cp * mesh.tp;
  if (ranks % (mesh.ep * mesh.etp))
    throw Error(ExitCode::kUsage, fmt::format("--mesh: ep x etp = {} must divide dp_shard x cp x tp = {}", mesh.ep * mesh.etp, ranks));
  return mesh;
}

void add_mesh(CLI::App& verb, std::string& mesh) {
  verb.add_option("--mesh", mesh, "how the ranks divide the work, under `tessera launch -n N`: axis=degree,... of dp_replicate, dp_shard, pp, cp, tp, ep, etp")->type_name("AXIS=DEGREE,...");
}

int over_ranks(const std::string& text, const std::function<int(const MeshGroups*)>& work) {
  const Mesh mesh = parse_mesh(text);
  World world = rendezvous(std::chrono::minutes(10));
  const double ranks = 1.0 * mesh.pp * mesh.dp_replicate * mesh.dp_shard * mesh.cp * mesh.tp;  // may be more than 64 bits hold
  const std::string another = fmt::format("--mesh dp_shard={}", world.size);
  if (text.empty() && world.size > 1)
    throw Error(ExitCode::kUsage, fmt::format("--mesh: is missing: it says how the {} ranks divide the work", world.size), "for example " + another);
  if (ranks != static_cast<double>(world.size))
    throw Error(ExitCode::kUsage, fmt::format("--mesh: {} is for {:.0f} ranks, there {} {}", text, ranks, world.size > 1 ? "are" : "is", world.size),
                ranks > 256 ? "for example " + another : fmt::format("start that many with `tessera launch -n {:.0f}`, or for example {}", ranks, another));
  if (world.size == 1) return work(nullptr);
  world.compute = choose_device("auto", world.local_rank);
  std::unique_ptr<MeshGroups> groups;
  Watch watch(world);
  watch.set_mesh(mesh);
  return watch.run([&] {
    agree(world, {{"build", TESSERA_VERSION " " TESSERA_BUILD_KEY}, {"device", c10::DeviceTypeName(world.compute.type(), /*lower_case=*/true)}, {"mesh", mesh_text(mesh)}});
    groups = std::make_unique<MeshGroups>(world, mesh);
    const int code = work(groups.get());
    return world.rank == 0 ? code : 0;
  });
}

}  // namespace tessera
