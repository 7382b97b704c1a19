#include "checkpoint/safetensors.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tessera/error.hpp"

namespace tessera {
namespace {
namespace fs = std::filesystem;

class Safetensors : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "safetensors-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  fs::path put(const std::string& name, const std::string& bytes) {
    std::ofstream(folder_ / name, std::ios::binary) << bytes;
    return folder_ / name;
  }
  fs::path put_file(const std::string& header, int64_t data_bytes, int64_t claimed = -1) {
    const uint64_t length = claimed < 0 ? header.size() : static_cast<uint64_t>(claimed);
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &length, 8);
    return put("a.safetensors", bytes + header + std::string(static_cast<size_t>(data_bytes), '\0'));
  }
  // The error of opening such a file, without its path.
  std::string refusal(const std::string& header, int64_t data_bytes, int64_t claimed = -1) {
    const fs::path path = put_file(header, data_bytes, claimed);
    return message([&] { SafetensorsFile::open(path); }, path);
  }
  static std::string message(const std::function<void()>& run, const fs::path& path) {
    try {
      run();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kRuntime);
      EXPECT_EQ(error.message().rfind(path.string() + ": ", 0), 0u) << error.message();
      return error.message().substr(std::min(error.message().size(), path.string().size() + 2));
    }
    return "no error";
  }
  int64_t num_files() const { return std::distance(fs::directory_iterator(folder_), fs::directory_iterator()); }

  fs::path folder_;
};

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return fmt::format(R"("{}":{{"dtype":"{}","shape":{},"data_offsets":{}}})", name, dtype, shape, offsets);
}

TEST_F(Safetensors, RoundTripOfEveryDtype) {
  const at::ScalarType dtypes[] = {at::kBool, at::kByte, at::kChar, at::kShort, at::kInt, at::kLong, at::kHalf, at::kBFloat16, at::kFloat, at::kDouble};
  std::vector<TensorSpec> specs;
  std::map<std::string, at::Tensor> tensors;
  for (const at::ScalarType dtype : dtypes) {
    const std::string name = std::string("t/\"") + c10::toString(dtype) + "\" \xc3\xa9";
    tensors[name] = dtype == at::kBool ? at::ones({3, 1}, dtype) : at::arange(3, at::kFloat).reshape({3, 1}).to(dtype);
    specs.push_back({name, dtype, {3, 1}});
  }
  tensors["empty"] = at::zeros({0, 4});
  tensors["scalar"] = at::ones({});
  specs.push_back({"empty", at::kFloat, {0, 4}});
  specs.push_back({"scalar", at::kFloat, {}});
  SafetensorsWriter writer(folder_ / "a.safetensors", specs, {{"format", "pt"}, {"note", "x\ny"}});
  for (const auto& [name, tensor] : tensors) writer.write(name, tensor);
  EXPECT_FALSE(fs::exists(folder_ / "a.safetensors"));
  writer.finish();
  EXPECT_EQ(num_files(), 1);

  at::Tensor kept;
  {
    const SafetensorsFile file = SafetensorsFile::open(folder_ / "a.safetensors");
    EXPECT_EQ(file.entries().size(), specs.size());
    EXPECT_EQ(file.metadata(), (Metadata{{"format", "pt"}, {"note", "x\ny"}}));
    for (const auto& [name, tensor] : tensors) {
      const at::Tensor read = file.tensor(name);
      EXPECT_EQ(read.scalar_type(), tensor.scalar_type()) << name;
      EXPECT_EQ(read.sizes(), tensor.sizes()) << name;
      EXPECT_TRUE(at::equal(read, tensor)) << name;
      EXPECT_EQ((file.find(name)->begin) % static_cast<int64_t>(tensor.element_size()), 0) << name;
    }
    EXPECT_EQ(message([&] { file.tensor("none"); }, file.path()), "has no tensor 'none'");
    kept = file.tensor("scalar");
  }
  EXPECT_EQ(kept.item<float>(), 1.0f);
  kept.fill_(2);
  EXPECT_EQ(SafetensorsFile::open(folder_ / "a.safetensors").tensor("scalar").item<float>(), 1.0f);
}

