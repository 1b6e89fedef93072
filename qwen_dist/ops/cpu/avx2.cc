#if defined(__x86_64__) && defined(__GNUC__)

#define SIMD __attribute__((target("avx2,fma,f16c")))
#define SIMD_VECTORS "simd_avx2.h"
#include "build.h"

const Kernels kAvx2 = kBuild;

#endif
