// The table of what a block sends between ranks.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace tessera {

// What a block exchanges between ranks by itself, beside what the core gathers and reduces at its edges. `tessera plan` adds it up.
struct Exchange {
  enum class Over {
    kTensor,      // tp
    kTensorPart,  // `part` neighbours of it
    kContext,     // cp
    kSequence,    // cp x tp
    kExperts,     // ep x etp
    kStage,       // all ranks of the pipeline stage, once a step after the last micro-batch
  };
  enum class Form {
    kGather,   // every rank's rows go to all; in the backward pass a reduce-scatter
    kScatter,  // the reverse: every rank's summands of all rows
    kSum,      // over the ranks; in the backward pass again
    kSend,     // rows to one rank or another; in the backward pass back
  };
  enum class Per {
    kToken,     // of the rows that the ranks of the group exchange: those of all of them for kGather and kScatter, the rank's own for the others
    kDocument,  // of the micro-batch
    kCall,      // of the block's forward pass
    kStep,
    kLoss,      // a loss that is reported once a step by its name, whichever layers add to it
  };
  std::string name;      // "conv halo"
  Over over = Over::kTensor;
  Form form = Form::kSum;
  Per per = Per::kToken;
  int64_t elements = 0;  // of one rank, per token, document or call
  int64_t bytes = 0;     // of an element; 0: the compute dtype's
  int64_t part = 1;      // ranks of kTensorPart
  int64_t reach = -1;    // of kGather over kContext: the last tokens that a chunk holds of a document that goes on behind it; -1: all of them
  bool backward = true;  // the backward pass has its share
  bool again = true;     // recomputation repeats it
  // The volume hangs on the data: what is planned is the expectation over even routing.
  bool estimate() const { return form == Form::kSend && per == Per::kToken; }
};
using ExchangeTable = std::vector<Exchange>;

}  // namespace tessera
