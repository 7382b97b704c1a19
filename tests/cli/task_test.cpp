// Tasks as data of the real binary: accuracy while training and after it, stopped and resumed runs, several processes.
#include <gtest/gtest.h>

#include "tests/support/tiny_run.hpp"

namespace tessera {
namespace {

using nlohmann::json;

class TaskRun : public TinyRunTest {
 protected:
  void SetUp() override {
    TinyRunTest::SetUp();
    std::string toml = kTinyRun;
    const size_t data = toml.find("[data]"), metrics = toml.find("[metrics]");
    toml.replace(data, metrics - data, "[data]\nsource = \"mqar\"\n[data.task]\nlength = 32\nnum_pairs = [2, 8]\neval_num_pairs = [12]\nvocab_size = 32\n");
    put_file(folder_ / "tiny.toml", toml);
  }
  json evaluation(const std::vector<std::string>& words) const {
    const Finished done = tessera(words);
    EXPECT_EQ(done.code, 0) << done.err;
    return json::parse(done.out);
  }
};

TEST_F(TaskRun, ReportsAccuracyByGroup) {
  const Finished done = train("run", {"training.steps=6", "metrics.tensorboard=true"});
  ASSERT_EQ(done.code, 0) << done.err;
  std::string events;
  for (const std::string& name : entries(folder_ / "run"))
    if (name.starts_with("events.out.tfevents")) events = file_text(folder_ / "run" / name);
  for (const char* tag : {"val_accuracy/pairs 2", "val_accuracy/pairs 12"}) EXPECT_NE(events.find(tag), std::string::npos) << tag;
  const auto lines = metrics("run");
  ASSERT_EQ(lines.size(), 6u);
  for (size_t i = 0; i < 6; ++i) EXPECT_EQ(lines[i].contains("val_accuracy"), i == 2 || i == 5) << i;
  const json by = lines[5].at("val_accuracy_by");
  EXPECT_EQ(by.size(), 3u);
  for (const char* group : {"pairs 2", "pairs 8", "pairs 12"}) EXPECT_TRUE(by.at(group).is_number()) << group;
  const json result = evaluation({"eval", "run", "--json"});
  EXPECT_EQ(result.at("accuracy"), lines[5].at("val_accuracy"));
  EXPECT_EQ(result.at("accuracy_by"), by);
  EXPECT_EQ(result.at("loss"), lines[5].at("val_loss"));
  EXPECT_EQ(result.at("targets"), result.at("targets_by").at("pairs 2").get<int64_t>() + result.at("targets_by").at("pairs 8").get<int64_t>());
  EXPECT_EQ(result.at("targets_by").at("pairs 12"), 12 * 2);  // 128 tokens in documents of 64
  const Finished text = tessera({"eval", "run"});
  for (const char* part : {"accuracy 0.", "pairs 2 ", "pairs 12 ", "24  beyond training\n"}) EXPECT_NE(text.out.find(part), std::string::npos) << part << " in " << text.out;
  // What is only measured may be asked of a checkpoint.
  const json more = evaluation({"eval", "run", "--json", "--set", "data.task.eval_num_pairs=[4, 15]", "--tokens", "256"});
  EXPECT_TRUE(more.at("accuracy_by").contains("pairs 15") && more.at("accuracy_by").contains("pairs 4") && !more.at("accuracy_by").contains("pairs 12"));
}

TEST_F(TaskRun, ResumesAsIfItHadNeverStopped) {
  ASSERT_EQ(train("whole", {"training.steps=6"}).code, 0);
  ASSERT_EQ(train("stopped", {"training.steps=6", "checkpoint.interval=2"}).code, 0);
  for (const char* later : {"step-4", "step-6"}) std::filesystem::remove_all(folder_ / "stopped/checkpoints" / later);
  const Finished done = train("stopped", {"training.steps=6"}, /*resume=*/true);
  ASSERT_EQ(done.code, 0) << done.err;
  EXPECT_NE(done.err.find("resuming stopped at step 2"), std::string::npos) << done.err;
  expect_same_run("stopped", "whole", 6);
}

TEST_F(TaskRun, IsTheSameOnSeveralProcesses) {
  ASSERT_EQ(train("one", {"training.steps=3"}).code, 0);
  const json one = metrics("one")[2];
  for (const std::string axis : {"tensor_parallel_degree", "pipeline_parallel_degree", "data_parallel_shard_degree"}) {
    const Finished done = tessera({"launch", "-n", "2", "train", "tiny.toml"}, {"training.steps=3", "training.num_threads=1", "run.folder=" + axis, "parallelism." + axis + "=2"});
    ASSERT_EQ(done.code, 0) << done.err;
    const json two = metrics(axis)[2];
    EXPECT_NEAR(two.at("loss").get<double>(), one.at("loss").get<double>(), 1e-4) << axis;
    EXPECT_NEAR(two.at("val_loss").get<double>(), one.at("val_loss").get<double>(), 1e-4) << axis;
    EXPECT_EQ(two.at("val_accuracy_by").size(), 3u) << axis;
  }
}

TEST_F(TaskRun, RefusesWhatDoesNotFit) {
  const Finished small = train("run", {"model.vocab_size=16"});
  EXPECT_EQ(small.code, 2);
  EXPECT_NE(small.err.find("model.vocab_size: must hold the 32 ids of data.source = \"mqar\", got 16"), std::string::npos) << small.err;
  const Finished key = train("run", {"data.task.order=2"});
  EXPECT_EQ(key.code, 2);
  EXPECT_NE(key.err.find("data.task.order: has no effect with data.source = \"mqar\""), std::string::npos) << key.err;
  // A task that another one was trained on is not gone on with.
  ASSERT_EQ(train("task", {"training.steps=2"}).code, 0);
  const Finished other = train("task", {"training.steps=3", "data.task.num_pairs=[2]"}, /*resume=*/true);
  EXPECT_EQ(other.code, 4);
  EXPECT_NE(other.err.find("source 0 changed"), std::string::npos) << other.err;
}

}  // namespace
}  // namespace tessera
