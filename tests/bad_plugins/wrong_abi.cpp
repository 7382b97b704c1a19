#include "head.hpp"

ENTRY(.abi = 7)
