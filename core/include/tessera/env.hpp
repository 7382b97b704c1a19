// What a block may know beyond its own table.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace tessera {

// Degrees of the mesh axes. (ep, etp) are a second view of dp_shard x cp x tp.
struct Mesh {
  int64_t pp = 1, dp_replicate = 1, dp_shard = 1, cp = 1, tp = 1, ep = 1, etp = 1;
  int64_t size() const { return pp * dp_replicate * dp_shard * cp * tp; }
};

// A mesh axis that may cut a parameter's logical shape. dp_shard cuts flat buffers and is no business of a block's.
enum class Axis { kTensor, kExpert, kExpertTensor };
int64_t degree(const Mesh& mesh, Axis axis);
const char* axis_name(Axis axis);  // "tp", "ep", "etp"

struct Env {
  int64_t hidden_size = 0;
  int64_t vocab_size = 0;
  int64_t num_layers = 0;   // of the main pattern: residual-output projections start at init_std / sqrt(num_layers)
  double norm_eps = 1e-5;
  double init_std = 0.02;
  Mesh mesh;
};

// The documents that a cost is asked for: `count` documents of `length` tokens, each whole.
struct DocumentRun {
  int64_t length = 0, count = 0;
};
using Documents = std::vector<DocumentRun>;
int64_t num_tokens(const Documents& documents);

}  // namespace tessera
