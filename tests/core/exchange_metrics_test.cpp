// What metrics.jsonl gets of a step over several ranks.
#include "metrics/exchange_metrics.hpp"

#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/support/ranks.hpp"

namespace tessera {
namespace {

TEST(ExchangeMetrics, SayWhatAStepSentAndWhichRankWasSlow) {
  run_ranks({.dp_shard = 2, .tp = 2}, [](MeshGroups& groups) {
    ExchangeMetrics metrics(groups, at::kCPU, {{"tp", 40}, {"dp_shard x cp", 7}, {"ep/1", 5}});
    groups.tensor()->all_reduce(at::zeros({100}));  // before the step
    metrics.begin();
    groups.tensor()->all_reduce(at::zeros({10}));
    groups.shard()->all_gather(at::zeros({6}), at::zeros({3}));
    groups.all()->all_reduce(at::zeros({4}));
    nlohmann::json line;
    const double step_s = groups.place().rank == 2 ? 1000.0 : 500.0;  // waits are far shorter
    metrics.end(line, step_s, 100);
    EXPECT_EQ(line["sent_bytes"], (nlohmann::json{{"tp", 40}, {"dp_shard", 12}, {"all", 24}}));
    EXPECT_EQ(line["planned_bytes"], (nlohmann::json{{"tp", 40}, {"dp_shard", 7}, {"ep", 5}}));
    EXPECT_NEAR(line["compute_s"].get<double>() + line["wait_s"].get<double>(), step_s - 100, 1e-6);
    EXPECT_EQ(line["slowest_rank"], 2);
    EXPECT_NEAR(line["slowest_ratio"].get<double>(), 1000.0 / 625, 0.2);
    EXPECT_GT(line["wait_s"].get<double>(), 0);
    EXPECT_EQ(line["pipeline_wait_s"], 0);
  });
}

TEST(ExchangeMetrics, TellThePipelinesWaitsApart) {
  run_ranks({.pp = 2}, [](MeshGroups& groups) {
    ExchangeMetrics metrics(groups, at::kCPU, {});
    metrics.begin();
    const int64_t other = 1 - groups.place().pp;
    const FlightPtr leaving = groups.pipe()->start_send(at::zeros({8}), other);
    groups.pipe()->start_receive(at::zeros({8}), other)->wait();
    leaving->wait();
    nlohmann::json line;
    metrics.end(line, 500, 0);
    EXPECT_EQ(line["sent_bytes"], (nlohmann::json{{"pp", 32}, {"all", 0}}));
    EXPECT_GT(line["pipeline_wait_s"].get<double>(), 0);
    EXPECT_EQ(line["wait_s"], 0);
  });
}

}  // namespace
}  // namespace tessera
