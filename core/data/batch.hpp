// The tokens of one micro-batch on one rank.
#pragma once
#include <ATen/core/Tensor.h>

#include "tessera/device.hpp"
#include "tessera/spans.hpp"

namespace tessera {

struct Batch {
  at::Tensor ids_n;        // int64 [N]
  Spans spans;             // in training each a whole document
  at::Tensor valid_n;      // bool [N], false at padding; undefined: all valid
  at::Tensor targets_n;    // int64 [N], what is to be predicted at the token, -1: nothing; undefined: the next id of its document
  int64_t first_token = 0;  // of ids_n: its number in training's order, of all global batches end to end

  Batch on(at::Device device) const {
    const auto there = [&](const at::Tensor& t) { return t.defined() ? to_device(t, device) : t; };
    return {there(ids_n), spans, there(valid_n), there(targets_n), first_token};
  }
};

}  // namespace tessera
