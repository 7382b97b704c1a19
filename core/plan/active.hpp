// Parameters that a token passes.
#pragma once
#include "plan/plan.hpp"

namespace tessera {

// All trained parameters, embedding and head included, but of those cut over experts (Axis::kExpert) only what one token's products use: half of the FLOPs that the
// layer declares in products with parameters, less its other matrices. With top_k of num_experts experts that is their share. A layer that uses another's weights adds none.
double active_parameters(const ModelPlan& plan);

}  // namespace tessera
