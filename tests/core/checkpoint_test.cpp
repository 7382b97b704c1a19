// Checkpoints: what is saved comes back bit for bit; what is damaged, missing or of another model is named.
#include "checkpoint/checkpoint.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#include <future>
#include <thread>

#include "checkpoint/saver.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/folder.hpp"
#include "tests/support/model.hpp"
#include "tests/support/ranks.hpp"
#include "train/step.hpp"

namespace tessera {
namespace {

namespace fs = std::filesystem;

std::string text(const std::string& pattern = "MO/E", int64_t hidden = 16) {
  return fmt::format(R"(
[model]
hybrid_override_pattern = "{}"
vocab_size = 24
hidden_size = {}
[blocks.mamba2]
num_heads = 2
head_dim = 4
state_size = 4
num_groups = 1
[blocks.mlp]
intermediate_size = 12
[blocks.gqa]
num_heads = 2
num_kv_heads = 1
head_dim = 4
[blocks.moe]
num_experts = 4
top_k = 2
intermediate_size = 8
)",
                     pattern, hidden);
}

class Checkpoint : public FolderTest {
 protected:
  // A model that has taken two steps.
  struct Trained {
    explicit Trained(const std::string& toml = text(), const BuildOptions& o = {}) : built(toml, o), optimizer(built.store, {.lr = 1e-2}) {}
    void step(uint64_t seed) { train_step(built.model, optimizer, {random_batch({9, 20}, 24, seed)}, 1e-2, 1); }
    Built built;
    Optimizer optimizer;
  };

  fs::path save(Trained& run, int64_t step = 2) {
    const fs::path to = folder_ / "checkpoints" / fmt::format("step-{}", step);
    Saver(run.built.config, plugins(), run.built.store, &run.optimizer).save(to, state(step));
    return to;
  }
  static CheckpointState state(int64_t step) { return {.step = step, .tokens = 58, .data = {{"offset", 7}}, .hf = nullptr, .extra = {{"a", 1}}}; }
  static void expect_same_files(const fs::path& got, const fs::path& want) {
    ASSERT_EQ(entries(got), entries(want));
    for (const std::string& name : entries(want)) EXPECT_TRUE(file_text(got / name) == file_text(want / name)) << got << " " << name;
  }
  fs::path saved() {
    Trained run;
    run.step(1), run.step(2);
    return save(run);
  }
  static std::string message(const std::function<void()>& run) {
    try {
      run();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kRuntime);
      return error.message();
    }
    return "no error";
  }
};

TEST_F(Checkpoint, ComesBackBitForBitAndTrainsOnTheSame) {
  Trained run;
  run.step(1), run.step(2);
  const fs::path to = save(run);
  EXPECT_EQ(entries(to), (std::vector<std::string>{"config.toml", "model.safetensors", "optimizer.safetensors", "state.json"}));
  EXPECT_EQ(entries(to.parent_path()), std::vector<std::string>{"step-2"});

  const OpenCheckpoint open = open_checkpoint(to);
  EXPECT_EQ(open.state.step, 2);
  EXPECT_EQ(open.state.tokens, 58);
  EXPECT_EQ(open.state.data, (nlohmann::json{{"offset", 7}}));
  EXPECT_EQ(open.state.extra, (nlohmann::json{{"a", 1}}));
  EXPECT_EQ(to_toml(checkpoint_config(open, {}, plugins())), to_toml(run.built.config));
  EXPECT_EQ(checkpoint_config(open, {"optimizer.lr=0.5"}, plugins()).optimizer.lr, 0.5);

  Trained again(text(), {.seed = 99});
  EXPECT_EQ(load_weights(open.model, again.built.store).loaded, static_cast<int64_t>(tensor_rows(run.built.plan).size()));
  load_optimizer(open, again.built.store, again.optimizer);
  EXPECT_EQ(again.optimizer.steps_taken(), 2);
  const auto expect_equal = [&](const char* when) {
    for (const TensorRow& row : tensor_rows(run.built.plan)) {
      EXPECT_TRUE(row.param ? bit_equal(again.built.store.parameter(row.name), run.built.store.parameter(row.name))
                            : bit_equal(again.built.store.buffer(row.name), run.built.store.buffer(row.name)))
          << row.name << when;
      if (!row.param) continue;
      for (const std::string& slot : Optimizer::slots()) EXPECT_TRUE(bit_equal(again.optimizer.moment(slot, row.name), run.optimizer.moment(slot, row.name))) << slot << row.name << when;
    }
  };
  expect_equal(" after loading");
  EXPECT_GT(run.built.store.buffer("layers.1.gate.e_score_correction_bias").abs().max().item<float>(), 0);
  run.step(3), again.step(3);
  expect_equal(" after another step");
}

