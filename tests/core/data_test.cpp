#include <ATen/ops/equal.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>

#include "data/config.hpp"
#include "data/glob.hpp"
#include "data/hash.hpp"
#include "data/loader.hpp"
#include "tessera/error.hpp"

namespace tessera {
namespace {
namespace fs = std::filesystem;

std::string message(const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& error) {
    return error.message();
  }
  return "no error";
}

class Data : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "data-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string put(const std::string& name, const std::string& bytes) {
    fs::create_directories((folder_ / name).parent_path());
    std::ofstream(folder_ / name, std::ios::binary) << bytes;
    return (folder_ / name).string();
  }
  std::string at(const std::string& name) const { return (folder_ / name).string(); }
  // Files "NN.txt", the i-th filled with byte 'A' + i.
  void put_files(const std::string& sub, const std::vector<int>& lengths, char first = 'A') {
    for (size_t i = 0; i < lengths.size(); ++i)
      put(fmt::format("{}/{:02}.txt", sub, i), std::string(static_cast<size_t>(lengths[i]), static_cast<char>(first + static_cast<int>(i))));
  }
  std::shared_ptr<const Dataset> bytes(const std::string& sub, double fraction = 0, int64_t seed = 0) {
    DataConfig config;
    config.path = at(sub + "/*.txt");
    config.validation_fraction = fraction;
    config.seed = seed;
    return Dataset::open(config, 256);
  }
  fs::path folder_;
};

std::vector<int64_t> read_all(const Source& source, int64_t document) {
  std::vector<int64_t> ids(static_cast<size_t>(source.document_len(document)));
  source.read(document, 0, ids);
  return ids;
}

std::vector<int64_t> flat(const std::vector<Row>& rows) {
  std::vector<int64_t> ids;
  for (const Row& row : rows) {
    ids.insert(ids.end(), row.ids.begin(), row.ids.end());
    ids.push_back(-1);
    for (const int64_t length : row.lengths) ids.push_back(-2 - length);
  }
  return ids;
}

TEST(Hash, PermutationIsOneAndHasAnInverse) {
  for (const int64_t n : {1, 2, 3, 5, 64, 65, 1000}) {
    std::set<int64_t> seen;
    int64_t fixed = 0;
    const Permutation permutation(n, 7);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t to = permutation(i);
      ASSERT_TRUE(to >= 0 && to < n && seen.insert(to).second) << n;
      ASSERT_EQ(permutation.inverse(to), i);
      fixed += to == i;
    }
    EXPECT_TRUE(n < 64 || fixed < 8) << n;
  }
  const Permutation large(Source::kEndless, 3);
  EXPECT_EQ(large.inverse(large(123456789)), 123456789);
}

TEST(Hash, UniformAndStable) {
  int64_t counts[10] = {};
  for (uint64_t i = 0; i < 10000; ++i) ++counts[scale_to(mix(5, i), 10)];
  for (const int64_t count : counts) EXPECT_NEAR(static_cast<double>(count), 1000, 150);
  EXPECT_EQ(mix(1, 2, 3), mix(1, 2, 3));
  EXPECT_NE(mix(1, 2, 3), mix(1, 3, 2));
}

TEST_F(Data, GlobFindsWhatAShellWould) {
  for (const char* name : {"a.h", "x/b.h", "x/y/c.h", "x/y/c.txt", "x/.hidden/d.h", ".e.h", "z/h"}) put(name, "1");
  fs::create_directory_symlink(folder_ / "x", folder_ / "link");
  const auto found = [&](const std::string& pattern) {
    std::string text;
    for (const fs::path& path : glob(at(pattern))) text += path.lexically_relative(folder_).string() + " ";
    return text;
  };
  EXPECT_EQ(found("**/*.h"), "a.h x/b.h x/y/c.h ");
  EXPECT_EQ(found("*.h"), "a.h ");
  EXPECT_EQ(found("x/**"), "x/b.h x/y/c.h x/y/c.txt ");
  EXPECT_EQ(found("*/[a-c].?"), "link/b.h x/b.h ");
  EXPECT_EQ(found("x/y/c.txt"), "x/y/c.txt ");
  EXPECT_EQ(found("x/**/y/**/c.h"), "x/y/c.h ");
  EXPECT_EQ(found("nothing/**"), "");
  EXPECT_EQ(found("x"), "");
  EXPECT_EQ(glob_root("a/b/**/*.txt"), "a/b");
  EXPECT_EQ(glob_root("a/b.txt"), "a");
  EXPECT_EQ(replace_placeholders("{libtorch}/ATen/{x}", {{"libtorch", "/t"}, {"x", "y"}}), "/t/ATen/y");
  EXPECT_EQ(message([] { replace_placeholders("{torch}/a", {{"libtorch", "/t"}}); }), "data.path: unknown placeholder '{torch}' in '{torch}/a'");
}