TEST_F(Safetensors, HeaderIsPaddedAndReadableByTheReferenceLayout) {
  SafetensorsWriter writer(folder_ / "a.safetensors", {{"w", at::kInt, {2}}});
  writer.write("w", at::arange(2, at::kInt));
  writer.finish();
  const std::string bytes = read_file(folder_ / "a.safetensors");
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  EXPECT_EQ(length % 8, 0u);
  const std::string header = R"({"__metadata__":{"format":"pt"},"w":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}})";
  EXPECT_EQ(bytes.substr(8, header.size()), header);
  EXPECT_EQ(bytes.substr(8 + header.size(), length - header.size()), std::string(length - header.size(), ' '));
  EXPECT_EQ(bytes.substr(8 + length), std::string("\0\0\0\0\1\0\0\0", 8));
}

TEST_F(Safetensors, WritesStridedTensorsAndReadsUnalignedOnes) {
  const at::Tensor x = at::randn({3, 5});
  SafetensorsWriter writer(folder_ / "x.safetensors", {{"t", at::kFloat, {5, 3}}});
  writer.write("t", x.t());
  writer.finish();
  EXPECT_TRUE(at::equal(SafetensorsFile::open(folder_ / "x.safetensors").tensor("t"), x.t()));
  const fs::path path = put_file("{" + entry("a", "U8", "[1]", "[0,1]") + "," + entry("b", "F32", "[2]", "[1,9]") + "}", 9);
  EXPECT_TRUE(at::equal(SafetensorsFile::open(path).tensor("b"), at::zeros({2})));
}