// A run that left steps out has taken fewer optimizer steps than its number says, and the moments' correction goes by those taken.
TEST_F(Checkpoint, StepsLeftOutAreNotCountedAsTaken) {
  Trained run;
  run.step(1), run.step(2);
  const OpenCheckpoint open = open_checkpoint(save(run, 7));
  EXPECT_EQ(open.state.step, 7);
  Trained again;
  load_weights(open.model, again.built.store);
  load_optimizer(open, again.built.store, again.optimizer);
  EXPECT_EQ(again.optimizer.steps_taken(), 2);
  run.step(3), again.step(3);
  for (const std::string& name : parameter_names(run.built.plan)) EXPECT_TRUE(bit_equal(again.built.store.parameter(name), run.built.store.parameter(name))) << name;
}

TEST_F(Checkpoint, FrozenParametersHaveNoMoments) {
  Trained run(text(), {.freeze = {"layers.0."}});
  run.step(1);
  const OpenCheckpoint open = open_checkpoint(save(run, 1));
  EXPECT_NE(open.model.find("layers.0.A_log"), nullptr);
  EXPECT_EQ(open.optimizer->find("optimizer.exp_avg.layers.0.A_log"), nullptr);
  Trained again(text(), {.freeze = {"layers.0."}});
  load_optimizer(open, again.built.store, again.optimizer);
  Trained thawed;
  EXPECT_EQ(message([&] { load_optimizer(open, thawed.built.store, thawed.optimizer); }),
            (folder_ / "checkpoints/step-1/optimizer.safetensors").string() + ": optimizer.exp_avg.layers.0.pre_norm.weight is missing");
}

// What is saved in the background is what was there when the save began, however the run goes on meanwhile.
TEST_F(Checkpoint, ASaveInTheBackgroundIsTheSameSave) {
  Trained run;
  Saver saver(run.built.config, plugins(), run.built.store, &run.optimizer, /*in_background=*/true);
  run.step(1), run.step(2);
  for (const int64_t step : {2, 4}) {  // the second time into the first one's memory
    const fs::path now = save(run, step), later = folder_ / fmt::format("later/step-{}", step);
    std::promise<void> gate;
    saver.save(later, state(step), [open = gate.get_future().share()] { open.wait(); });
    run.step(3), run.step(4);
    EXPECT_TRUE(saver.in_flight());
    EXPECT_FALSE(fs::exists(later));
    gate.set_value();
    saver.finish();
    EXPECT_FALSE(saver.in_flight());
    expect_same_files(later, now);
  }
  EXPECT_FALSE(file_text(folder_ / "later/step-2/model.safetensors") == file_text(folder_ / "later/step-4/model.safetensors")) << "nothing was trained";
}

TEST_F(Checkpoint, ASaveWaitsForTheOneBefore) {
  Trained run;
  run.step(1);
  Saver saver(run.built.config, plugins(), run.built.store, &run.optimizer, /*in_background=*/true);
  std::vector<std::string> order;
  std::promise<void> gate;
  saver.save(folder_ / "step-1", state(1), [open = gate.get_future().share()] { open.wait(); }, [&] { order.push_back("the end of the first"); });
  std::thread opens([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    gate.set_value();
  });
  saver.save(folder_ / "step-2", state(2), [&] { order.push_back("the second"); });
  opens.join();
  saver.finish();
  EXPECT_EQ(order, (std::vector<std::string>{"the end of the first", "the second"}));
  for (const char* name : {"step-1", "step-2"}) EXPECT_EQ(message([&] { open_checkpoint(folder_ / name); }), "no error");
}

TEST_F(Checkpoint, ASaveThatFailsInTheBackgroundIsToldOnce) {
  Trained run;
  run.step(1);
  Saver saver(run.built.config, plugins(), run.built.store, &run.optimizer, /*in_background=*/true);
  const fs::path to = save(run);
  saver.save(to, state(2));
  saver.wait();
  EXPECT_TRUE(saver.failed());
  EXPECT_EQ(message([&] { saver.finish(); }), to.string() + ": is there already");
  EXPECT_FALSE(saver.failed());
  EXPECT_EQ(message([&] { saver.finish(); }), "no error");
  saver.save(folder_ / "checkpoints/step-3", state(3));
  EXPECT_EQ(message([&] { saver.finish(); }), "no error");
  EXPECT_EQ(entries(folder_ / "checkpoints"), (std::vector<std::string>{"step-2", "step-3"}));
}

