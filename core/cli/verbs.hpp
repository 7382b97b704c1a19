// The verbs of the command. Each adds its subcommand with its options; choosing it sets `run`, which does the work and returns the exit code.
#pragma once
#include <CLI/CLI.hpp>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.hpp"
#include "config/config.hpp"
#include "model/model.hpp"
#include "plugin/registry.hpp"

namespace tessera {

using Run = std::function<int()>;

void add_train(CLI::App& app, Run& run);
void add_generate(CLI::App& app, Run& run);
void add_eval(CLI::App& app, Run& run);
void add_inspect(CLI::App& app, Run& run);
void add_convert(CLI::App& app, Run& run);
void add_verify(CLI::App& app, Run& run);
void add_plan(CLI::App& app, Run& run);
void add_bench(CLI::App& app, Run& run);
void add_sweep(CLI::App& app, Run& run);
void add_report(CLI::App& app, Run& run);
void add_launch(CLI::App& app, Run& run);
void add_plugins(CLI::App& app, Run& run);   // plugins, describe
void add_new_plugin(CLI::App& app, Run& run);
void add_test(CLI::App& app, Run& run);

// `--set a.b=c`, as often as wanted, on every verb that takes a configuration or a checkpoint.
void add_sets(CLI::App& verb, std::vector<std::string>& sets);

// The build's plugins, those of TESSERA_PLUGIN_PATH, and `extra`.
Registry load_registry(const std::vector<std::string>& extra = {});

// A configuration with the plugins that it names.
struct Loaded {
  Registry registry;
  Config config;
};
Loaded load_with_plugins(const std::string& file, const std::vector<std::string>& sets);

// A checkpoint's model, ready to run: weights loaded, no optimizer.
struct Runnable {
  Registry registry;
  OpenCheckpoint checkpoint;
  Config config;
  ModelPlan plan;
  std::unique_ptr<Store> store;
  std::unique_ptr<Model> model;
};
std::unique_ptr<Runnable> open_runnable(const std::string& checkpoint, const std::vector<std::string>& sets, const MeshGroups* ranks = nullptr);

// "a=2,b=4" with the mesh's axis names. Throws Error(kUsage).
Mesh parse_mesh(const std::string& text);

// `--mesh`, of a verb that runs over ranks.
void add_mesh(CLI::App& verb, std::string& mesh);
// Does the work on this rank, alone or, under `launch`, torchrun and the like, with the others of the mesh; `ranks` is nullptr in a single process.
// Throws Error(kUsage) where the mesh is of another number of ranks than there are. Other ranks than the first return 0.
int over_ranks(const std::string& mesh, const std::function<int(const MeshGroups* ranks)>& work);
// Whether this rank speaks for all.
inline bool is_first(const MeshGroups* ranks) { return !ranks || ranks->place().rank == 0; }

}  // namespace tessera