TEST_F(Safetensors, RefusesWhatAHeaderMayClaim) {
  const std::string a = entry("a", "F32", "[2]", "[0,8]");
  EXPECT_EQ(refusal("{" + a + "}", 8), "no error");
  EXPECT_EQ(refusal("{}   ", 0), "no error");
  EXPECT_EQ(refusal("{}", 0, 3), "header of 3 bytes is longer than the file, which has 2 bytes after its length");
  EXPECT_EQ(refusal("{}", 0, INT64_MAX), "header of 9223372036854775807 bytes is longer than the file, which has 2 bytes after its length");
  EXPECT_EQ(refusal("{" + a, 8), "header: not valid JSON at byte " + std::to_string(a.size() + 1));
  EXPECT_EQ(refusal("", 0), "header: not valid JSON at byte 0");
  EXPECT_EQ(refusal("[]", 0), "header must be a JSON object, got array");
  EXPECT_EQ(refusal("{\"\xff\":1}", 0), "header: not UTF-8 at byte 2");
  EXPECT_EQ(refusal("{\"\xed\xa0\x80\":1}", 0), "header: not UTF-8 at byte 2");
  EXPECT_EQ(refusal("{" + a + "," + a + "}", 8), "header: key 'a' occurs twice");
  EXPECT_EQ(refusal(R"({"a":{"dtype":"F32","dtype":"F32"}})", 0), "header: key 'dtype' occurs twice");
  EXPECT_EQ(refusal(R"({"a":[[[[1]]]]})", 0), "header: JSON nested deeper than 4 levels");
  EXPECT_EQ(refusal(std::string(200000, '['), 0), "header: JSON nested deeper than 4 levels");
  EXPECT_EQ(refusal(R"({"a":1})", 0), "tensor 'a': must be an object, got number");
  EXPECT_EQ(refusal(R"({"a":{"dtype":"F32","shape":[]}})", 0), "tensor 'a': has no 'data_offsets'");
  EXPECT_EQ(refusal(R"({"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":1}})", 0), "tensor 'a': unknown key 'x'");
  EXPECT_EQ(refusal("{" + entry("a", "F33", "[2]", "[0,8]") + "}", 8), "tensor 'a': unknown dtype \"F33\"");
  EXPECT_EQ(refusal(R"({"a":{"dtype":4,"shape":[],"data_offsets":[0,4]}})", 4), "tensor 'a': unknown dtype 4");
  EXPECT_EQ(refusal("{" + entry("a", "F32", "2", "[0,8]") + "}", 8), "tensor 'a': shape must be a list, got number");
  EXPECT_EQ(refusal("{" + entry("a", "F32", "[-2]", "[0,8]") + "}", 8), "tensor 'a': shape must be an integer in [0, 2^63), got -2");
  EXPECT_EQ(refusal("{" + entry("a", "F32", "[2.0]", "[0,8]") + "}", 8), "tensor 'a': shape must be an integer in [0, 2^63), got 2.0");
  EXPECT_EQ(refusal("{" + entry("a", "F32", "[2]", "[-4,4]") + "}", 8), "tensor 'a': data_offsets must be an integer in [0, 2^63), got -4");
  EXPECT_EQ(refusal("{" + entry("a", "F32", "[2]", "[0,18446744073709551615]") + "}", 8),
            "tensor 'a': data_offsets must be an integer in [0, 2^63), got 18446744073709551615");
  EXPECT_EQ(refusal("{" + entry("a", "F32", "[2]", "[0]") + "}", 8), "tensor 'a': data_offsets must be two integers, got [0]");
  EXPECT_EQ(refusal("{" + entry("a", "F32", "[2]", "[0,16]") + "}", 8), "tensor 'a': bytes [0, 16) lie outside the data, which has 8 bytes");
  EXPECT_EQ(refusal("{" + entry("a", "F32", "[2]", "[8,0]") + "}", 8), "tensor 'a': bytes [8, 0) lie outside the data, which has 8 bytes");
  EXPECT_EQ(refusal("{" + entry("a", "F32", "[3]", "[0,8]") + "}", 8), "tensor 'a': shape [3] of F32 takes 12 bytes, but data_offsets [0, 8] hold 8");
  EXPECT_EQ(refusal("{" + entry("a", "F32", "[4611686018427387904,2]", "[0,8]") + "}", 8),
            "tensor 'a': shape [4611686018427387904, 2] of F32 has more than 2^63 bytes");
  EXPECT_EQ(refusal("{" + entry("a", "F32", "[4294967296,0,4294967296]", "[0,0]") + "}", 0),
            "tensor 'a': shape [4294967296, 0, 4294967296] of F32 has more than 2^63 bytes");
  std::string ones = "[1";
  for (int i = 0; i < 64; ++i) ones += ",1";
  EXPECT_EQ(refusal("{" + entry("a", "U8", ones + "]", "[0,1]") + "}", 1), "tensor 'a': must have at most 64 dimensions, got 65");
  EXPECT_EQ(refusal("{" + a + "," + entry("b", "F32", "[2]", "[4,12]") + "}", 12), "tensor 'b' overlaps 'a': bytes [4, 12) and [0, 8)");
  EXPECT_EQ(refusal("{" + a + "," + entry("b", "F32", "[2]", "[0,8]") + "}", 8), "tensor 'b' overlaps 'a': bytes [0, 8) and [0, 8)");
  EXPECT_EQ(refusal("{" + a + "," + entry("b", "F32", "[1]", "[12,16]") + "}", 16), "bytes [8, 12) of the data belong to no tensor");
  EXPECT_EQ(refusal("{" + a + "}", 9), "bytes [8, 9) of the data belong to no tensor");
  EXPECT_EQ(refusal(R"({"__metadata__":1})", 0), "__metadata__ must be an object of strings, got number");
  EXPECT_EQ(refusal(R"({"__metadata__":{"a":[]}})", 0), "__metadata__ must be an object of strings, but 'a' is []");
}

TEST_F(Safetensors, RefusesWhatIsNoSuchFile) {
  const fs::path shorter = put("s.safetensors", "1234567");
  EXPECT_EQ(message([&] { SafetensorsFile::open(shorter); }, shorter), "must begin with 8 bytes of header length, but the file has 7");
  const fs::path none = folder_ / "none";
  EXPECT_EQ(message([&] { SafetensorsFile::open(none); }, none), "cannot be opened: No such file or directory");
  EXPECT_EQ(message([&] { SafetensorsFile::open(folder_); }, folder_), "must be a regular file, got a folder");
  const fs::path big = put("h.safetensors", std::string("\x01\xe1\xf5\x05\0\0\0\0", 8));
  fs::resize_file(big, 200'000'000);
  EXPECT_EQ(message([&] { SafetensorsFile::open(big); }, big), "header must have at most 100000000 bytes, got 100000001");
  std::string bytes(8, '\0');
  const std::string header = "{" + entry("a", "BOOL", "[2]", "[0,2]") + "}";
  bytes[0] = static_cast<char>(header.size());
  const fs::path truth = put("b.safetensors", bytes + header + std::string("\0\2", 2));
  EXPECT_EQ(message([&] { SafetensorsFile::open(truth).tensor("a"); }, truth), "tensor 'a': BOOL must be 0 or 1, got 2 at element 1");
}