// In one process and over two, at once and in the background: always the same bytes.
TEST_F(Checkpoint, RanksWriteTheFilesOfOneProcess) {
  const auto save_both_ways = [&](const Mesh& mesh, const MeshGroups* groups, const fs::path& to) {
    const Config config = parse_config(text("MO/E"), "test.toml", {}, plugins());
    const ModelPlan plan = make_plan(config, mesh);
    Store store(plan, at::kCPU, at::kFloat, {}, groups);
    store.initialise(3);
    Optimizer optimizer(store, {.lr = 1e-2});
    optimizer.set_steps_taken(2);
    for (const std::string& slot : Optimizer::slots())
      for (const TensorRow& row : tensor_rows(plan)) {
        if (row.buffer && store.has(row.name)) store.buffer(row.name).fill_(0.25);
        if (row.param && store.has(row.name)) store.assign(row.name, optimizer.slot(slot), at::arange(num_elements(row.shape()), at::kFloat) + static_cast<double>(row.name.size() + slot.size()));
      }
    Saver(config, plugins(), store, &optimizer).save(to / "now", state(2));
    Saver saver(config, plugins(), store, &optimizer, /*in_background=*/true);
    const std::string before = groups && groups->place().rank != 0 ? "" : "first";
    std::promise<void> gate;
    std::string called;
    saver.save(to / "later", state(2), [&called, open = gate.get_future().share()] { open.wait(), called = "first"; });
    const at::NoGradGuard no_grad;
    for (FlatGroup& group : store.groups())
      for (const at::Tensor* tensor : {&group.data, &group.exp_avg, &group.exp_avg_sq}) tensor->zero_();
    for (const TensorRow& row : tensor_rows(plan))
      if (row.buffer && store.has(row.name)) store.buffer(row.name).zero_();
    gate.set_value();
    saver.finish();
    EXPECT_EQ(called, before);
    EXPECT_TRUE(fs::exists(to / "later"));
  };
  save_both_ways({}, nullptr, folder_ / "one");
  expect_same_files(folder_ / "one/later", folder_ / "one/now");
  int number = 0;
  for (const Mesh& mesh : {Mesh{.dp_shard = 2}, Mesh{.tp = 2}, Mesh{.dp_replicate = 2}, Mesh{.dp_shard = 2, .ep = 2}}) {
    SCOPED_TRACE(mesh_text(mesh));
    const fs::path to = folder_ / fmt::format("mesh{}", number++);
    run_ranks(mesh, [&](MeshGroups& groups) { save_both_ways(mesh, &groups, to); });
    EXPECT_EQ(entries(to), (std::vector<std::string>{"later", "now"}));
    for (const char* name : {"now", "later"}) expect_same_files(to / name, folder_ / "one/now");
  }
}

// All ranks throw the failure of one, whichever it is, and nothing is left of the save.
TEST_F(Checkpoint, ASaveThatFailsOnOneRankFailsOnAll) {
  for (const bool in_background : {false, true}) {
    std::array<std::string, 2> messages;
    run_ranks({.dp_shard = 2}, [&](MeshGroups& groups) {
      const Config config = parse_config(text(), "test.toml", {}, plugins());
      const ModelPlan plan = make_plan(config, groups.mesh());
      Store store(plan, at::kCPU, at::kFloat, {}, &groups);
      store.initialise(3);
      Saver saver(config, plugins(), store, nullptr, in_background);
      const auto once = [&](const fs::path& to, bool fails) {
        return message([&] {
          saver.save(to, state(2), [&] {
            if (fails) throw Error(ExitCode::kRuntime, "the first rank could not");
          });
          saver.finish();
        });
      };
      std::string& own = messages[static_cast<size_t>(groups.place().rank)];
      for (const bool fails : {true, false, false}) own += once(folder_ / "runs/step-2", fails) + "; ";
    });
    for (const std::string& text : messages) EXPECT_EQ(text, "the first rank could not; no error; " + (folder_ / "runs/step-2").string() + ": is there already; ");
    EXPECT_EQ(entries(folder_ / "runs"), std::vector<std::string>{"step-2"});
    fs::remove_all(folder_ / "runs");
  }
}

