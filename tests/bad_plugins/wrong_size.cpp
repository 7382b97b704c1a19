#include "head.hpp"

ENTRY(.size = 24)