TEST_F(Safetensors, EveryTruncationIsRefused) {
  SafetensorsWriter writer(folder_ / "a.safetensors", {{"a", at::kFloat, {3}}, {"b", at::kByte, {3}}});
  writer.write("b", at::zeros({3}, at::kByte));
  writer.write("a", at::zeros({3}));
  writer.finish();
  const std::string bytes = read_file(folder_ / "a.safetensors");
  for (size_t n = 0; n < bytes.size(); ++n) {
    const fs::path path = put("cut.safetensors", bytes.substr(0, n));
    EXPECT_THROW(SafetensorsFile::open(path), Error) << n;
  }
  for (size_t n = 0; n < bytes.size(); ++n) {
    std::string damaged = bytes;
    damaged[n] = static_cast<char>(damaged[n] ^ 0x15);
    const fs::path path = put("bad.safetensors", damaged);
    try {
      const SafetensorsFile file = SafetensorsFile::open(path);
      for (const TensorEntry& e : file.entries()) file.tensor(e.name);
    } catch (const Error&) {
    }
  }
}

TEST_F(Safetensors, FolderOfShards) {
  std::vector<TensorSpec> specs;
  for (int i = 0; i < 5; ++i) specs.push_back({fmt::format("w.{}", i), at::kFloat, {4}});
  SafetensorsFolderWriter writer(folder_, specs, {{"format", "pt"}}, 32);
  for (int i = 4; i >= 0; --i) writer.write(specs[static_cast<size_t>(i)].name, at::ones({4}).mul(i));
  writer.finish();
  EXPECT_EQ(writer.total_bytes(), 80);
  EXPECT_EQ(writer.files(), (std::vector<std::string>{"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                                                      "model-00003-of-00003.safetensors", "model.safetensors.index.json"}));
  EXPECT_EQ(num_files(), 4);
  EXPECT_EQ(nlohmann::json::parse(read_file(folder_ / "model.safetensors.index.json"))["metadata"]["total_size"], 80);
  EXPECT_TRUE(SafetensorsFolder::exists(folder_));
  const SafetensorsFolder folder = SafetensorsFolder::open(folder_);
  EXPECT_EQ(folder.size(), 5);
  EXPECT_EQ(folder.names().front(), "w.0");
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(at::equal(folder.tensor(fmt::format("w.{}", i)), at::ones({4}).mul(i)));
  EXPECT_EQ(folder.find("w.9"), nullptr);
  fs::create_directory(folder_ / "one");
  SafetensorsFolderWriter one(folder_ / "one", specs);
  for (const TensorSpec& spec : specs) one.write(spec.name, at::ones({4}));
  one.finish();
  EXPECT_EQ(one.files(), (std::vector<std::string>{"model.safetensors"}));
  EXPECT_EQ(SafetensorsFolder::open(folder_ / "one").size(), 5);
}

TEST_F(Safetensors, FolderErrors) {
  const fs::path index = folder_ / "model.safetensors.index.json";
  const auto refused = [&](const std::string& text) {
    put(index.filename().string(), text);
    return message([&] { SafetensorsFolder::open(folder_); }, index);
  };
  EXPECT_EQ(message([&] { SafetensorsFolder::open(folder_); }, folder_), "holds neither model.safetensors nor model.safetensors.index.json");
  put_file("{" + entry("a", "F32", "[2]", "[0,8]") + "," + entry("b", "F32", "[1]", "[8,12]") + "}", 12);
  EXPECT_EQ(refused("{}"), "has no object 'weight_map'");
  EXPECT_EQ(refused(R"({"weight_map":{}})"), "weight_map is empty");
  EXPECT_EQ(refused(R"({"weight_map":{"a":1}})"), "weight_map: the shard of 'a' must be a file name, got 1");
  EXPECT_EQ(refused(R"({"weight_map":{"a":"../a.safetensors"}})"),
            "weight_map: the shard of 'a' must be a file name in the index's folder, got \"../a.safetensors\"");
  EXPECT_EQ(refused(R"({"weight_map":{"a":"x.safetensors"}})"), "shard x.safetensors of tensor 'a' is missing");
  EXPECT_EQ(refused(R"({"weight_map":{"c":"a.safetensors"}})"), "shard a.safetensors does not hold tensor 'c'");
  EXPECT_EQ(refused(R"({"weight_map":{"a":"a.safetensors"}})"), "weight_map does not list tensor 'b' of shard a.safetensors");
  EXPECT_EQ(refused(R"({"weight_map":{"a":"a.safetensors","a":"a.safetensors"}})"), "key 'a' occurs twice");
  EXPECT_EQ(refused(R"({"weight_map":{"a":"a.safetensors","b":"a.safetensors"}})"), "no error");
  put("model.safetensors", "");
  EXPECT_EQ(message([&] { SafetensorsFolder::open(folder_); }, folder_), "holds both model.safetensors and model.safetensors.index.json");
}

TEST_F(Safetensors, WriterHoldsItsCallersToTheDeclaration) {
  const fs::path path = folder_ / "a.safetensors";
  EXPECT_EQ(message([&] { SafetensorsWriter(path, {{"a", at::kFloat, {2}}, {"a", at::kFloat, {2}}}); }, path), "tensor 'a' is declared twice");
  SafetensorsWriter writer(path, {{"a", at::kFloat, {2}}});
  EXPECT_EQ(message([&] { writer.write("b", at::ones({2})); }, path), "tensor 'b' was not declared");
  EXPECT_EQ(message([&] { writer.write("a", at::ones({3})); }, path), "tensor 'a' was declared as F32 [2], got F32 [3]");
  EXPECT_EQ(message([&] { writer.write("a", at::ones({2}, at::kBFloat16)); }, path), "tensor 'a' was declared as F32 [2], got BF16 [2]");
  EXPECT_EQ(message([&] { writer.finish(); }, path), "tensor 'a' was declared but not written");
  writer.write("a", at::ones({2}));
  EXPECT_EQ(message([&] { writer.write("a", at::ones({2})); }, path), "tensor 'a' was written twice");
}

TEST_F(Safetensors, AWriteThatFailsLeavesNothingBehind) {
  const fs::path path = folder_ / "a.safetensors";
  put("a.safetensors", "old");
  // The temporary file is a link to the device that is always full.
  fs::create_symlink("/dev/full", AtomicFile::temporary(path));
  EXPECT_EQ(message([&] { SafetensorsWriter(path, {{"a", at::kFloat, {2}}}); }, path), "cannot be written: No space left on device");
  EXPECT_EQ(num_files(), 1);
  EXPECT_EQ(read_file(path), "old");
  {
    struct rlimit old;
    ::getrlimit(RLIMIT_FSIZE, &old);
    const struct rlimit small{4096, old.rlim_max};
    const auto handler = ::signal(SIGXFSZ, SIG_IGN);
    SafetensorsWriter writer(path, {{"a", at::kFloat, {4096}}});
    ::setrlimit(RLIMIT_FSIZE, &small);
    const std::string text = message([&] { writer.write("a", at::ones({4096})); }, path);
    ::setrlimit(RLIMIT_FSIZE, &old);
    ::signal(SIGXFSZ, handler);
    EXPECT_EQ(text, "cannot be written: File too large");
    EXPECT_EQ(num_files(), 2);
  }
  EXPECT_EQ(num_files(), 1);
  const fs::path missing = folder_ / "none" / "a.safetensors";
  EXPECT_EQ(message([&] { SafetensorsWriter(missing, {}); }, missing), "cannot be created: No such file or directory");
}

TEST_F(Safetensors, AReadOnlyFolderIsNamed) {
  fs::create_directory(folder_ / "ro");
  ::chmod(folder_.c_str(), 0755);
  ::chmod((folder_ / "ro").c_str(), 0555);
  const bool root = ::geteuid() == 0;
  if (root && ::seteuid(65534) != 0) GTEST_SKIP() << "root that cannot become another user writes everywhere";
  const fs::path path = folder_ / "ro" / "a.safetensors", sub = folder_ / "ro" / "b";
  const std::string text = message([&] { SafetensorsWriter(path, {}); }, path);
  const std::string folder_text = message([&] { make_folder(sub); }, sub);
  ASSERT_TRUE(!root || ::seteuid(0) == 0);
  EXPECT_EQ(text, "cannot be created: Permission denied");
  EXPECT_EQ(folder_text, "folder cannot be created: Permission denied");
}

}  // namespace
}  // namespace tessera