TEST_F(Checkpoint, NamesWhatIsMissing) {
  const fs::path none = folder_ / "none";
  EXPECT_EQ(message([&] { open_checkpoint(none); }), none.string() + ": no such folder");
  EXPECT_EQ(message([&] { open_checkpoint(folder_); }), folder_.string() + ": no complete checkpoint there");
  const fs::path to = saved();
  for (const char* name : {"model.safetensors", "optimizer.safetensors", "config.toml"}) {
    fs::rename(to / name, folder_ / "away");
    EXPECT_EQ(message([&] { open_checkpoint(to); }), (to / name).string() + ": missing from the checkpoint");
    fs::rename(folder_ / "away", to / name);
  }
  fs::remove(to / "state.json");
  EXPECT_EQ(message([&] { open_checkpoint(to); }), to.string() + ": no complete checkpoint there");
}

TEST_F(Checkpoint, NamesWhatIsDamaged) {
  const fs::path to = saved();
  for (const char* name : {"model.safetensors", "optimizer.safetensors", "config.toml"}) {
    const std::string good = file_text(to / name);
    put_file(to / name, good.substr(0, good.size() - 1));
    EXPECT_EQ(message([&] { open_checkpoint(to, /*optimizer=*/false); }),
              fmt::format("{}: damaged: {} bytes, {} when it was written", (to / name).string(), good.size() - 1, good.size()));
    for (const size_t at : {size_t{9}, good.size() / 2, good.size() - 1}) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ 4);
      put_file(to / name, bad);
      const std::string damaged = (to / name).string() + ": damaged: its CRC-32 is not that of when it was written";
      EXPECT_EQ(message([&] { open_checkpoint(to); }), damaged) << at;
      EXPECT_EQ(message([&] { open_checkpoint(to, /*optimizer=*/false); }), name == std::string("optimizer.safetensors") ? "no error" : damaged) << at;
    }
    put_file(to / name, good);
  }
  EXPECT_EQ(message([&] { open_checkpoint(to); }), "no error");
  const std::string state = file_text(to / "state.json");
  put_file(to / "state.json", "{}");
  EXPECT_EQ(message([&] { open_checkpoint(to); }).substr(0, (to / "state.json").string().size() + 27), (to / "state.json").string() + ": not a checkpoint's state:");
  put_file(to / "state.json", state.substr(0, state.size() / 2));
  EXPECT_EQ(message([&] { open_checkpoint(to); }).substr(0, (to / "state.json").string().size() + 1), (to / "state.json").string() + ":");
  nlohmann::json later = nlohmann::json::parse(state);
  later["format"] = 2;
  put_file(to / "state.json", later.dump());
  EXPECT_EQ(message([&] { open_checkpoint(to); }), (to / "state.json").string() + ": format 2 is newer than this program's 1");
}

TEST_F(Checkpoint, ChecksumsAreCrc32) {
  put_file(folder_ / "check", "123456789");
  EXPECT_EQ(file_crc32(folder_ / "check"), 0xcbf43926u);
  put_file(folder_ / "check", "");
  EXPECT_EQ(file_crc32(folder_ / "check"), 0u);
  // Across blocks, and with a rest: the CRC of a text with its own CRC behind it is the residue of the polynomial.
  std::string text(3'000'001, '\0');
  for (size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * i >> 7);
  put_file(folder_ / "check", text);
  const uint32_t crc = file_crc32(folder_ / "check");
  for (int byte = 0; byte < 4; ++byte) text += static_cast<char>(crc >> (8 * byte));
  put_file(folder_ / "check", text);
  EXPECT_EQ(file_crc32(folder_ / "check"), 0x2144df1cu);
}

// A run that cannot see its checkpoints must not begin anew over them.
TEST_F(Checkpoint, AFolderThatCannotBeReadIsNotAnEmptyOne) {
  saved();
  const fs::path loop = folder_ / "loop";
  fs::create_symlink(loop, loop);
  EXPECT_EQ(message([&] { list_checkpoints(loop); }), loop.string() + ": cannot be examined: Too many levels of symbolic links");
  EXPECT_EQ(message([&] { list_checkpoints(folder_ / "checkpoints/step-2/state.json"); }), (folder_ / "checkpoints/step-2/state.json").string() + ": the folder cannot be read: Not a directory");
  EXPECT_TRUE(list_checkpoints(folder_ / "none").empty());
}

