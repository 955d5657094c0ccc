// All kernels for one instruction set, see kernels.cpp.

namespace ISA {

// In the order in which they need each other.
#include "simd.h"
#include "pointwise.h"
#include "parts.h"
#include "few_rows.h"
#include "many_rows.h"
#include "attention.h"
#include "lookahead.h"
#include "program.h"
#include "entries.h"

}  // namespace ISA
