// What ranks send each other through shared memory, and that sockets give the same.
#include "parallel/mailboxes.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tessera/error.hpp"
#include "tests/support/ranks.hpp"

namespace tessera {
namespace {

// Of whole numbers, so that sums are exact.
at::Tensor numbers(int64_t n, int64_t first, at::ScalarType dtype) { return at::arange(first, first + n, at::kLong).remainder(251).to(dtype); }

// Some containers forbid what it needs; ranks use sockets there.
bool memory_can_be_shared() {
  const auto process = static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0)), memory = ::memfd_create("probe", MFD_CLOEXEC);
  const bool both = process >= 0 && memory >= 0;
  if (process >= 0) ::close(process);
  if (memory >= 0) ::close(memory);
  return both;
}

class Exchanges : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (GetParam() && !memory_can_be_shared()) GTEST_SKIP() << "this system does not let processes share memory so";
  }
  void run(int64_t ranks, const std::function<void(const Group&)>& work, std::chrono::milliseconds timeout = std::chrono::seconds(60)) {
    run_ranks({.tp = ranks}, [&](MeshGroups& groups) { work(*groups.tensor()); }, timeout, GetParam());
  }
};
INSTANTIATE_TEST_SUITE_P(Over, Exchanges, testing::Values(true, false), [](const auto& info) { return info.param ? "SharedMemory" : "Sockets"; });

TEST_P(Exchanges, OfEverySizeArriveWhole) {
  for (const int64_t ranks : {2, 3})
    run(ranks, [&](const Group& group) {
      for (const int64_t n : ranks == 2 ? std::vector<int64_t>{0, 1, 7, 100'003, 9'000'001} : std::vector<int64_t>{0, 13, 3'000'005}) {
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

// Nothing is waited for before all is begun, and then in another order; the second time the boxes are used again.
TEST_P(Exchanges, MayAllBeInFlightAtOnce) {
  run(2, [&](const Group& group) {
    const int64_t n = 500'000;
    for (const int64_t round : {0, 1}) {
      std::vector<at::Tensor> outs;
      std::vector<FlightPtr> flights;
      for (int64_t i = 0; i < 12; ++i) {
        outs.push_back(at::empty({2 * n}, at::kInt));
        flights.push_back(group.start_all_gather(outs.back(), at::full({n}, 1000 * round + 100 * group.rank() + i, at::kInt)));
      }
      for (const size_t i : {11, 3, 0, 1, 2, 10, 9, 4, 5, 6, 7, 8}) {
        flights[i]->wait();
        for (int64_t r = 0; r < 2; ++r)
          EXPECT_TRUE(at::equal(outs[i].narrow(0, r * n, n), at::full({n}, 1000 * round + 100 * r + static_cast<int64_t>(i), at::kInt)));
      }
    }
  });
}

// A rank that waits in one group has sent all that another rank waits for in another.
TEST_P(Exchanges, OfOneGroupDoNotWaitForThoseOfAnother) {
  run_ranks({.tp = 2}, [](MeshGroups& groups) {
    const Group &one = *groups.tensor(), &other = *groups.sequence();
    const int64_t n = 20'000'000, rank = one.rank();
    const at::Tensor out = at::empty({2 * n}, at::kByte), small = at::empty({2}, at::kByte);
    const FlightPtr flight = one.start_all_gather(out, at::full({n}, rank + 1, at::kByte));
    if (rank == 1) flight->wait();
    other.all_gather(small, at::full({1}, rank + 3, at::kByte));
    if (rank == 0) flight->wait();
    for (int64_t r = 0; r < 2; ++r) {
      EXPECT_TRUE(at::equal(out.narrow(0, r * n, n), at::full({n}, r + 1, at::kByte)));
      EXPECT_EQ(small[r].item<int64_t>(), r + 3);
    }
  }, std::chrono::seconds(60), GetParam());
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

TEST(Mailboxes, RefuseOtherSizes) {
  if (!memory_can_be_shared()) GTEST_SKIP() << "this system does not let processes share memory so";
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