TEST_F(Checkpoint, WhatCannotBeRemovedIsSaid) {
  saved();
  put_file(folder_ / "checkpoints/step-1/state.json", "{}");
  put_file(folder_ / "checkpoints/.saving-removed-step-1", "a file in the way");
  EXPECT_EQ(prune_checkpoints(folder_ / "checkpoints", 1), (folder_ / "checkpoints/step-1").string() + ": cannot be removed: Not a directory");
  EXPECT_EQ(prune_checkpoints(folder_ / "checkpoints", 1), "");
  EXPECT_EQ(entries(folder_ / "checkpoints"), std::vector<std::string>{"step-2"});
}

TEST_F(Checkpoint, AnotherArchitectureIsListed) {
  const OpenCheckpoint open = open_checkpoint(saved());
  Built other(text("M*/E"));
  EXPECT_EQ(message([&] { load_weights(open.model, other.store); }),
            open.model.path().string() +
                ": the checkpoint is of another architecture\n"
                "  missing (4): layers.1.q_proj.weight, layers.1.k_proj.weight, layers.1.v_proj.weight, layers.1.o_proj.weight\n"
                "  unexpected (4): layers.1.experts.down_proj.weight, layers.1.experts.up_proj.weight, layers.1.gate.e_score_correction_bias, layers.1.gate.weight");
  Built wide(text("MO/E").replace(text("MO/E").find("intermediate_size = 12"), 22, "intermediate_size = 10"));
  const at::Tensor before = wide.store.parameter("embedding.weight").clone();
  EXPECT_EQ(message([&] { load_weights(open.model, wide.store); }),
            open.model.path().string() +
                ": the checkpoint is of another architecture\n"
                "  misshapen (2): heads.mtp.layers.0.up_proj.weight: [12, 16] in the file, [10, 16] in the model, heads.mtp.layers.0.down_proj.weight: [16, 12] in the file, "
                "[16, 10] in the model");
  EXPECT_TRUE(bit_equal(wide.store.parameter("embedding.weight"), before)) << "half loaded";
}

TEST_F(Checkpoint, ALongListIsCut) {
  const OpenCheckpoint open = open_checkpoint(saved());
  Built deep(text("MOMMMM/E"));
  const std::string text = message([&] { load_weights(open.model, deep.store); });
  EXPECT_NE(text.find("  missing (36): layers.2.pre_norm.weight, "), std::string::npos) << text;
  EXPECT_NE(text.find(" and 16 more"), std::string::npos) << text;
}

TEST_F(Checkpoint, PartsAreLoadedUnderOtherNames) {
  Trained run;
  run.step(1);
  const OpenCheckpoint open = open_checkpoint(save(run, 1));
  Built other(text("*MM"));
  const at::Tensor own = other.store.parameter("layers.2.A_log").clone();
  const LoadReport report = load_weights(open.model, other.store, /*partial=*/true, {"layers.0.=layers.1.", "layers.1.=old."});
  EXPECT_TRUE(bit_equal(other.store.parameter("layers.1.A_log"), run.built.store.parameter("layers.0.A_log")));
  EXPECT_TRUE(bit_equal(other.store.parameter("layers.2.A_log"), own));
  EXPECT_TRUE(bit_equal(other.store.parameter("embedding.weight"), run.built.store.parameter("embedding.weight")));
  EXPECT_EQ(report.loaded, 3 + 9);
  EXPECT_EQ(report.missing.size(), 5u + 9u);
  EXPECT_TRUE(report.misshapen.empty());
  // The names are the file's own.
  EXPECT_NE(std::find(report.unexpected.begin(), report.unexpected.end(), "layers.1.gate.weight"), report.unexpected.end());
  EXPECT_EQ(report.unexpected.size(), open.model.names().size() - 12);
}

TEST_F(Checkpoint, AMapThatMakesOneNameOfTwoIsRefused) {
  const OpenCheckpoint open = open_checkpoint(saved());
  Built built(text());
  try {
    load_weights(open.model, built.store, true, {"layers.1.pre_norm=layers.0.pre_norm"});
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    EXPECT_EQ(error.message(), "checkpoint.initial_load_map: 'layers.0.pre_norm.weight' and 'layers.1.pre_norm.weight' both become 'layers.0.pre_norm.weight'");
  }
}

