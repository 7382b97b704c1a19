#include "layers/shift.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include "tessera/error.hpp"
#include "tests/support/compare.hpp"

namespace tessera {
namespace {

at::Tensor ids(std::initializer_list<int64_t> list) { return at::tensor(at::ArrayRef<int64_t>(list), at::kLong); }
at::Tensor flags(std::initializer_list<int64_t> list) { return ids(list).to(at::kBool); }

TEST(Shift, StopsAtTheEndOfADocument) {
  const auto spans = Spans::documents({4, 1, 2});
  const auto ids_n = ids({10, 11, 12, 13, 20, 30, 31});
  EXPECT_TRUE(bit_equal(shift_ids(ids_n, spans, 1, 0), ids({11, 12, 13, 0, 0, 31, 0})));
  EXPECT_TRUE(bit_equal(shift_ids(ids_n, spans, 2, -7), ids({12, 13, -7, -7, -7, -7, -7})));
  EXPECT_TRUE(bit_equal(shift_ids(ids_n, spans, 5, 0), ids({0, 0, 0, 0, 0, 0, 0})));
  EXPECT_TRUE(bit_equal(shift_ids(ids_n, spans, 0, 0), ids_n));
}

TEST(Shift, PiecesOfADocumentSeeEachOther) {
  const Spans spans({{.document = 1, .start = 3, .length = 2, .document_len = 6}, {.document = 0, .start = 0, .length = 2, .document_len = 2},
                     {.document = 1, .start = 0, .length = 3, .document_len = 6}});
  const auto ids_n = ids({13, 14, 20, 21, 10, 11, 12});
  EXPECT_TRUE(bit_equal(shift_ids(ids_n, spans, 1, 0), ids({14, 0, 21, 0, 11, 12, 13})));
  EXPECT_TRUE(bit_equal(shift_ids(ids_n, spans, 2, 0), ids({0, 0, 0, 0, 12, 13, 14})));
}

TEST(Shift, TargetsLeaveOutWhatIsMasked) {
  const auto spans = Spans::documents({4, 3});
  const auto ids_n = ids({10, 11, 12, 13, 20, 21, 22});
  EXPECT_TRUE(bit_equal(next_targets(ids_n, {}, spans, 1), ids({11, 12, 13, -1, 21, 22, -1})));
  const auto masked_n = flags({1, 0, 1, 0, 0, 0, 1});
  EXPECT_TRUE(bit_equal(next_targets(ids_n, masked_n, spans, 1), ids({11, -1, 13, -1, 21, -1, -1})));
  EXPECT_TRUE(bit_equal(next_targets(ids_n, masked_n, spans, 2), ids({-1, 13, -1, -1, -1, -1, -1})));
}

TEST(Shift, LastPositionsAreInvalid) {
  const auto spans = Spans::documents({4, 1, 3});
  EXPECT_TRUE(bit_equal(valid_after_shift({}, spans, 1, at::kCPU), flags({1, 1, 1, 0, 0, 1, 1, 0})));
  EXPECT_TRUE(bit_equal(valid_after_shift({}, spans, 2, at::kCPU), flags({1, 1, 0, 0, 0, 1, 0, 0})));
  // The third token of the first document and the last of the third are padding.
  EXPECT_TRUE(bit_equal(valid_after_shift(flags({1, 1, 0, 1, 1, 1, 1, 0}), spans, 1, at::kCPU), flags({1, 0, 0, 0, 0, 1, 0, 0})));
}

TEST(Shift, WrongShapesAreNamed) {
  const auto spans = Spans::documents({4, 3});
  try {
    shift_ids(at::arange(6), spans, 1, 0);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.message(), "[shift] ids must be [7], got [6]");
  }
}

}  // namespace
}  // namespace tessera
