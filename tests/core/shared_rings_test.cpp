// What ranks send each other through shared memory, and that sockets give the same.
#include "parallel/shared_rings.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tessera/error.hpp"
#include "tests/support/ranks.hpp"

namespace tessera {
namespace {

constexpr int64_t kRing = 4 << 20;  // bytes, see shared_rings.cpp

// Of whole numbers, so that sums are exact.
at::Tensor numbers(int64_t n, int64_t first, at::ScalarType dtype) { return at::arange(first, first + n, at::kLong).remainder(251).to(dtype); }

class Exchanges : public testing::TestWithParam<bool> {
 protected:
  void run(int64_t ranks, const std::function<void(const Group&)>& work, std::chrono::milliseconds timeout = std::chrono::seconds(60)) {
    run_ranks({.tp = ranks}, [&](MeshGroups& groups) { work(*groups.tensor()); }, timeout, GetParam());
  }
};
INSTANTIATE_TEST_SUITE_P(Over, Exchanges, testing::Values(true, false), [](const auto& info) { return info.param ? "SharedMemory" : "Sockets"; });

// Sizes below, at and beyond what a ring holds, with odd bytes, so that parts and headers lie across its end.
TEST_P(Exchanges, OfEverySizeArriveWhole) {
  for (const int64_t ranks : {2, 3})
    run(ranks, [&](const Group& group) {
      for (const int64_t n : ranks == 2 ? std::vector<int64_t>{0, 1, 7, 100'003, kRing / 2 - 3, kRing - 1, kRing, 2 * kRing + 13} : std::vector<int64_t>{0, 13, kRing + 5}) {
        const at::Tensor out = at::empty({group.size() * n}, at::kByte);
        group.all_gather(out, numbers(n, group.rank(), at::kByte));
        for (int64_t r = 0; r < ranks; ++r) ASSERT_TRUE(at::equal(out.narrow(0, r * n, n), numbers(n, r, at::kByte))) << n;
      }
    });
}

TEST_P(Exchanges, AreSummedInFp32) {
  for (const int64_t ranks : {2, 4})
    run(ranks, [&](const Group& group) {
      for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
        const int64_t n = 700'001;
        const at::Tensor out = at::empty({n}, at::TensorOptions(dtype)), in = numbers(ranks * n, 3 * group.rank(), dtype);
        group.reduce_scatter(out, in);
        at::Tensor sum = at::zeros({n}, at::kDouble);
        for (int64_t r = 0; r < ranks; ++r) sum += numbers(ranks * n, 3 * r, dtype).narrow(0, group.rank() * n, n).to(at::kDouble);
        ASSERT_TRUE(at::equal(out, sum.to(at::kFloat).to(dtype))) << dtype;
      }
    });
}

TEST_P(Exchanges, OfUnevenRowsGoWhereTheyBelong) {
  run(3, [&](const Group& group) {
    const auto rows = [](int64_t from, int64_t to) { return from == 1 ? 0 : (from + 1) * 40'000 * to; };  // rank 1 has nothing for anyone, nobody has anything for rank 0
    std::vector<int64_t> in_rows, out_rows;
    int64_t in = 0, out = 0;
    for (int64_t r = 0; r < 3; ++r) {
      in_rows.push_back(rows(group.rank(), r)), out_rows.push_back(rows(r, group.rank()));
      in += in_rows.back(), out += out_rows.back();
    }
    const at::Tensor got = at::empty({out, 30}, at::kFloat);
    group.all_to_all(got, numbers(in * 30, 1000 * group.rank(), at::kFloat).view({in, 30}), out_rows, in_rows);
    int64_t at = 0;
    for (int64_t r = 0; r < 3; ++r) {
      int64_t first = 0;
      for (int64_t to = 0; to < group.rank(); ++to) first += rows(r, to);
      EXPECT_TRUE(at::equal(got.narrow(0, at, out_rows[static_cast<size_t>(r)]).reshape({-1}), numbers(out_rows[static_cast<size_t>(r)] * 30, 1000 * r + first * 30, at::kFloat)));
      at += out_rows[static_cast<size_t>(r)];
    }
  });
}

// More than the rings hold is begun before anything is waited for, and not in the order in which it was begun.
TEST_P(Exchanges, MayAllBeInFlightAtOnce) {
  run(2, [&](const Group& group) {
    const int64_t n = kRing / 8;
    std::vector<at::Tensor> outs;
    std::vector<FlightPtr> flights;
    for (int64_t i = 0; i < 12; ++i) {
      outs.push_back(at::empty({2 * n}, at::kInt));
      flights.push_back(group.start_all_gather(outs.back(), at::full({n}, 100 * group.rank() + i, at::kInt)));
    }
    for (const int64_t i : {11, 3, 0, 1, 2, 10, 9, 4, 5, 6, 7, 8}) {
      flights[static_cast<size_t>(i)]->wait();
      for (int64_t r = 0; r < 2; ++r) EXPECT_TRUE(at::equal(outs[static_cast<size_t>(i)].narrow(0, r * n, n), at::full({n}, 100 * r + i, at::kInt)));
    }
  });
}

TEST_P(Exchanges, EndWhereARankHasLeft) {
  std::string message;
  try {
    run(2, [&](const Group& group) {
      group.all_gather(at::empty({2}, at::kFloat), at::empty({1}, at::kFloat));
      if (group.rank() == 1) return;
      group.all_gather(at::empty({8}, at::kFloat), at::empty({4}, at::kFloat));
    });
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kCollective);
    message = error.what();
  }
  EXPECT_NE(message.find("error: all_gather over tp (ranks 0, 1), number 1: "), std::string::npos) << message;
  EXPECT_NE(message.find(GetParam() ? "Connection closed by rank 1 of the group, which has left" : "onnection"), std::string::npos) << message;
}

TEST_P(Exchanges, EndWhereARankDoesNotCome) {
  std::string message;
  try {
    run(2, [&](const Group& group) {
      if (group.rank() == 1) std::this_thread::sleep_for(std::chrono::seconds(4));
      else group.all_gather(at::empty({8}, at::kFloat), at::empty({4}, at::kFloat));
    }, std::chrono::seconds(2));
  } catch (const Error& error) {
    message = error.what();
  }
  EXPECT_NE(message.find("error: all_gather over tp (ranks 0, 1), number 0: "), std::string::npos) << message;
  EXPECT_NE(message.find(GetParam() ? "timed out after 2 s" : "imed out"), std::string::npos) << message;
}

TEST(SharedRings, RefuseOtherSizes) {
  std::string message;
  try {
    run_ranks({.tp = 2}, [&](MeshGroups& groups) {
      const int64_t n = groups.tensor()->rank() == 0 ? 4 : 5;
      groups.tensor()->all_gather(at::empty({2 * n}, at::kFloat), at::empty({n}, at::kFloat));
    });
  } catch (const Error& error) {
    message = error.what();
  }
  EXPECT_NE(message.find(" bytes where "), std::string::npos) << message;
}

}  // namespace
}  // namespace tessera