TEST_F(Checkpoint, APartOfAnotherShapeKeepsItsInitialValues) {
  const OpenCheckpoint open = open_checkpoint(saved());
  Built wide(text("MO/E", 20));
  const at::Tensor own = wide.store.parameter("embedding.weight").clone();
  const LoadReport report = load_weights(open.model, wide.store, true);
  EXPECT_TRUE(bit_equal(wide.store.parameter("embedding.weight"), own));
  EXPECT_NE(std::find(report.misshapen.begin(), report.misshapen.end(), "embedding.weight: [24, 16] in the file, [24, 20] in the model"), report.misshapen.end());
  EXPECT_TRUE(report.missing.empty());
}

TEST_F(Checkpoint, AResumeNeedsTheOptimizersState) {
  Trained run;
  const fs::path to = folder_ / "weights";
  Saver(run.built.config, plugins(), run.built.store, nullptr).save(to, {});
  const OpenCheckpoint open = open_checkpoint(to);
  EXPECT_EQ(message([&] { load_optimizer(open, run.built.store, run.optimizer); }), to.string() + ": holds no optimizer state, so a run cannot be resumed from it");
}

TEST_F(Checkpoint, AFolderThatIsThereIsNotReplaced) {
  const fs::path to = saved();
  Trained run;
  EXPECT_EQ(message([&] { save(run); }), to.string() + ": is there already");
  EXPECT_EQ(message([&] { open_checkpoint(to); }), "no error");
}

TEST_F(Checkpoint, AFullDiskLeavesTheOldOneAlone) {
  const fs::path to = saved();
  Trained run;
  run.step(5);
  rlimit old{};
  getrlimit(RLIMIT_FSIZE, &old);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  std::vector<std::string> messages;
  for (const rlim_t limit : {1000u, 9000u, 20000u}) {  // in the weights, in the moments, ...
    const rlimit small{limit, old.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
    messages.push_back(message([&] { save(run, 3); }));
    setrlimit(RLIMIT_FSIZE, &old);
  }
  std::signal(SIGXFSZ, handler);
  for (const std::string& text : messages) {
    EXPECT_NE(text.find("File too large"), std::string::npos) << text;
    EXPECT_NE(text.find(".safetensors"), std::string::npos) << text;
  }
  EXPECT_EQ(entries(folder_ / "checkpoints"), std::vector<std::string>{"step-2"});
  EXPECT_EQ(open_checkpoint(folder_).folder, to);
}

TEST_F(Checkpoint, AnUnwritableFolderIsNamed) {
  put_file(folder_ / "checkpoints", "a file in the way");
  Trained run;
  const std::string text = message([&] { save(run); });
  EXPECT_EQ(text.substr(0, (folder_ / "checkpoints").string().size()), (folder_ / "checkpoints").string()) << text;
  EXPECT_EQ(file_text(folder_ / "checkpoints"), "a file in the way");
}

TEST_F(Checkpoint, LeftoversOfAnInterruptedSaveAreIgnoredAndCleared) {
  const fs::path to = saved();
  const fs::path half = to.parent_path() / ".saving-step-9-123";
  fs::copy(to, half);
  fs::create_directories(to.parent_path() / "step-10");          // never complete: no state.json
  fs::create_directories(to.parent_path() / "step-x");
  EXPECT_EQ(list_checkpoints(to.parent_path()), std::vector<fs::path>{to});
  EXPECT_EQ(open_checkpoint(folder_).folder, to);
  prune_checkpoints(to.parent_path(), 0);
  EXPECT_FALSE(fs::exists(half));
  EXPECT_TRUE(fs::exists(to));
}

TEST_F(Checkpoint, KeepsTheNewest) {
  Trained run;
  run.step(1);
  for (const int64_t step : {2, 10, 9, 100}) save(run, step);
  EXPECT_EQ(open_checkpoint(folder_).folder.filename(), "step-100");
  prune_checkpoints(folder_ / "checkpoints", 2);
  EXPECT_EQ(entries(folder_ / "checkpoints"), (std::vector<std::string>{"step-10", "step-100"}));
  prune_checkpoints(folder_ / "checkpoints", 0);
  EXPECT_EQ(entries(folder_ / "checkpoints").size(), 2u);
}

}  // namespace
}  // namespace tessera
