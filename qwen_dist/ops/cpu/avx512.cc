#if defined(__x86_64__) && defined(__GNUC__)

#define SIMD __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define SIMD_VECTORS "simd_avx512.h"
#include "build.h"

const Kernels kAvx512 = kBuild;

#endif