TEST_F(Data, BytesAreTheFiles) {
  put("d/a.txt", "hi\xff");
  put("d/s/b.txt", "");
  const auto source = open_bytes(at("d/**"));
  ASSERT_EQ(source->num_documents(), 2);
  EXPECT_EQ(read_all(*source, 0), (std::vector<int64_t>{'h', 'i', 255}));
  EXPECT_EQ(source->document_len(1), 0);
  EXPECT_EQ(source->document_name(1), at("d/s/b.txt"));
  const std::string hash = source->hash();
  fs::rename(folder_ / "d", folder_ / "moved");
  EXPECT_EQ(open_bytes(at("moved/**"))->hash(), hash);
  put("moved/a.txt", "ho\xff");
  EXPECT_NE(open_bytes(at("moved/**"))->hash(), hash);
  EXPECT_EQ(message([&] { open_bytes(at("none/*")); }), fmt::format("data.path: no file matches '{}'", at("none/*")));
  EXPECT_EQ(message([&] { open_bytes(at("moved")); }), fmt::format("data.path: '{}' is a folder", at("moved")));
  const auto changing = open_bytes(at("moved/a.txt"));
  put("moved/a.txt", "longer");
  EXPECT_EQ(message([&] { read_all(*changing, 0); }), at("moved/a.txt") + ": changed while it was in use: it had 3 bytes, now 6");
}

TEST_F(Data, JsonlLines) {
  const std::string path = put("a.jsonl",
                               "{\"text\": \"a\\u00e9\"}\n\n  \r\n{\"text\": 3}\n{\"body\": \"x\", \"id\": 1}\n[1]\n{\"text\"\n{\"text\":\"\"}\r\n"
                               "{\"text\":\"a\",\"text\":\"b\"}\n{\"text\":\"\xff\"}\n{\"text\":\"end\"}");
  const auto source = open_jsonl(path, "text");
  ASSERT_EQ(source->num_documents(), 9);
  EXPECT_EQ(read_all(*source, 0), (std::vector<int64_t>{'a', 0xc3, 0xa9}));
  EXPECT_EQ(message([&] { read_all(*source, 1); }), path + ":4: field 'text' must be a string, got number");
  EXPECT_EQ(message([&] { read_all(*source, 2); }), path + ":5: has no field 'text'");
  EXPECT_EQ(message([&] { read_all(*source, 3); }), path + ":6: must be a JSON object, got array");
  EXPECT_EQ(message([&] { read_all(*source, 4); }), path + ":7: not valid JSON at byte 7");
  EXPECT_EQ(source->document_len(5), 0);
  EXPECT_EQ(message([&] { read_all(*source, 6); }), path + ":9: key 'text' occurs twice");
  EXPECT_EQ(message([&] { read_all(*source, 7); }), path + ":10: not UTF-8 at byte 9");
  EXPECT_EQ(read_all(*source, 8), (std::vector<int64_t>{'e', 'n', 'd'}));
  DataConfig config;
  config.source = "jsonl";
  config.path = path;
  config.validation_fraction = 0;
  EXPECT_EQ(message([&] { Loader(Dataset::open(config, 256), 4); }), path + ":4: field 'text' must be a string, got number");
  config.path = put("empty.jsonl", "\n\n");
  EXPECT_EQ(message([&] { Dataset::open(config, 256); }), fmt::format("jsonl '{}': has no documents", config.path));
}

