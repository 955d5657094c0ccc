// All kernels for one instruction set, see kernels.cpp.

namespace ISA {

#include "simd.h"

#include "attention.h"
#include "pointwise.h"

#include "lookahead.h"

#include "program.h"

#include "entries.h"

}  // namespace ISA
