// Conformance: what the forward pass of a block may depend on.
#include <ATen/ops/isfinite.h>

#include "tests/support/conformance.hpp"

namespace tessera::conformance {

TEST_P(Conformance, OddLengthsTogetherEqualEachAlone) {
  Built built(text());
  const std::vector<int64_t> lengths{1, 63, 130, 2};
  const Batch all = random_batch(lengths, kVocab);
  const at::Tensor together = hidden(built.model, all);
  EXPECT_TRUE(at::isfinite(together).all().item<bool>()) << "the output is not finite";
  ASSERT_EQ(together.sizes(), (std::vector<int64_t>{196, kHidden}));
  for (size_t d = 0; d < lengths.size(); ++d) {
    const int64_t begin = all.spans.rows()[d];
    const Batch alone{.ids_n = all.ids_n.narrow(0, begin, lengths[d]), .spans = Spans::documents({lengths[d]})};
    expect(close(together.narrow(0, begin, lengths[d]), hidden(built.model, alone), kStackTolerance),
           fmt::format("a document of {} tokens in a batch of documents of 1, 63, 130 and 2, against the same document alone", lengths[d]));
  }
}

TEST_P(Conformance, NothingDependsOnLaterTokens) {
  Built built(text());
  const Batch batch = random_batch({130}, kVocab);
  const at::Tensor before = hidden(built.model, batch);
  for (const int64_t t : {1, 15, 16, 64, 129}) {
    const at::Tensor after = hidden(built.model, {.ids_n = changed(batch.ids_n, t, 130), .spans = batch.spans});
    expect(same(built, after.narrow(0, 0, t), before.narrow(0, 0, t)), fmt::format("tokens from {} on were changed, and outputs before {} changed too", t, t));
    if (bit_equal(after.narrow(0, t, 1), before.narrow(0, t, 1))) ADD_FAILURE() << fmt::format("tokens from {} on were changed, but the output at {} did not change", t, t);
  }
}

TEST_P(Conformance, DocumentsAreIndependent) {
  Built built(text());
  const std::vector<int64_t> lengths{5, 70, 1, 33, 17};
  const Batch batch = random_batch(lengths, kVocab);
  const at::Tensor before = hidden(built.model, batch);
  for (size_t d = 0; d < lengths.size(); ++d) {
    const int64_t begin = batch.spans.rows()[d], end = batch.spans.rows()[d + 1];
    const at::Tensor after = hidden(built.model, {.ids_n = changed(batch.ids_n, begin, end), .spans = batch.spans});
    const std::string what = fmt::format("of documents of 5, 70, 1, 33 and 17 tokens, number {} was changed", d);
    expect(same(built, after.narrow(0, 0, begin), before.narrow(0, 0, begin)), what + ", and outputs of documents before it changed too");
    expect(same(built, after.narrow(0, end, 126 - end), before.narrow(0, end, 126 - end)), what + ", and outputs of documents behind it changed too");
    if (bit_equal(after.narrow(0, begin, end - begin), before.narrow(0, begin, end - begin))) ADD_FAILURE() << what << ", but its outputs did not change";
  }
}

TEST_P(Conformance, NothingIsKeptFromCallToCall) {
  Built built(text());
  const Batch batch = random_batch({40, 7}, kVocab, 1), other = random_batch({40, 7}, kVocab, 2);
  const at::Tensor first = hidden(built.model, batch);
  hidden(built.model, other);
  expect(bit_equal(hidden(built.model, batch), first), "the same batch again, another batch in between");
}

// Matrices in bf16, rows that say fp32 in fp32: what training.dtype = "bfloat16" gives.
TEST_P(Conformance, RunsInBfloat16) {
  Built half(text(), {.dtype = at::kBFloat16}), plain(text());
  const Batch batch = random_batch({1, 63, 30}, kVocab);
  const at::Tensor got = hidden(half.model, batch);
  EXPECT_EQ(got.scalar_type(), at::kBFloat16) << "the dtype of the hidden states";
  EXPECT_TRUE(at::isfinite(got).all().item<bool>()) << "the output is not finite";
  if (!has_experts(plain.plan)) expect(close(got, hidden(plain.model, batch), tolerance(at::kBFloat16, Op::kModel)), "the output in bf16, against fp32");
}

}  // namespace tessera::conformance
