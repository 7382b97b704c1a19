// Documents of token ids with random access.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace tessera {

// What is to be predicted at a token.
struct Target {
  int64_t id = -1;    // -1: nothing
  int64_t group = 0;  // that its accuracy is counted in
};

// Documents may be empty. Content does not change while a source is open; a file that does change is an error when it is read.
// Used by one thread at a time.
class Source {
 public:
  virtual ~Source();
  // kEndless for a source that never repeats, whose documents all have one length, above 0.
  virtual int64_t num_documents() const = 0;
  virtual int64_t document_len(int64_t document) const = 0;  // tokens
  // Tokens [begin, begin + out.size()) of a document, which must lie in it. The ids are as stored: the caller checks them.
  virtual void read(int64_t document, int64_t begin, std::span<int64_t> out) const = 0;
  // Whether it says itself what is to be predicted. Else that is the next token everywhere.
  virtual bool has_targets() const { return false; }
  // Of tokens [begin, begin + out.size()), where it has targets.
  virtual void read_targets(int64_t /*document*/, int64_t /*begin*/, std::span<Target> /*out*/) const {}
  // "text/a.txt", "a.jsonl:12", "corpus.bin document 3".
  virtual std::string document_name(int64_t document) const = 0;
  // The source for messages: "bytes 'text/**'".
  virtual const std::string& name() const = 0;
  // Changes with the documents' order, names below the glob's fixed part, sizes and contents (of large files, samples).
  virtual const std::string& hash() const = 0;

  static constexpr int64_t kEndless = int64_t{1} << 62;
};

// All throw Error(kRuntime) that names the file: a glob that matches nothing, a file that cannot be read, a line that is no JSON object, an index
// that claims what its files do not hold.

// Every file of the glob is a document, its bytes are the tokens.
std::unique_ptr<Source> open_bytes(const std::string& glob);
// Every line of the glob's files is a JSON object; the UTF-8 bytes of its string `field` are the tokens. Blank lines are skipped. A line is parsed
// and checked when its length is asked for or it is read.
std::unique_ptr<Source> open_jsonl(const std::string& glob, const std::string& field);
// `<prefix>.bin` and `<prefix>.idx`. Source: Megatron-LM core/datasets/indexed_dataset.py.
std::unique_ptr<Source> open_megatron(const std::string& prefix);
// Endless documents of `document_len` ids, uniform in [0, vocab_size), that depend on (seed, document, position) only.
std::unique_ptr<Source> open_random(int64_t vocab_size, int64_t document_len, uint64_t seed);

}  // namespace tessera
