#include "head.hpp"

ENTRY(.build_key = "gcc-4 cxx11abi=0 libtorch=1.0.0 abi=1")