template <class T>
void add(std::string& bytes, T value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

struct Index {
  int code = 8;
  uint64_t version = 1;
  std::vector<int32_t> lengths{3, 2, 4};
  std::vector<int64_t> offsets{0, 6, 10};
  std::vector<int64_t> documents{0, 2, 3};
  int64_t claimed_sequences = -1, claimed_documents = -1;
  std::string text() const {
    std::string bytes("MMIDIDX\0\0", 9);
    add(bytes, version);
    add(bytes, static_cast<uint8_t>(code));
    add(bytes, claimed_sequences < 0 ? lengths.size() : static_cast<uint64_t>(claimed_sequences));
    add(bytes, claimed_documents < 0 ? documents.size() : static_cast<uint64_t>(claimed_documents));
    for (const int32_t v : lengths) add(bytes, v);
    for (const int64_t v : offsets) add(bytes, v);
    for (const int64_t v : documents) add(bytes, v);
    return bytes;
  }
};

TEST_F(Data, MegatronDocumentsAreRunsOfSequences) {
  std::string tokens;
  for (uint16_t i = 0; i < 9; ++i) add(tokens, static_cast<uint16_t>(60000 + i));
  put("m.bin", tokens);
  put("m.idx", Index().text());
  const auto source = open_megatron(at("m"));
  ASSERT_EQ(source->num_documents(), 2);
  EXPECT_EQ(read_all(*source, 0), (std::vector<int64_t>{60000, 60001, 60002, 60003, 60004}));
  EXPECT_EQ(read_all(*source, 1), (std::vector<int64_t>{60005, 60006, 60007, 60008}));
  for (int64_t begin = 0; begin <= 5; ++begin)
    for (int64_t end = begin; end <= 5; ++end) {
      std::vector<int64_t> part(static_cast<size_t>(end - begin)), want(part.size());
      source->read(0, begin, part);
      std::iota(want.begin(), want.end(), 60000 + begin);
      EXPECT_EQ(part, want);
    }
}

TEST_F(Data, MegatronDtypes) {
  const auto one = [&](int code, auto value) {
    std::string tokens;
    add(tokens, value);
    put("m.bin", tokens);
    put("m.idx", Index{.code = code, .lengths = {1}, .offsets = {0}, .documents = {0, 1}}.text());
    return read_all(*open_megatron(at("m")), 0).at(0);
  };
  EXPECT_EQ(one(1, uint8_t{200}), 200);
  EXPECT_EQ(one(2, int8_t{-3}), -3);
  EXPECT_EQ(one(3, int16_t{300}), 300);
  EXPECT_EQ(one(4, int32_t{70000}), 70000);
  EXPECT_EQ(one(5, int64_t{1} << 40), int64_t{1} << 40);
  EXPECT_EQ(one(6, 12.0), 12);
  EXPECT_EQ(one(7, 12.0f), 12);
  EXPECT_EQ(one(7, 12.5f), -1);
  EXPECT_EQ(one(6, std::nan("")), -1);
  EXPECT_EQ(one(8, uint16_t{65535}), 65535);
}

TEST_F(Data, MegatronRefusesWhatAnIndexMayClaim) {
  put("m.bin", std::string(18, '\0'));
  const std::string idx = at("m.idx") + ": ";
  const auto refusal = [&](const std::string& text) {
    put("m.idx", text);
    const std::string error = message([&] { open_megatron(at("m")); });
    return error.rfind(idx, 0) == 0 ? error.substr(idx.size()) : error;
  };
  const std::string good = Index().text();
  EXPECT_EQ(refusal(good), "no error");
  for (size_t n = 0; n < good.size(); ++n) EXPECT_NE(refusal(good.substr(0, n)), "no error") << n;
  EXPECT_EQ(refusal(good.substr(0, 20)), "must have a header of 34 bytes, but the file has 20");
  EXPECT_EQ(refusal(good.substr(0, 90)), "3 sequences and 3 document boundaries take 60 bytes after the header, but the file has 56");
  EXPECT_EQ(refusal("X" + good.substr(1)), "must begin with the magic 'MMIDIDX'");
  EXPECT_EQ(refusal(Index{.version = 2}.text()), "version must be 1, got 2");
  EXPECT_EQ(refusal(Index{.code = 9}.text()), "dtype code must be in [1, 8], got 9");
  EXPECT_EQ(refusal(Index{.code = 0}.text()), "dtype code must be in [1, 8], got 0");
  EXPECT_EQ(refusal(Index{.claimed_sequences = 4}.text()), "4 sequences and 3 document boundaries take 72 bytes after the header, but the file has 60");
  EXPECT_EQ(refusal(Index{.claimed_sequences = (int64_t{1} << 62) + 3}.text()),
            "4611686018427387907 sequences and 3 document boundaries take 5.5340232221128655e+19 bytes after the header, but the file has 60");
  EXPECT_EQ(refusal(Index{.claimed_documents = (int64_t{1} << 61) + 3}.text()),
            "3 sequences and 2305843009213693955 document boundaries take 1.8446744073709552e+19 bytes after the header, but the file has 60");
  EXPECT_EQ(refusal(Index{.lengths = {}, .offsets = {}, .documents = {}}.text()), "must have at least 1 document boundary, got 0");
  EXPECT_EQ(refusal(Index{.lengths = {3, -2, 4}}.text()), "length of sequence 1 must not be negative, got -2");
  EXPECT_EQ(refusal(Index{.lengths = {3, 2, 5}}.text()), "sequence 2: 5 tokens of 2 bytes at byte 10 lie outside m.bin, which has 18 bytes");
  EXPECT_EQ(refusal(Index{.offsets = {0, -6, 10}}.text()), "sequence 1: 2 tokens of 2 bytes at byte -6 lie outside m.bin, which has 18 bytes");
  EXPECT_EQ(refusal(Index{.offsets = {0, 6, INT64_MAX}}.text()),
            "sequence 2: 4 tokens of 2 bytes at byte 9223372036854775807 lie outside m.bin, which has 18 bytes");
  EXPECT_EQ(refusal(Index{.documents = {1, 2, 3}}.text()), "document boundary 0 must be 0, got 1");
  EXPECT_EQ(refusal(Index{.documents = {0, 4, 3}}.text()),
            "document boundary 1 must be in [0, 3], the boundary before it and the number of sequences, got 4");
  EXPECT_EQ(refusal(Index{.documents = {0, 2, 1}}.text()),
            "document boundary 2 must be in [2, 3], the boundary before it and the number of sequences, got 1");
  EXPECT_EQ(refusal(Index{.documents = {0, 1, 2}}.text()), "the last document boundary must be the number of sequences, 3, got 2");
  fs::remove(folder_ / "m.bin");
  EXPECT_EQ(refusal(good), at("m.bin") + ": cannot be opened: No such file or directory");
}

TEST_F(Data, RowsAreFullAndCutPiecesGoOnAsNewOnes) {
  put_files("d", {5, 1, 0, 9, 4});
  Loader loader(bytes("d"), 4);
  std::map<int64_t, int64_t> counts;
  int64_t parts_of_one = 0;
  for (const Row& row : loader.next_rows(19)) {  // 4 epochs of 19 tokens
    ASSERT_EQ(row.ids.size(), 4u);
    ASSERT_EQ(std::accumulate(row.lengths.begin(), row.lengths.end(), int64_t{0}), 4);
    int64_t at = 0;
    for (const int64_t length : row.lengths) {
      parts_of_one += length == 1;
      for (int64_t i = 0; i < length; ++i) EXPECT_EQ(row.ids[static_cast<size_t>(at + i)], row.ids[static_cast<size_t>(at)]);
      at += length;
    }
    EXPECT_EQ(row.num_targets(), 4 - static_cast<int64_t>(row.lengths.size()));
    for (const int64_t id : row.ids) ++counts[id];
  }
  EXPECT_EQ(counts, (std::map<int64_t, int64_t>{{'A', 20}, {'B', 4}, {'D', 36}, {'E', 16}}));
  EXPECT_GT(parts_of_one, 0);
  const std::vector<Row> rows = loader.next_rows(3);
  const Batch batch = assemble(std::span(rows).subspan(1));
  EXPECT_EQ(batch.ids_n.numel(), 8);
  EXPECT_EQ(batch.spans.num_tokens(), 8);
  EXPECT_EQ(batch.spans.size(), static_cast<int64_t>(rows[1].lengths.size() + rows[2].lengths.size()));
  EXPECT_TRUE(batch.spans.whole());
}

// Documents of which each token says where it is: token `t` of document `d` is d * 1000 + t.
void put_numbered(const std::string& prefix, const std::vector<int>& lengths) {
  std::string tokens;
  Index index{.code = 4, .lengths = {}, .offsets = {}, .documents = {0}};
  for (size_t d = 0; d < lengths.size(); ++d) {
    index.lengths.push_back(lengths[d]);
    index.offsets.push_back(static_cast<int64_t>(tokens.size()));
    index.documents.push_back(static_cast<int64_t>(d) + 1);
    for (int t = 0; t < lengths[d]; ++t) add(tokens, static_cast<int32_t>(static_cast<int>(d) * 1000 + t));
  }
  std::ofstream(prefix + ".bin", std::ios::binary) << tokens;
  std::ofstream(prefix + ".idx", std::ios::binary) << index.text();
}

std::shared_ptr<const Dataset> numbered(const std::string& prefix, double fraction) {
  DataConfig config;
  config.source = "megatron";
  config.path = prefix;
  config.validation_fraction = fraction;
  return Dataset::open(config, 1000000);
}

TEST_F(Data, EveryTokenOfATrainingDocumentOccursOnceAnEpoch) {
  const std::vector<int> lengths{0, 1, 16, 17, 500, 0, 15, 32, 33, 999, 0, 2, 64};
  put_numbered(at("n"), lengths);
  for (const double fraction : {0.0, 0.25})
    for (const int64_t seq_len : {1, 7, 16, 2000}) {
      const auto dataset = numbered(at("n"), fraction);
      std::set<int64_t> training;
      for (size_t d = 0; d < lengths.size(); ++d)
        for (int t = 0; t < lengths[d]; ++t) training.insert(static_cast<int64_t>(d) * 1000 + t);
      for (int64_t i = 0; i < dataset->components()[0].num_held_out; ++i) {
        const int64_t d = dataset->held_out_document(0, i);
        training.erase(training.lower_bound(d * 1000), training.lower_bound(d * 1000 + 1000));
      }
      const auto epoch_tokens = static_cast<int64_t>(training.size());
      Loader loader(dataset, seq_len);
      std::vector<int64_t> stream, starts;
      for (const Row& row : loader.next_rows((3 * epoch_tokens + seq_len - 1) / seq_len)) {
        ASSERT_EQ(static_cast<int64_t>(row.ids.size()), seq_len);
        auto id = row.ids.begin();
        for (const int64_t length : row.lengths) {
          starts.push_back(static_cast<int64_t>(stream.size()));
          for (int64_t i = 0; i < length; ++i) ASSERT_EQ(id[i], id[0] + i) << "a part is a stretch of one document";
          stream.insert(stream.end(), id, id + length);
          id += length;
        }
      }
      for (int64_t epoch = 0; epoch < 3; ++epoch) {
        const auto begin = stream.begin() + epoch * epoch_tokens;
        EXPECT_EQ(std::set<int64_t>(begin, begin + epoch_tokens), training) << seq_len;
      }
      // A part starts at a multiple of seq_len in its document, or where a row cut a piece.
      for (const int64_t start : starts) {
        const int64_t id = stream[static_cast<size_t>(start)];
        const bool goes_on = start % seq_len == 0 && start > 0 && stream[static_cast<size_t>(start) - 1] == id - 1;
        EXPECT_TRUE(id % 1000 % seq_len == 0 || goes_on) << id;
      }
    }
}

TEST_F(Data, ABatchOfLongDocumentsComesFromSeveral) {
  put_files("d", std::vector<int>(12, 50000));
  Loader loader(bytes("d", 0.1), 256);
  for (int step = 0; step < 50; ++step) {
    std::set<int64_t> documents;
    for (const Row& row : loader.next_rows(8)) documents.insert(row.ids.begin(), row.ids.end());
    EXPECT_GE(documents.size(), 3u);
  }
}

TEST_F(Data, EndlessDocumentsAreCutByArithmetic) {
  DataConfig config;
  config.source = "random";
  config.document_len = 10;
  const auto dataset = Dataset::open(config, 1000);
  const Pieces pieces(*dataset, 0, 4);
  EXPECT_EQ(pieces.size(), Source::kEndless);
  for (const auto& [ordinal, document, begin, length] :
       {std::array<int64_t, 4>{0, 0, 0, 4}, {1, 0, 4, 4}, {2, 0, 8, 2}, {3, 1, 0, 4}, {Source::kEndless - 1, (Source::kEndless - 1) / 3, 0, 4}}) {
    const Piece piece = pieces.at(0, ordinal);
    EXPECT_EQ(piece.document, document);
    EXPECT_EQ(piece.begin, begin);
    EXPECT_EQ(piece.length, length);
    EXPECT_LT(piece.document, dataset->num_documents(0, Split::kTraining));
  }
}

TEST_F(Data, EpochsAreShuffledBySeed) {
  put_files("d", std::vector<int>(20, 1));
  const auto order = [&](int64_t seed) {
    Loader loader(bytes("d", 0, seed), 20);
    return loader.next_rows(3);
  };
  const auto a = order(1), b = order(2);
  EXPECT_EQ(flat(a), flat(order(1)));
  EXPECT_NE(a[0].ids, b[0].ids);
  EXPECT_NE(a[0].ids, a[1].ids);
  for (const Row& row : a) EXPECT_EQ(std::set<int64_t>(row.ids.begin(), row.ids.end()).size(), 20u);
}

TEST_F(Data, RowsDoNotDependOnWhoReadsThem) {
  put_files("d", {5, 1, 13, 9, 4});
  const auto dataset = bytes("d");
  Loader all(dataset, 7);
  const std::vector<Row> rows = all.next_rows(12);
  for (int64_t rank = 0; rank < 3; ++rank) {
    Loader own(dataset, 7);
    for (int64_t step = 0; step < 2; ++step) {
      const std::vector<Row> mine = own.next_rows(6, rank * 2, rank * 2 + 2);
      for (int64_t i = 0; i < 6; ++i) {
        const Row& want = rows[static_cast<size_t>(step * 6 + i)];
        EXPECT_EQ(mine[static_cast<size_t>(i)].lengths, want.lengths);
        EXPECT_EQ(mine[static_cast<size_t>(i)].ids, i / 2 == rank ? want.ids : std::vector<int64_t>());
      }
    }
    EXPECT_EQ(own.state(), all.state());
  }
}

DataConfig mixture_of(const std::string& a, const std::string& b) {
  DataConfig config;
  config.source = "mixture";
  config.validation_fraction = 0.2;
  config.mixture = {{.path = a, .weight = 3}, {.path = b, .weight = 1}, {.source = "random", .path = "", .document_len = 5, .weight = 2}};
  return config;
}

TEST_F(Data, AnyPositionIsRestoredExactly) {
  put_files("a", {5, 1, 0, 29, 4, 3, 3});
  put_files("b", {2, 17, 1, 1, 8}, 'a');
  const auto dataset = Dataset::open(mixture_of(at("a/*.txt"), at("b/*.txt")), 256);
  Loader whole(dataset, 6);
  const std::vector<Row> rows = whole.next_rows(60);
  Loader first(dataset, 6);
  for (size_t i = 0; i < rows.size(); ++i) {
    Loader resumed(dataset, 6);
    resumed.restore(nlohmann::json::parse(first.state().dump()));
    EXPECT_EQ(resumed.state(), first.state());
    const size_t left = std::min<size_t>(rows.size() - i, 15);
    EXPECT_EQ(flat(resumed.next_rows(static_cast<int64_t>(left))), flat({rows.begin() + static_cast<int64_t>(i), rows.begin() + static_cast<int64_t>(i + left)})) << i;
    first.next_rows(1);
  }
}

TEST_F(Data, SharesFollowTheWeights) {
  put_files("a", {50, 3, 20, 7, 11, 9});
  put_files("b", {200, 1, 100, 300}, 'a');
  DataConfig config = mixture_of(at("a/*.txt"), at("b/*.txt"));
  config.validation_fraction = 0;
  config.mixture.pop_back();
  Loader loader(Dataset::open(config, 256), 100);
  int64_t upper = 0, total = 0;
  for (int step = 0; step < 50; ++step) {
    for (const Row& row : loader.next_rows(8))
      for (const int64_t id : row.ids) upper += id < 'a', ++total;
    // Within one piece of each.
    EXPECT_LE(std::abs(static_cast<double>(upper) - 0.75 * static_cast<double>(total)), 100) << total;
  }
}

TEST_F(Data, HeldOutDocumentsAreNeverTrainedOn) {
  put_files("d", {3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 8, 9});
  for (const auto& [fraction, held_out] : {std::pair{0.01, 1}, {0.25, 3}, {0.5, 6}}) {
    const auto dataset = bytes("d", fraction);
    EXPECT_EQ(dataset->components()[0].num_held_out, held_out);
    std::set<int64_t> training, validation;
    Loader loader(dataset, 10);
    for (const Row& row : loader.next_rows(40)) training.insert(row.ids.begin(), row.ids.end());
    for (int64_t i = 0; i < held_out; ++i) validation.insert('A' + dataset->held_out_document(0, i));
    EXPECT_EQ(static_cast<int64_t>(validation.size()), held_out);
    EXPECT_EQ(static_cast<int64_t>(training.size()), 12 - held_out);
    for (const int64_t id : validation) EXPECT_EQ(training.count(id), 0u);
    const std::vector<Row> rows = validation_rows(dataset, 5, 1000);
    EXPECT_EQ(flat(rows), flat(validation_rows(dataset, 5, 1000)));
    for (const Row& row : rows)
      for (const int64_t id : row.ids) EXPECT_EQ(validation.count(id), 1u);
  }
  const auto dataset = bytes("d", 0.5);
  EXPECT_EQ(validation_rows(dataset, 5, 11).size(), 2u);
  EXPECT_EQ(validation_rows(dataset, 5, 1).size(), 1u);
  EXPECT_EQ(validation_rows(bytes("d", 0.01), 50, 1000).size(), 1u);
  DataConfig random;
  random.source = "random";
  random.document_len = 8;
  const auto endless = Dataset::open(random, 100);
  Loader loader(endless, 8);
  EXPECT_NE(loader.next_rows(1)[0].ids, validation_rows(endless, 8, 8)[0].ids);
  EXPECT_EQ(validation_rows(endless, 8, 80).size(), 10u);
}

TEST_F(Data, RandomIdsDependOnSeedDocumentAndPosition) {
  const auto a = open_random(1000, 64, 1), b = open_random(1000, 64, 2);
  const auto ids = read_all(*a, 5);
  EXPECT_NE(ids, read_all(*b, 5));
  EXPECT_NE(ids, read_all(*a, 6));
  std::vector<int64_t> part(10);
  a->read(5, 20, part);
  EXPECT_TRUE(std::equal(part.begin(), part.end(), ids.begin() + 20));
  for (const int64_t id : ids) EXPECT_TRUE(id >= 0 && id < 1000);
}

TEST_F(Data, DataThatDoNotServeAreNamed) {
  const std::string one = put("one.txt", "abc");
  DataConfig config;
  config.path = one;
  config.validation_fraction = 0;
  Loader small(Dataset::open(config, 98), 2);
  EXPECT_EQ(message([&] { small.next_rows(2); }), fmt::format("bytes '{0}': token 98 at position 1 of {0} must be in [0, 98)", one));
  put_files("empty", {0, 0, 0});
  EXPECT_EQ(message([&] { Loader(bytes("empty"), 2); }), fmt::format("bytes '{}': all 3 documents for training are empty", at("empty/*.txt")));
  EXPECT_EQ(message([&] { validation_rows(bytes("empty", 0.5), 2, 10); }),
            fmt::format("bytes '{}': all documents held out for validation are empty", at("empty/*.txt")));
  config.validation_fraction = 0.1;
  EXPECT_EQ(message([&] { validation_rows(Dataset::open(config, 256), 2, 10); }),
            fmt::format("bytes '{}': has 1 document, so none can be held out for validation", one));
  EXPECT_EQ(message([&] { validation_rows(bytes("empty", 0), 2, 10); }), "data.validation_fraction = 0 holds no document out for validation");
}

TEST_F(Data, APositionInOtherDataIsRefused) {
  put_files("a", {5, 3});
  put_files("b", {2, 17, 1});
  const auto dataset = bytes("a");
  Loader loader(dataset, 2);
  loader.next_rows(1);
  const nlohmann::json state = loader.state();
  const auto refusal = [&](std::shared_ptr<const Dataset> other, nlohmann::json saved) {
    Loader target(std::move(other), 2);
    return message([&] { target.restore(saved); });
  };
  EXPECT_EQ(refusal(dataset, state), "no error");
  const auto other = bytes("b");
  EXPECT_EQ(refusal(other, state),
            fmt::format("data position: source 0 changed: it was bytes '{}' with 2 documents (hash {}), now bytes '{}' with 3 documents (hash {})",
                        at("a/*.txt"), dataset->components()[0].source->hash(), at("b/*.txt"), other->components()[0].source->hash()));
  EXPECT_EQ(refusal(bytes("a", 0, 1), state), "data position: data.seed was 0, now 1");
  EXPECT_EQ(refusal(bytes("a", 0.5), state), "data position: data.validation_fraction was 0.0, now 0.5");
  EXPECT_EQ(refusal(Dataset::open(mixture_of(at("a/*.txt"), at("b/*.txt")), 256), loader.state()),
            "data position: data.validation_fraction was 0.0, now 0.2");
  DataConfig mixture = mixture_of(at("a/*.txt"), at("b/*.txt"));
  mixture.validation_fraction = 0;
  EXPECT_EQ(refusal(Dataset::open(mixture, 256), state), "data position: it was in 1 sources, now there are 3");
  mixture.mixture.resize(1);
  EXPECT_EQ(refusal(Dataset::open(mixture, 256), state), "data position: weight of source 0 was 1.0, now 3.0");
  EXPECT_NE(Dataset::open(mixture, 256)->hash(), dataset->hash());
}

TEST_F(Data, APositionAtAnotherSeqLenIsRefused) {
  put_files("a", {5, 3});
  Loader two(bytes("a"), 2), four(bytes("a"), 4);
  EXPECT_EQ(message([&] { four.restore(two.state()); }), "data position: training.seq_len was 2, now 4");
  EXPECT_NE(two.hash(), four.hash());
}

TEST_F(Data, ADamagedPositionIsRefused) {
  put_files("a", {5, 3});
  const auto dataset = bytes("a");
  Loader loader(dataset, 2);
  do loader.next_rows(1);
  while (loader.state()["current"] != 0);  // until a row cuts a piece
  const auto refusal = [&](const std::function<void(nlohmann::json&)>& damage) {
    nlohmann::json state = loader.state();
    damage(state);
    Loader target(dataset, 2);
    return message([&] { target.restore(state); });
  };
  using nlohmann::json;
  EXPECT_EQ(refusal([](json& s) { s = json::array(); }), "data position: has no 'seed'");
  EXPECT_EQ(refusal([](json& s) { s.erase("offset"); }), "data position: has no 'offset'");
  EXPECT_EQ(refusal([](json& s) { s["sources"] = 1; }), "data position: has no list 'sources'");
  EXPECT_EQ(refusal([](json& s) { s["sources"][0] = 1; }), "data position: has no 'documents'");
  EXPECT_EQ(refusal([](json& s) { s["sources"][0].erase("hash"); }), "data position: source 0 has no text 'hash'");
  EXPECT_EQ(refusal([](json& s) { s["current"] = 1; }), "data position: current must be an integer in [-1, 0], got 1");
  // Five pieces: of 2, 2, 1 tokens and of 2, 1.
  EXPECT_EQ(refusal([](json& s) { s["sources"][0]["ordinal"] = 6; }), "data position: ordinal must be an integer in [0, 5], got 6");
  EXPECT_EQ(refusal([](json& s) { s["sources"][0]["ordinal"] = 5; }), "data position: ordinal must be an integer in [0, 4], got 5");
  EXPECT_EQ(refusal([](json& s) { s["offset"] = 2; }), "data position: offset must be an integer in [1, 1], got 2");
  EXPECT_EQ(refusal([](json& s) { s["sources"][0]["epoch"] = 1.5; }), "data position: epoch must be an integer in [0, 9223372036854775806], got 1.5");
  EXPECT_EQ(refusal([](json& s) { s["offset"] = UINT64_MAX; }).substr(0, 40), "data position: offset must be an integer");
}

TEST(DataConfiguration, RulesAcrossKeys) {
  const auto issues = [](const DataConfig& config) {
    Issues list;
    check_data(config, list);
    std::string text;
    for (const Issue& issue : list.list()) text += issue.key + ": " + issue.rule + "\n";
    return text;
  };
  DataConfig config;
  EXPECT_EQ(issues(config), "path: must be given for source 'bytes'\n");
  config.path = "x";
  EXPECT_EQ(issues(config), "");
  config.document_len = 4;
  config.text_field = "body";
  config.mixture.resize(1);
  EXPECT_EQ(issues(config),
            "text_field: has no effect with source 'bytes', got 'body'\ndocument_len: has no effect with source 'bytes', got 4\n"
            "mixture: has no effect with source 'bytes', got 1 tables\nmixture[0].path: must be given for source 'bytes'\n");
  DataConfig random;
  random.source = "random";
  EXPECT_EQ(issues(random), "document_len: must be at least 1 for source 'random', got 0\n");
  random.source = "mixture";
  EXPECT_EQ(issues(random), "mixture: must have at least one [[data.mixture]] table for source 'mixture', got none\n");
  const Schema<DataConfig> schema = data_schema();
  EXPECT_EQ(schema.keys(), (std::vector<std::string>{"source", "path", "text_field", "document_len", "validation_fraction", "seed"}));
  EXPECT_EQ(broken_rule(*schema.find("validation_fraction"), Value(0.05)), "");
  EXPECT_NE(broken_rule(*schema.find("validation_fraction"), Value(0.6)), "");
  EXPECT_EQ(data_component_schema().keys(), (std::vector<std::string>{"source", "path", "text_field", "document_len", "weight"}));
}

}  // namespace
}  // namespace tessera
