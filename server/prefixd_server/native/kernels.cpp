// The kernels, once for each instruction set: Python calls `prefixd_<function>_<isa>` of the best.
//
// The headers below have no includes and no guards, as each is included once a set, in a namespace
// of its own. What is not TARGET is inlined into what is, or has no vectors.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "gemm.h"
#include "team.h"

#define JOINED(function, isa) prefixd_##function##_##isa
#define EXPANDED(function, isa) JOINED(function, isa)
#define NAME(function) EXPANDED(function, ISA)

#if defined(__x86_64__)

#define ISA avx512
#define LANES 16
#define TARGET __attribute__((target("arch=x86-64-v4")))
#include "one_isa.h"
#undef ISA
#undef LANES
#undef TARGET

#define ISA avx2
#define LANES 8
#define TARGET __attribute__((target("arch=x86-64-v3")))
#include "one_isa.h"
#undef ISA
#undef LANES
#undef TARGET

#endif

#define ISA generic
#define LANES 4
#define TARGET
#include "one_isa.h"
