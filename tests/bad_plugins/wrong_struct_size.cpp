#include "head.hpp"
#include "tessera/build_key.hpp"

ENTRY(.build_key = TESSERA_BUILD_KEY, .param_size = 4)
